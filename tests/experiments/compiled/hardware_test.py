"""Published figures agree with each other."""

import pytest

from experiments.compiled.hardware import (
    GPUS,
    TPU_CHIPS,
    gpu_memory_bytes_per_s,
    parse_topology,
    peak_flops,
)


@pytest.mark.parametrize(("name", "kind"), [("v5e", "TPU v5 lite"), ("v6e", "TPU v6 lite")])
def test_what_matrix_units_do_in_a_cycle_gives_the_peak(name, kind):
    chip = TPU_CHIPS[name]
    assert chip.clock_hz and chip.matmul_flops_per_cycle
    assert chip.clock_hz * chip.matmul_flops_per_cycle == pytest.approx(peak_flops(kind), rel=3e-3)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.device_kind)
def test_a_gpu_that_is_compiled_for_has_a_peak_and_a_memory_rate(gpu):
    flops, bytes_per_s = (find(gpu.device_kind) for find in (peak_flops, gpu_memory_bytes_per_s))
    assert flops and bytes_per_s and flops > bytes_per_s > 1e12


@pytest.mark.parametrize("name", ["v5e", "v5e:3x3", "v9:2x2", "v5p:8x8"])
def test_an_unknown_topology_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"v5e:\{1x1,2x2,.*v6e.*got '" + name):
        parse_topology(name)
