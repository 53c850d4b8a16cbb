"""The wheel is scanax.ops alone, and works where nothing but JAX is."""

import subprocess
import sys
import zipfile

import pytest

from experiments.training.checkout import CHECKOUT

USE = """
import jax, jax.numpy as jnp, scanax.ops, sys
q = jnp.ones((1, 5, 1, 4))
o, state = scanax.ops.gated_linear_attention(q, q, q)
assert o.shape == (1, 5, 1, 4) and state.shape == (1, 1, 4, 4)
assert scanax.ops.__file__.startswith(sys.argv[1]), scanax.ops.__file__
assert "flax" not in sys.modules
"""


@pytest.mark.slow
def test_the_wheel_holds_the_ops_and_runs_in_an_empty_directory(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            tmp_path / "dist",
            CHECKOUT,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("scanax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert files and all(name.startswith("scanax/ops/") for name in files)
        expected = {
            f"scanax/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "ops").rglob("*.py")
        }
        assert set(files) == expected
        archive.extractall(tmp_path / "installed")
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = [
            line
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist") and "extra" not in line
        ]
        assert len(required) == 1 and required[0].startswith("Requires-Dist: jax")
    empty = tmp_path / "empty"
    empty.mkdir()
    subprocess.run(
        [sys.executable, "-P", "-c", USE, str(tmp_path / "installed")],
        check=True,
        cwd=empty,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": "", "JAX_PLATFORMS": "cpu"},
    )
