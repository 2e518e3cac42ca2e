"""A function of pictures in overlapping tiles, with blended seams: memory no longer grows with the
picture. `tiled` is the autoencoder's, as diffusers has it; `blended` a network's in each step of
sampling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree


def sliced(fn: Callable[[Array], Array], x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
    """fn(x), one sample after another."""
    return jax.lax.map(lambda one: fn(one[None])[0], x)


def tiled(
    fn: Callable[[Array], Array],
    x: Float[Array, "B H W C"],
    *,
    tile_in: int,
    tile_out: int,
    overlap: float,
) -> Float[Array, "B H2 W2 C2"]:
    """fn over square tiles of side `tile_in`, whose outputs have side `tile_out`, as diffusers'
    `enable_tiling`.

    Tiles start every tile_in (1 - overlap) pixels; those at the end are smaller. Along the share
    `overlap` of its output a tile fades in from its (already blended) upper, then left neighbour. A
    picture no larger than one tile is one call of `fn`.
    """
    if x.shape[1] <= tile_in and x.shape[2] <= tile_in:
        return fn(x)
    step, extent = int(tile_in * (1 - overlap)), int(tile_out * overlap)
    keep = tile_out - extent
    rows, columns = (range(0, size, step) for size in x.shape[1:3])
    tiles = _run(
        {(i, j): x[:, i : i + tile_in, j : j + tile_in] for i in rows for j in columns}, fn
    )
    strips = []
    for i in rows:
        for j in columns:
            if i > 0:
                tiles[i, j] = _blend(tiles[i - step, j], tiles[i, j], extent, axis=1)
            if j > 0:
                tiles[i, j] = _blend(tiles[i, j - step], tiles[i, j], extent, axis=2)
        strips.append(jnp.concatenate([tiles[i, j][:, :keep, :keep] for j in columns], axis=2))
    return jnp.concatenate(strips, axis=1)


def _run(
    tiles: dict[tuple[int, int], Array], fn: Callable[[Array], Array]
) -> dict[tuple[int, int], Array]:
    """fn of every tile, those of one shape one after another in one loop: at most four programs to
    compile.
    """
    places = defaultdict(list)
    for place, tile in tiles.items():
        places[tile.shape].append(place)
    results = {}
    for same in places.values():
        results |= dict(
            zip(same, jax.lax.map(fn, jnp.stack([tiles[place] for place in same])), strict=True)
        )
    return results


def _blend(before: Array, after: Array, extent: int, axis: int) -> Array:
    """`after`, whose first `extent` rows or columns fade in from the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if extent == 0:
        return after
    weight = (
        (jnp.arange(extent) / extent)
        .astype(after.dtype)
        .reshape((-1, 1, 1) if axis == 1 else (-1, 1))
    )
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    first, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis=axis)


def blended(
    fn: Callable[[PyTree], PyTree],
    x: PyTree[Float[ArrayLike, "B H W _"]],
    side: int,
    multiple: int = 1,
) -> PyTree[Float[ArrayLike, "B H W _"]]:
    """fn(x) of pictures as large as x's, computed on one tile after another and averaged.

    Neighbours overlap by at least a quarter of `side`, V. A tile doesn't count within V / 4 of a
    border that another tile goes on behind, and fades in over the V / 2 after that. So it is fn(x)
    itself where a value of fn depends on x at most V / 4 away (Bar-Tal et al. 2023 average tiles
    evenly, up to their borders). Tiles begin at multiples of `multiple`.
    """
    first = jax.tree.leaves(x)[0]
    lengths = first.shape[1:3]
    sides = tuple(min(side, length) for length in lengths)
    if sides == lengths:
        return fn(x)
    step = max(3 * side // 4 // multiple * multiple, multiple)
    axes = [
        _fades(length, own, step, side // 4) for length, own in zip(lengths, sides, strict=True)
    ]
    (rows, columns), (row_weights, column_weights) = zip(*axes, strict=True)
    corners = np.array([(top, left) for top in rows for left in columns])
    weights = np.einsum("ih,jw->ijhw", row_weights, column_weights).reshape(-1, *sides, 1)

    def cut(a: ArrayLike, corner: ArrayLike) -> Array:
        at = (0, corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(a, at, (a.shape[0], *sides, a.shape[-1]))

    def add(total: PyTree, tile: tuple[Array, Array]) -> tuple[PyTree, None]:
        corner, weight = tile
        made = fn(jax.tree.map(lambda a: cut(a, corner), x))

        def put(all: Array, one: Array) -> Array:
            at = (0, corner[0], corner[1], 0)
            return jax.lax.dynamic_update_slice(all, cut(all, corner) + weight * one, at)

        return jax.tree.map(put, total, made), None

    one = jax.eval_shape(lambda x: fn(jax.tree.map(lambda a: cut(a, corners[0]), x)), x)
    zeros = jax.tree.map(lambda a: jnp.zeros((a.shape[0], *lengths, a.shape[-1]), a.dtype), one)
    return jax.lax.scan(add, zeros, (corners, weights.astype(np.float32)))[0]


def _fades(length: int, side: int, step: int, overlap: int) -> tuple[list[int], np.ndarray]:
    """Where tiles begin along an axis, and the weights of each one's values, which sum to 1 at
    every place.
    """
    starts = [*range(0, length - side, step), length - side]
    inside = np.arange(side) + 0.5
    ramp = np.clip((inside - overlap / 4) / (overlap / 2), 0, 1)
    weights = np.ones((len(starts), side))
    weights[1:] *= ramp
    weights[:-1] *= ramp[::-1]
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + side] += weight
    parts = [w / total[start : start + side] for start, w in zip(starts, weights, strict=True)]
    return starts, np.stack(parts)
