"""What a plan says in words: quantities, and what would help a step that does not fit."""

from typing import Any

from experiments.compiled.plan_report import advice, si
from experiments.configs import gla

MESH = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1}


def test_advice_against_large_activations_follows_what_the_config_can_still_change():
    config: Any = gla.get_config("text,smoke")
    memory = {"hbm_bytes": 16e9, "parameters": 1e9, "optimizer_state": 2e9}
    plan = {"topology": "v5e:2x2", "batch_size": 8, "mesh": MESH, "memory": memory}
    refusal = "RESOURCE_EXHAUSTED: Ran out of memory on HBM: 20G."
    memory["total"] = 20e9
    said = advice(plan, config, refusal)
    assert "temporaries 17 GB (compiler: Ran out of memory on HBM: 20G.)" in said
    assert said.endswith(
        "Largest: temporaries; smaller with config.model.remat=full, or time over"
        " config.mesh.sequence (now 2), or config.accumulate=2, or config.batch_size=4"
    )
    config.model.remat, plan["batch_size"] = "full", 4
    assert advice(plan, config, refusal).endswith(
        "Largest: temporaries; smaller with time over config.mesh.sequence (now 2)"
    )


def test_quantities_are_written_with_three_digits_and_a_prefix():
    assert [si(x, "B") for x in (0, 999, 1_234_567, 9.996e11)] == [
        "0 B",
        "999 B",
        "1.23 MB",
        "1 TB",
    ]


def test_a_kernel_that_exceeds_the_fast_memory_is_named_with_what_it_lacked():
    refusal = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for"
        ' custom-call(), metadata={op_name="jit(step)/jvp()/gla_backward/pallas_call" stack=36}.'
        " Scoped allocation with size 69.43M and limit 64.00M exceeded scoped vmem limit by 5.43M."
    )
    config: Any = gla.get_config("text,smoke")
    said = advice({"topology": "v5e:4x4", "memory": {}, "mesh": {}}, config, refusal)
    assert "the kernel gla_backward needs 69.43MiB" in said and "has 64.00MiB" in said
    assert "config.kernels=False" in said and "fsdp" not in said
