"""The MLPs of the blocks."""

import pytest

from models.networks.mlp import inner_width


@pytest.mark.parametrize(("width", "inner"), [(32, 88), (128, 344), (1024, 2816), (2048, 5632)])
def test_mlp_inner_width_is_eight_thirds_rounded_up(width, inner):
    assert inner_width(width, 4.0) == inner
