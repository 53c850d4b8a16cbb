"""Devices that are not there."""

import importlib.util

import pytest

from experiments.compiled import topology
from experiments.compiled.hardware import parse_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "scanax[aot]"',
)


def test_without_the_compiler_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scanax\[aot\]"):
        topology.tpu_devices(parse_topology("v5e:2x2"))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x2", "v6e:4x4"])
def test_a_slice_has_a_device_for_each_chip(name):
    where = parse_topology(name)
    devices = topology.tpu_devices(where)
    assert len(devices) == where.size
    assert len({tuple(device.coords) for device in devices}) == where.size


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", topology.SMALLEST)
def test_there_is_a_device_of_every_generation_to_compile_for(generation):
    assert topology.one_device_mesh(generation).size == 1
