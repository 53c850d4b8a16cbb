"""Costs of classifiers of images: what the table asks for is there."""

import pytest

from experiments.tables import image_cost as table
from experiments.tables.computations import image_cost


def test_the_table_times_every_mixer():
    assert set(table.MIXERS.values()) == set(image_cost.MIXERS)


@pytest.mark.full
def test_softmax_takes_memory_by_the_square_of_its_tokens_and_linear_attention_does_not():
    vit, slab = (
        [image_cost.by_tokens(seed=0, mixer=mixer, side=side)["image"]["mib"] for side in (14, 56)]
        for mixer in ("vit", "slab")
    )
    # 16 times as many tokens.
    assert vit[1] / vit[0] > 40 and slab[1] / slab[0] < 20


@pytest.mark.slow
def test_a_folded_model_gives_the_same_logits():
    found = image_cost.folded(seed=0, norm="progressive_batch")["batch"]
    assert found["difference"] < 1e-4 and found["ms"] > 0 and found["folded_ms"] > 0
