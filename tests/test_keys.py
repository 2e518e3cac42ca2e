"""Seeds of 64 bits: each draws its own numbers, small ones what JAX draws."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from contextdiff_jax.runtime.keys import check_seed, make_key

SEEDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1)


def words(seed):
    return tuple(int(word) for word in jax.random.key_data(make_key(seed)))


def test_every_seed_has_a_key_of_its_own_and_small_ones_jax_s():
    assert [words(seed) for seed in SEEDS] == [(seed >> 32, seed & 0xFFFFFFFF) for seed in SEEDS]
    assert words(np.int64(7)) == (0, 7)
    with jax.enable_x64(True):  # there JAX itself keeps all bits
        for seed in SEEDS[:7]:
            assert words(seed) == tuple(map(int, jax.random.key_data(jax.random.key(seed))))


def test_modules_draw_by_the_key_what_they_draw_by_the_number():
    kernels = [
        nnx.Linear(2, 3, rngs=nnx.Rngs(rngs)).kernel[...]
        for rngs in (5, make_key(5), make_key(2**32 + 5))
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 1e-3


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", None, True])
def test_what_is_no_seed_is_named(seed):
    with pytest.raises(ValueError, match=rf"^data.seed={seed!r}: must .* 0..18446744073709551615$"):
        check_seed(seed, "data.seed")
    with pytest.raises(ValueError, match="^seed="):
        make_key(seed)
