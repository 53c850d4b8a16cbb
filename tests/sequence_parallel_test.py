"""Runs tests/on_eight_devices.py in a process with eight devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "tier",
    [
        pytest.param("not full", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.full),
    ],
)
def test_eight_devices_compute_what_one_computes(tier):
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",  # with fewer threads than devices the CPU backend can wait for itself
    }
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-m", tier, "tests/on_eight_devices.py"),
        ],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
