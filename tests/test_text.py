"""The embedded text encoder: what its words know of each other."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from contextdiff_jax.models.text import TextConfig, TextEncoder, directions

IDS = np.array([[5, 6, 7, 8, 9, 1, 1]])
FOUND = np.array([[True] * 5 + [False] * 2])


def encoder(**changes):
    """An encoder whose blocks, which begin as nothing, do something."""
    config = TextConfig(vocab_size=16, max_length=8, width=16, num_layers=1, num_heads=4, **changes)
    text = TextEncoder(config, rngs=nnx.Rngs(0))
    kernel = text.blocks[0].attention.to_out.kernel
    kernel[...] = jnp.asarray(np.random.default_rng(1).normal(size=kernel.shape), jnp.float32)
    return text


def changed_states(text, place):
    """Which words' states change with the word at `place`."""
    other = IDS.copy()
    other[0, place] = 15
    difference = np.abs(text(IDS, FOUND) - text(other, FOUND))[0, :5].max(-1)
    return list(np.flatnonzero(difference > 1e-6))


def test_a_heads_bias_is_its_distance_times_its_slope_on_one_side():
    bias = np.asarray(directions(4, 5))
    place = np.arange(5)
    for head, (slope, sign) in enumerate([(1, 1), (1 / 4, 1), (1, -1), (1 / 4, -1)]):
        distance = sign * (place[:, None] - place)
        np.testing.assert_allclose(
            bias[head][distance >= 0], -slope * distance[distance >= 0], rtol=1e-6
        )
        assert (bias[head][distance < 0] < -1e20).all()


@pytest.mark.parametrize("half, seen_by", [(0, [2, 3, 4]), (1, [0, 1, 2])])
def test_directed_heads_read_what_precedes_or_what_follows(half, seen_by):
    text = encoder(directed=True)
    out = text.blocks[0].attention.to_out.kernel  # rows: the heads' widths, one after the other
    out[...] = out.at[slice(8, None) if half == 0 else slice(8)].set(0.0)
    assert changed_states(text, 2) == seen_by


def test_other_heads_read_all_words():
    assert changed_states(encoder(), 2) == [0, 1, 2, 3, 4]


def test_the_order_of_words_is_known_without_positions_to_directed_heads_alone():
    turned = IDS[:, [4, 3, 2, 1, 0, 5, 6]]
    for directed in (False, True):
        text = encoder(directed=directed)
        text.positions[...] = jnp.zeros_like(text.positions[...])
        same = np.allclose(text(IDS, FOUND)[:, :5], text(turned, FOUND)[:, 4::-1], atol=1e-5)
        assert same != directed


def test_directed_heads_come_in_pairs():
    with pytest.raises(ValueError, match="text.num_heads=3: must be even with text.directed"):
        TextConfig(width=12, num_heads=3, directed=True)
