"""Runs what is in tests/eight_devices in processes with eight devices: their number is that of a
process."""

import os
import subprocess
import sys

import pytest

from experiments.tables.computations.sequence_timing import WAYS, measure
from experiments.training.checkout import CHECKOUT


class OnEightDevices:
    """A class for each process, so that two workers can run two of them."""

    files: tuple[str, ...]

    @pytest.mark.parametrize(
        "tier",
        [
            pytest.param("not full", marks=pytest.mark.slow),
            pytest.param("full", marks=pytest.mark.full),
        ],
    )
    def test_they_compute_what_one_computes(self, tier):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "NPROC": "16",  # with fewer threads than devices the CPU backend can wait for itself
        }
        done = subprocess.run(
            [
                sys.executable,
                *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier),
                *(f"tests/eight_devices/{file}.py" for file in self.files),
            ],
            cwd=CHECKOUT,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


class TestRecurrences(OnEightDevices):
    files = ("recurrences",)


class TestAttentionAndModels(OnEightDevices):
    files = ("attention", "models")


@pytest.mark.slow
def test_ways_to_cut_a_sequence_are_timed_in_turns():
    times = measure(seed=0, length=64)
    assert set(times["ms"]) == set(times["ratio"]) == set(WAYS)
    for way, milliseconds in times["ms"].items():
        assert milliseconds > 0
        assert times["ratio"][way] == milliseconds / times["ms"]["LASP-2"]


def test_a_length_that_eight_devices_cannot_share_is_an_error():
    with pytest.raises(ValueError, match="multiple of 8 tokens; got 63"):
        measure(seed=0, length=63)
