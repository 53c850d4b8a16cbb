"""Exact linear recurrences: one function per recurrence, a scan that defines it and faster forms
that are held to it."""

from .bidirectional_linear_attention.api import bidirectional_linear_attention
from .delta_rule.api import delta_rule
from .dense_scan.api import dense_scan
from .diagonal_convolution.api import diagonal_convolution
from .diagonal_scan.api import diagonal_scan
from .framework.arguments import checks
from .framework.platforms import kernels
from .framework.sequence_parallel import sequence_method
from .gated_linear_attention.api import gated_linear_attention
from .long_convolution.api import long_convolution
from .selective_scan.api import selective_scan
from .short_convolution.api import short_convolution
from .state_passing.api import state_passing
from .window_attention.api import WindowState, init_window_state, window_attention

__all__ = [
    "WindowState",
    "bidirectional_linear_attention",
    "checks",
    "delta_rule",
    "dense_scan",
    "diagonal_convolution",
    "diagonal_scan",
    "gated_linear_attention",
    "init_window_state",
    "kernels",
    "long_convolution",
    "selective_scan",
    "sequence_method",
    "short_convolution",
    "state_passing",
    "window_attention",
]
