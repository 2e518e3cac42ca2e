"""Keys of random numbers from seeds."""

from __future__ import annotations

import jax
from jaxtyping import PRNGKeyArray


def check_seed(seed: int, field: str = "seed") -> None:
    """Raises ValueError unless the seed has 64 bits."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"{field}={seed}: must lie in 0..2^64 - 1")


def make_key(seed: int, field: str = "seed") -> PRNGKeyArray:
    """The key of a seed of 64 bits; below 2^32 it is `jax.random.key`'s, which drops higher bits."""
    check_seed(seed, field)
    high, low = divmod(int(seed), 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key
