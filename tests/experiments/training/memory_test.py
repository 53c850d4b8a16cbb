"""Sizes are compared with the memory there is before anything is allocated."""

import jax
import pytest

from experiments.configs.gla import get_config
from experiments.training import memory
from experiments.training.mesh import make_mesh
from experiments.training.program import make_program


@pytest.fixture(scope="module")
def program():
    config = get_config("mqar,smoke")
    return make_program(config, make_mesh(config.mesh))


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_run_fits_into_its_state_gradients_and_batch_and_not_into_a_byte_less(
    program, monkeypatch
):
    needed = bytes_of(program.state) + bytes_of(program.state.params) + bytes_of(program.batch)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda device: needed)
    memory.check_memory(program)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"a step needs more memory than .*parameters and state"):
        memory.check_memory(program)


def test_a_container_may_have_less_than_its_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (str(limit),))
    machine = memory.host_memory_bytes()
    for text, expected in (("max\n", machine), ("4096\n", 4096)):
        limit.write_text(text)
        assert memory.host_memory_bytes() == expected
    with pytest.raises(ValueError, match=r"config.task.train must fit into the 0.0 GiB"):
        memory.check_held("config.task.train", 4097)
    memory.check_held("config.task.train", 4096)
