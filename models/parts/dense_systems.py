"""Systems with a dense state matrix per channel, made of few parameters where they are used: S4 and
LSSL."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from ops.dense_scan.api import dense_scan
from ops.dense_scan.powers import matrix_power
from ops.dense_scan.xla import forward, free_response
from ops.framework.sharding import SEQUENCE, by_device, time_parts
from ops.state_passing.api import state_passing
from ops.state_passing.parts import in_parts


class Dense(NamedTuple):
    """The arguments of `dense_scan` that make a system, float32.

    kernel: length -> [D, M, length]; None: the recurrence in chunks."""

    A_DNN: jax.Array
    B_DN: jax.Array
    C_DMN: jax.Array
    kernel: Callable[[int], jax.Array] | None


def scan_made(
    name: str,
    make: Callable[..., Dense],
    layouts: tuple[str, ...],
    x_BTD: jax.Array,
    memory_BDN: jax.Array | None,
    segment_ids: jax.Array | None,
    *parameters: Any,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, D, M] and the memory after it [B, D, N] of the system make(*parameters).

    Each device makes the system of its channels for itself: that is N to N T / C times as many
    numbers as the parameters, whose layouts are given, with "C" for channels. What devices send
    are parameters, their gradients and, where the mesh cuts time, states."""
    if time_parts() > 1:
        layouts = tuple(layout.replace("C", "H") for layout in layouts)
        return _in_parts(
            name, make, layouts, x_BTD, memory_BDN, segment_ids, *parameters, reverse=reverse
        )

    def whole(
        x_BTD: jax.Array, memory_BDN: jax.Array | None, segment_ids: Any, *parameters: Any
    ) -> tuple[jax.Array, jax.Array]:
        A_DNN, B_DN, C_DMN, kernel = make(*parameters)
        return dense_scan(
            x_BTD,
            A_DNN,
            B_DN,
            C_DMN,
            kernel=kernel,
            initial_state=memory_BDN,
            segment_ids=segment_ids,
            reverse=reverse,
        )

    run = by_device(name, whole, ("BLC", "BCN", "BL", *layouts), ("BLCM", "BCN"))
    return run(x_BTD, memory_BDN, segment_ids, *parameters)


def _in_parts(
    name: str,
    make: Callable[..., Dense],
    layouts: tuple[str, ...],
    x_BTD: jax.Array,
    memory_BDN: jax.Array | None,
    segment_ids: jax.Array | None,
    *parameters: Any,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `ops/dense_scan/sequence_parallel.py` does it for a system that is at hand."""
    convolved = memory_BDN is None and segment_ids is None

    def from_zero(x_PnD: jax.Array, number_Pn: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        def scan(x_PnD: jax.Array, number_Pn: Any, *parameters: Any) -> tuple[jax.Array, jax.Array]:
            A_DNN, B_DN, C_DMN, kernel = make(*parameters)
            return forward(
                x_PnD, A_DNN, B_DN, C_DMN, None, number_Pn, kernel if convolved else None
            )

        run = by_device(name, scan, ("BLH", "BL", *layouts), ("BLHM", "BHN"))
        return run(x_PnD, number_Pn, *parameters)

    def passed(
        written_BRDN: jax.Array, keeps_BR: jax.Array | None, first_BDN: Any, length: int
    ) -> tuple[jax.Array, jax.Array]:
        def of_all(
            written_BRDN: jax.Array, keeps_BR: Any, first_BDN: Any, *parameters: Any
        ) -> tuple[jax.Array, jax.Array]:
            written_BRDN, keeps_BR = jax.tree.map(
                lambda of_part: lax.all_gather(of_part, SEQUENCE, axis=1, tiled=True),
                (written_BRDN, keeps_BR),
            )
            before_BRDN, last_BDN = state_passing(
                matrix_power(make(*parameters).A_DNN, length),
                written_BRDN,
                keeps=keeps_BR,
                initial_state=first_BDN,
                reverse=reverse,
            )
            part = lax.axis_index(SEQUENCE)
            return lax.dynamic_slice_in_dim(before_BRDN, part, 1, axis=1), last_BDN

        batch, _, *rest = written_BRDN.shape
        last_BDN = jax.ShapeDtypeStruct((batch, *rest), written_BRDN.dtype)
        run = by_device(
            name,
            of_all,
            ("BTHN", "BT", "BHN", *layouts),
            ("BTHN", "BHN"),
            shapes=(written_BRDN, last_BDN),
        )
        return run(written_BRDN, keeps_BR, first_BDN, *parameters)

    def response(x_PDN: jax.Array, length: int) -> jax.Array:
        def read(x_PDN: jax.Array, *parameters: Any) -> tuple[jax.Array]:
            A_DNN, _, C_DMN, _ = make(*parameters)
            return (free_response(x_PDN, A_DNN, C_DMN, length),)

        return by_device(name, read, ("PHN", *layouts), ("PLHM",))(x_PDN, *parameters)[0]

    return in_parts(
        from_zero,
        passed,
        response,
        x_BTD,
        initial_state=memory_BDN,
        segment_ids=segment_ids,
        reverse=reverse,
    )
