"""Keys of random numbers from seeds: whole numbers of 64 bits, each with numbers of its own."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not imported for a flag's bounds: JAX takes seconds to start
    from jaxtyping import PRNGKeyArray

LARGEST = 2**64 - 1


def check_seed(seed: int, field: str = "seed") -> None:
    """Raises ValueError, naming `field`, unless the seed is a whole number in 0..2^64 - 1."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ValueError(f"{field}={seed!r}: must be a whole number in 0..{LARGEST}")
    if not 0 <= operator.index(seed) <= LARGEST:
        raise ValueError(f"{field}={seed}: must lie in 0..{LARGEST}")


def make_key(seed: int, field: str = "seed") -> PRNGKeyArray:
    """JAX's key of a seed, all 64 bits of it.

    `jax.random.key` drops the upper half unless x64 is on: 2^32 would draw what 0 draws. Below 2^32
    the two are equal.
    """
    import jax
    import numpy as np

    check_seed(seed, field)
    seed = operator.index(seed)
    if seed < 2**32:
        return jax.random.key(seed)
    words = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    # Where the default generator's key is longer, JAX too repeats the two words.
    return jax.random.wrap_key_data(np.resize(words, jax.random.key_data(jax.random.key(0)).shape))
