"""What every command does to its own process before it works: compiled programs are kept for the
next command, and freed memory for the next step."""

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

# Of all programs together; jax removes those that were not used for the longest time.
CACHE_BYTES = 4 * 2**30

# Options of glibc's mallopt (malloc.h), and values that keep what is freed. A step of a small model
# allocates the same megabytes again and again: by default glibc gives them back to the system each
# time, and the system clears every page before it hands it out again. That took a third of a text
# step of GLA. One arena, because the heaps of others are too small for such blocks.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
KEPT = {TRIM_THRESHOLD: 2**31 - 1, MMAP_THRESHOLD: 2**31 - 1, ARENA_MAX: 1}


def cache_directory() -> Path:
    """Where compiled programs lie unless JAX_COMPILATION_CACHE_DIR says so."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "scanax" / "jax"


def keep_programs(wanted: bool = True) -> None:
    """Turns jax's cache of compiled programs on for this process, or off.

    A cache that the environment names is used as it is there; a folder that cannot be written to is
    warned of, and nothing is kept."""
    jax: Any = sys.modules.get("jax")
    if jax is None:
        return  # a launcher, which compiles nothing
    if not wanted:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not jax.config.jax_compilation_cache_dir:
        directory = cache_directory()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # A folder may let nothing be written although it is there.
            (directory / ".writable").touch()
        except OSError as error:
            print(f"warning: compiled programs are not kept: {error}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Half of what a small run compiles are programs of less than the default, a second each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_freed_memory() -> bool:
    """Whether malloc now keeps what is freed, up to 2 GiB: with glibc, unless the environment
    already says what malloc should do."""
    named = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if named or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(option, value) == 1 for option, value in KEPT.items()]
    return all(taken)
