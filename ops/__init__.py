"""Exact linear recurrences: one function per recurrence, a scan that defines it and faster forms that are held to it."""

from .arguments import checks
from .delta_rule.api import delta_rule
from .gated_linear_attention.api import gated_linear_attention

__all__ = ["checks", "delta_rule", "gated_linear_attention"]
