"""Exact linear recurrences and attention: one function each, a plain form that defines it and
faster ones that are held to it."""

from .bidirectional_linear_attention.api import bidirectional_linear_attention
from .causal_flow_attention.api import FlowState, causal_flow_attention, init_flow_state
from .delta_rule.api import delta_rule
from .dense_scan.api import dense_scan
from .diagonal_convolution.api import diagonal_convolution
from .diagonal_scan.api import diagonal_scan
from .flow_attention.api import flow_attention
from .framework.arguments import checks
from .framework.platforms import kernels
from .framework.sequence_parallel import sequence_method
from .gated_linear_attention.api import gated_linear_attention
from .gaussian_attention.api import gaussian_attention
from .kronecker_attention.api import kronecker_attention
from .long_convolution.api import long_convolution
from .neighbourhood_attention.api import neighbourhood_attention
from .polynomial_kronecker_attention.api import polynomial_kronecker_attention
from .selective_scan.api import selective_scan
from .shifted_window_attention.api import shifted_window_attention
from .short_convolution.api import short_convolution
from .state_passing.api import state_passing
from .window_attention.api import WindowState, init_window_state, window_attention

__all__ = [
    "FlowState",
    "WindowState",
    "bidirectional_linear_attention",
    "causal_flow_attention",
    "checks",
    "delta_rule",
    "dense_scan",
    "diagonal_convolution",
    "diagonal_scan",
    "flow_attention",
    "gated_linear_attention",
    "gaussian_attention",
    "init_flow_state",
    "init_window_state",
    "kernels",
    "kronecker_attention",
    "long_convolution",
    "neighbourhood_attention",
    "polynomial_kronecker_attention",
    "selective_scan",
    "sequence_method",
    "shifted_window_attention",
    "short_convolution",
    "state_passing",
    "window_attention",
]
