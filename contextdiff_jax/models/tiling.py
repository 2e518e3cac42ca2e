"""A function of pictures in overlapping tiles, with blended seams: memory no longer grows with the
picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
