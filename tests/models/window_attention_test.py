"""Sliding-window attention against a slow transcription of its paper."""

import pytest

from models import window_attention
from tests.support.layers import check_window_attention


@pytest.mark.parametrize(
    ("options", "window"),
    [({"window": 3, "key_value_heads": 2}, 3), ({"window": 4, "rope": False, "qk_norm": True}, 4)],
)
def test_attention_is_softmax_over_the_window(options, window):
    check_window_attention(window_attention, options, window)
