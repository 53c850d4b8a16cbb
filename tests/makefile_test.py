"""The Makefile in folders whose names have spaces, with an interpreter that only notes what it is
asked."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from experiments.training.checkout import CHECKOUT

# A script of the shell, and of Python: a first line "#!" cannot hold a path with spaces.
INTERPRETER = f"""#!/bin/sh
''''exec {shlex.quote(sys.executable)} "$0" "$@" # '''
import json, os, pathlib, shutil, sys
arguments = sys.argv[1:]
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps([arguments, os.environ.get("PYTHONPATH")]) + "\\n")
if arguments[:2] == ["-m", "venv"]:
    pathlib.Path(arguments[2], "bin").mkdir(parents=True)
    for name in ("python", "ruff", "pyright"):
        shutil.copy(__file__, pathlib.Path(arguments[2], "bin", name))
if "--target" in arguments:
    pathlib.Path(arguments[arguments.index("--target") + 1]).mkdir()
"""


@pytest.mark.parametrize("venv", [".venv", "my env", "/my env"])
def test_make_works_where_folders_have_spaces_in_their_names(tmp_path, venv):
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(CHECKOUT / name, folder)
    python = folder / "my python"
    python.write_text(INTERPRETER)
    python.chmod(0o755)
    notes = tmp_path / "notes"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    venv = f"{tmp_path}{venv}" if venv.startswith("/") else venv
    command = ["make", f"PYTHON={python}", f"VENV={venv}", "test", "lint"]
    for _ in range(2):
        environment["NOTES"] = str(notes)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    noted = [json.loads(line) for line in notes.read_text().splitlines()]
    compiler = folder / venv / "tpu-compiler"
    tests = [path for arguments, path in noted if arguments[:2] == ["-m", "pytest"]]
    assert tests == [str(compiler)] * 2
    assert (folder / venv / "ready").exists() and (compiler / "ready").exists()
    assert sum(arguments[:2] == ["-m", "pip"] for arguments, _ in noted) == 2  # of the first run
    made = {"a folder", "notes"} | ({"my env"} if venv.startswith("/") else set())
    assert {path.name for path in tmp_path.iterdir()} == made
