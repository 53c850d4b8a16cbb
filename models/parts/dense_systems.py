"""Where systems with a dense state matrix per channel run on a mesh: S4 and LSSL."""

from collections.abc import Callable
from typing import Any

from ops.framework.sharding import by_device, time_parts


def where_used(
    name: str, scanned: Callable[..., Any], parameters: tuple[str, ...]
) -> Callable[..., Any]:
    """scanned(x_BTD, memory_BDN, segment_ids, *parameters) -> (y_BTDM, memory_BDN) that makes the
    state matrices and the kernel of its channels from parameters, whose layouts are given.

    Each device makes them for itself: they are N to N T / C times as many numbers as the
    parameters, and left to itself the compiler sends them. Where a mesh cuts time it is not so:
    `dense_scan` then passes states between devices, and its matrices are the compiler's to cut."""
    if time_parts() > 1:
        return scanned
    return by_device(name, scanned, ("BLC", "BCN", "BL", *parameters), ("BLCM", "BCN"))
