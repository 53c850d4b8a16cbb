"""Commands keep compiled programs between them, and freed memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.training.checkout import CHECKOUT
from experiments.training.process_setup import cache_directory

COMPILE = """
import jax
from absl import flags
from experiments.training import command_line
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
def main():
    jax.jit(lambda x: x + 1)(jax.numpy.ones(3))
    print("hits", events.count("cache_hits"), "misses", events.count("cache_misses"))
command_line.run(main)
"""


def command(code: str, *arguments: str, **environment: str) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "MALLOC_", "XDG_"))
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def counts(*arguments: str, **environment: str) -> tuple[int, int]:
    _, hits, _, misses = command(COMPILE, *arguments, **environment).split()
    return int(hits), int(misses)


def programs(folder: Path) -> int:
    return len(list(folder.glob("*-cache")))


def test_the_second_command_compiles_nothing(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    hits, misses = counts(**environment)
    assert hits == 0 and misses > 0 and programs(tmp_path / "scanax" / "jax") == misses
    assert counts(**environment) == (misses, 0)


def test_nocache_keeps_nothing(tmp_path):
    assert counts("--nocache", XDG_CACHE_HOME=str(tmp_path)) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_the_cache_that_the_environment_names_is_used(tmp_path):
    named, other = tmp_path / "named", tmp_path / "other"
    _, misses = counts(JAX_COMPILATION_CACHE_DIR=str(named), XDG_CACHE_HOME=str(other))
    assert programs(named) == misses > 0 and not other.exists()


def test_without_a_place_to_keep_programs_commands_work(tmp_path):
    (tmp_path / "scanax").write_text("a file where the folder should be")
    assert counts(XDG_CACHE_HOME=str(tmp_path))[0] == 0


def test_caches_lie_in_the_users_folder_for_them(monkeypatch: Any):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert cache_directory() == Path("/home/of/someone/.cache/scanax/jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_directory() == Path("/elsewhere/scanax/jax")


FAULTS = """
import resource, sys
import numpy as np
from experiments.training.process_setup import keep_freed_memory
print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for round in range(12):
    if round == 2:
        before = faults()
    np.ones(8 * 2**20, np.uint8)
    np.ones(48 * 2**20, np.uint8)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_blocks_that_were_freed_are_used_again():
    kept, faults = command(FAULTS).split()
    assert kept == "True"
    # 56 MiB are 14,336 pages of 4 KiB, ten times over.
    assert int(faults) < 2_000
    left_alone, faults = command(FAULTS, MALLOC_ARENA_MAX="4").split()
    assert left_alone == "False" and int(faults) > 5_000
