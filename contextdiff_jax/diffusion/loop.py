"""The loop of every sampler: one `lax.scan` over its steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from contextdiff_jax.diffusion.protocols import Reuse


def scan_steps(
    step: Callable,
    carry: PyTree,
    inputs: PyTree,
    reuse: Reuse | None = None,
    x_of: Callable[[PyTree], Array] = lambda carry: carry,
) -> PyTree:
    """The last carry of `step(carry, input, *kept) -> (carry, None)` over `inputs`, whose first
    leaf is the steps' times; `x_of` finds x in the carry, for `reuse`.

    Raises ValueError for a number of steps that `reuse` doesn't divide.
    """
    if reuse is None:
        return jax.lax.scan(step, carry, inputs)[0]
    count = jax.tree.leaves(inputs)[0].shape[0]
    if count % reuse.interval:
        raise ValueError(f"reuse={reuse.interval}: must divide the number of steps, {count}")

    def group(carry, inputs):
        first, rest = (
            jax.tree.map(lambda a, part=part: a[part], inputs) for part in (0, slice(1, None))
        )
        x, t = x_of(carry), jax.tree.leaves(first)[0]
        kept = reuse.keep(x, jnp.full(x.shape[:1], t))
        # not in the scan: what it shares with `keep` is computed once
        carry, _ = step(carry, first, kept)
        return jax.lax.scan(lambda carry, each: step(carry, each, kept), carry, rest)

    groups = jax.tree.map(lambda a: a.reshape(-1, reuse.interval, *a.shape[1:]), inputs)
    return jax.lax.scan(group, carry, groups)[0]
