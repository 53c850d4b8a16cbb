"""LION's parts over sparse voxels against loops, and its operators against their equations."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import lion
from models.lion.orders import make_order, window_keys
from models.lion.submanifold import SubmanifoldConvolution, neighbours
from models.lion.voxels import (
    Voxels,
    check_grid,
    expand_cells,
    merge_cells,
    merge_height,
    sort_voxels,
    sum_cells,
)
from tests.support.layers import FLOAT32, LENGTH, build_mixer, call, check_layer, inputs, randomised

GRID, CLOUDS, LENGTH_T = (7, 6, 5), 3, 60
COUNTS = (17, 0, 25)  # and then places without a voxel


def some_voxels(seed: int = 0) -> Voxels:
    """Clouds of COUNTS voxels in any order, one of them empty, and junk in places without one."""
    random = np.random.default_rng(seed)
    places, cloud = np.full((LENGTH_T, 3), 99, np.int32), np.full(LENGTH_T, CLOUDS, np.int32)
    first = 0
    for number, count in enumerate(COUNTS):
        cells = random.choice(math.prod(GRID), count, replace=False)
        rows = slice(first, first + count)
        places[rows] = np.stack(np.unravel_index(cells, GRID), axis=1)
        cloud[rows], first = number, first + count
    mixed = random.permutation(LENGTH_T)
    return Voxels(jnp.asarray(places[mixed]), jnp.asarray(cloud[mixed]), GRID, CLOUDS)


VOXELS = jax.jit(sort_voxels)(some_voxels())[0]
PLACES, CLOUD = np.asarray(VOXELS.places_T3), np.asarray(VOXELS.cloud_T)
REAL = CLOUD < CLOUDS


def test_voxels_are_sorted_by_cloud_and_place_and_those_that_are_none_come_last():
    rows = [(cloud, *place) for cloud, place in zip(CLOUD, PLACES.tolist(), strict=True)]
    assert rows == sorted(rows)
    assert np.bincount(CLOUD).tolist() == [*COUNTS, LENGTH_T - sum(COUNTS)]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("along", ["x", "y"])
def test_keys_are_those_of_the_paper_and_differ(along: str, shift: bool):
    w_x, w_y, w_z = window = (3, 4, 2)
    d = [side // 2 if shift else 0 for side in window]
    keys = np.asarray(window_keys(VOXELS, window, along=along, shift=shift))
    NX, NY, NZ = (math.ceil(size / side) + 1 for size, side in zip(GRID, window, strict=True))
    for (x, y, z), key in zip(PLACES[REAL].tolist(), keys[REAL], strict=True):
        X, i_x = divmod(x + d[0], w_x)
        Y, i_y = divmod(y + d[1], w_y)
        Z, i_z = divmod(z + d[2], w_z)
        if along == "x":
            want = ((X * NY + Y) * NZ + Z) * w_x * w_y * w_z + i_x * w_y * w_z + i_y * w_z + i_z
        else:
            want = ((Y * NX + X) * NZ + Z) * w_x * w_y * w_z + i_y * w_x * w_z + i_x * w_z + i_z
        assert key == want
    for cloud in range(CLOUDS):
        assert len(set(keys[cloud == CLOUD])) == COUNTS[cloud]


def test_a_shift_of_half_of_one_cell_changes_nothing():
    keys = [window_keys(VOXELS, (1, 1, 1), along="x", shift=shift) for shift in (False, True)]
    np.testing.assert_array_equal(*keys)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("along", ["x", "y", "random"])
def test_sorting_and_back_is_the_identity_and_groups_are_of_one_cloud(along: str, fill: bool):
    order = make_order(VOXELS, (3, 3, 2), 7, along=along, shift=True, fill=fill)
    voxel, segment, slot = map(np.asarray, order)
    np.testing.assert_array_equal(voxel[slot[REAL]], np.flatnonzero(REAL))
    assert len(set(slot[REAL])) == REAL.sum()
    keys = np.asarray(window_keys(VOXELS, (3, 3, 2), along=along, shift=True))
    for cloud, count in enumerate(COUNTS):
        own = np.flatnonzero(cloud == CLOUD)
        in_order = own[np.argsort(keys[own])]
        for first in range(0, count, 7):
            group = in_order[first : first + 7]
            ids = segment[slot[group]]
            assert len(set(ids)) == 1
            held = voxel[segment == ids[0]]
            want = group
            if fill and len(group) < 7:
                # Slot s >= n holds what slot s - 7 does: the end of the group before.
                want = np.concatenate((group, in_order[first - 7 : first][len(group) :]))
            np.testing.assert_array_equal(held, want)


def test_a_cloud_smaller_than_a_group_is_repeated_until_it_is_full():
    order = make_order(VOXELS, (3, 3, 2), 40, along="x", shift=False, fill=True)
    voxel, segment, slot = map(np.asarray, order)
    for cloud, count in ((0, COUNTS[0]), (2, COUNTS[2])):
        held = voxel[segment == segment[slot[cloud == CLOUD][0]]]
        np.testing.assert_array_equal(held, np.resize(held[:count], 40))
        assert sorted(held[:count]) == np.flatnonzero(cloud == CLOUD).tolist()


def test_a_group_as_large_as_the_cloud_is_one_sequence():
    order = make_order(VOXELS, (3, 3, 2), max(COUNTS), along="y", shift=False)
    starts = np.flatnonzero(np.diff(np.asarray(order.segment_L)))
    assert len(starts) == 2  # after the first cloud, and before the places without a voxel


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 1, 2), (3, 1, 4)])
def test_cells_are_the_different_ones_and_expanding_is_adjoint_to_summing(stride):
    merged, parent = merge_cells(VOXELS, stride, LENGTH_T)
    fine = np.concatenate((CLOUD[:, None], PLACES // np.array(stride)), axis=1)[REAL]
    coarse = np.concatenate((merged.cloud_T[:, None], merged.places_T3), axis=1)
    cells = np.unique(fine, axis=0)
    np.testing.assert_array_equal(coarse[: len(cells)], cells)
    assert (coarse[len(cells) :, 0] == CLOUDS).all()
    np.testing.assert_array_equal(coarse[np.asarray(parent)[REAL]], fine)
    assert merged.grid == tuple(map(math.ceil, np.array(GRID) / stride))

    random = np.random.default_rng(1)
    x, y = jnp.asarray(random.standard_normal((2, LENGTH_T, 4)), jnp.float32)
    summed, expanded = sum_cells(x, parent, LENGTH_T), expand_cells(y, parent)
    assert float(jnp.vdot(summed, y)) == pytest.approx(float(jnp.vdot(x, expanded)), rel=1e-5)
    assert float(jnp.abs(expanded[~REAL]).max()) == 0


def test_the_best_fifth_has_copies_beside_it_within_the_grid_and_the_limit():
    score = np.random.default_rng(2).standard_normal(LENGTH_T).astype(np.float32)
    for growth in (1.8, 1.1):
        most = np.floor(growth * np.array(COUNTS)).astype(np.int32)
        capacity = int(growth * LENGTH_T)
        merged, parent = merge_height(VOXELS, score, 0.2, jnp.asarray(most), capacity)
        coarse = np.concatenate((merged.cloud_T[:, None], merged.places_T3), axis=1)
        for cloud, count in enumerate(COUNTS):
            own = np.flatnonzero(cloud == CLOUD)
            cells = {(x, y, z // 2) for x, y, z in PLACES[own].tolist()}
            chosen = min(count // 5, max(most[cloud] - len(cells), 0) // 4)
            for voxel in own[np.argsort(-score[own])][:chosen]:
                x, y, z = PLACES[voxel]
                for dx, dy in itertools.product((-1, 1), (-1, 1)):
                    place = np.clip((x + dx, y + dy), 0, np.array(GRID[:2]) - 1)
                    cells.add((*place.tolist(), z // 2))
            assert [tuple(row[1:]) for row in coarse[coarse[:, 0] == cloud]] == sorted(cells)
            assert len(cells) <= max(most[cloud], 0)
        np.testing.assert_array_equal(coarse[np.asarray(parent)[REAL], 0], CLOUD[REAL])


def test_a_convolution_is_that_of_the_dense_grid_at_the_voxels():
    D = 3
    module = randomised(lambda: SubmanifoldConvolution(D, rngs=nnx.Rngs(0), **FLOAT32))
    x = np.random.default_rng(3).standard_normal((LENGTH_T, D)).astype(np.float32)
    y = np.asarray(module(x[None], neighbours(VOXELS)[None])[0])
    kernel = np.asarray(module.kernel_93DE[...]).reshape(3, 3, 3, D, D)
    dense = np.zeros((CLOUDS, *(side + 2 for side in GRID), D))
    for voxel in np.flatnonzero(REAL):
        dense[(CLOUD[voxel], *(PLACES[voxel] + 1))] = x[voxel]
    for voxel in np.flatnonzero(REAL):
        a, b, c = PLACES[voxel]
        around = dense[CLOUD[voxel], a : a + 3, b : b + 3, c : c + 3]
        np.testing.assert_allclose(y[voxel], np.einsum("xyzd,xyzde->e", around, kernel), atol=1e-5)
    assert np.abs(y[~REAL]).max() == 0


def test_cells_that_cannot_be_numbered_are_refused():
    check_grid((1000, 1000, 1000), 2)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 cells .* for 3 clouds"):
        check_grid((1000, 1000, 1000), 3)


def test_the_operator_of_retnet_is_its_recurrence_alone():
    mixer = build_mixer(lion)
    own = mixer.operator
    query, key, value, output = (
        np.asarray(linear.kernel[...], np.float64)
        for linear in (own.query, own.key, own.value, own.output)
    )

    def transcription(x_TD: np.ndarray) -> np.ndarray:
        y = []
        for h, gamma in enumerate((1 - 2**-5, 1 - 2**-6)):
            q, k = (x_TD @ w[:, 8 * h : 8 * h + 8] for w in (query, key))
            v, S = x_TD @ value[:, 16 * h : 16 * h + 16], np.zeros((8, 16))
            rows = []
            for t in range(LENGTH):
                S = gamma * S + np.outer(k[t], v[t])
                rows.append(q[t] @ S / math.sqrt(8))
            y.append(np.stack(rows))
        return np.concatenate(y, axis=1) @ output

    check_layer(mixer, transcription)


def test_the_operator_of_mamba_reads_both_ways_through_one_pair_of_maps():
    mixer = build_mixer(lion, operator="mamba", state_size=3)
    own, x = mixer.operator, inputs()

    @jax.jit
    def each(own, x):
        inner, gate = own.forward.input(x), own.forward.gate(x)
        there, _ = own.forward.scan(inner, gate)
        back, _ = own.backward.scan(jnp.flip(inner, 1), jnp.flip(gate, 1))
        return own.forward.output(there + jnp.flip(back, 1))

    want = each(own, x)
    np.testing.assert_allclose(call(mixer, x), want, rtol=0, atol=1e-6 * float(abs(want).max()))
    assert not hasattr(own.backward, "input") and not mixer.causal
    with pytest.raises(ValueError, match="has no state: a token reads later ones"):
        mixer.init_state(1)


def test_options_of_the_other_operator_are_refused():
    with pytest.raises(ValueError, match="state_size is not for operator='retnet' and must be 16"):
        build_mixer(lion, state_size=3)
    with pytest.raises(ValueError, match="heads is not for operator='mamba' and must be 2; got 4"):
        build_mixer(lion, operator="mamba", heads=4)
