"""Pictures larger than memory: an upsampler's network sees tiles of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALLEST, config_dict, one_line, random_params, with_gamma

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.models.tiling import blended
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.settings import parse

UPSAMPLER = SMALLEST | {
    "super_resolution.factor": 4,
    "context.kind": "low_resolution",
    "sample.guidance": 1.5,
    "sample.steps": 2,
    "sample.dynamic_threshold": 90.0,
}
PROMPTS = ["a large red circle", "a small blue square"]


def picture(height, width, channels=3):
    return np.random.default_rng(0).standard_normal((2, height, width, channels), np.float32)


def box(x, radius):
    """The mean of the square of that radius around each value, zeros beyond the picture."""
    window, size = (1, 2 * radius + 1, 2 * radius + 1, 1), 2 * radius + 1
    sums = jax.lax.reduce_window(jnp.asarray(x), 0.0, jax.lax.add, window, (1,) * 4, "SAME")
    return sums / size**2


@pytest.mark.parametrize("height, width", [(40, 72), (33, 16), (65, 100)])
def test_tiles_are_the_whole_where_a_value_depends_on_no_more_than_a_sixteenth_of_a_side(
    height, width
):
    x = picture(height, width)
    whole, tiles = box(x, 2), blended(functools.partial(box, radius=2), x, 32)
    np.testing.assert_allclose(tiles, whole, atol=2e-6)
    np.testing.assert_allclose(blended(lambda x: x, x, 32), x, atol=1e-6)
    far = blended(functools.partial(box, radius=6), x, 32)
    assert np.abs(far - box(x, 6)).max() > 1e-3


def test_a_picture_no_larger_than_a_tile_is_one_call():
    calls = []
    blended(lambda x: calls.append(x.shape) or x, picture(32, 24), 32)
    assert calls == [(2, 32, 24, 3)]


def test_both_outputs_of_a_network_with_a_head_are_put_together():
    x = picture(48, 20)
    found = blended(lambda x: (x[..., :1], 2 * x), x, 16)
    for made, wanted in zip(found, (x[..., :1], 2 * x), strict=True):
        np.testing.assert_allclose(made, wanted, atol=1e-6)


def test_memory_no_longer_grows_with_the_picture():
    kernels = jnp.zeros((3, 3, 3, 64)), jnp.zeros((3, 3, 64, 3))

    def network(x):
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x

    def temporaries(fn):
        compiled = jax.jit(fn).lower(jnp.zeros((1, 256, 256, 3))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, tiles = (temporaries(f) for f in (network, lambda x: blended(network, x, 64)))
    assert tiles < whole / 4


@pytest.fixture(scope="module")
def pipeline():
    settings = parse(config_dict(**UPSAMPLER))
    params = with_gamma(random_params(settings), 1.5)
    return of_run(settings, load_tokenizer(), params)


def test_an_upsampler_of_convolutions_makes_the_same_pictures_in_tiles(pipeline, monkeypatch):
    """r, guidance and the dynamic threshold, a percentile of the whole picture, among them."""

    def convolutions(self, x, t, captions, seen, size):
        seen = box(x, 1)  # of x_t and of the low-resolution picture beside it
        text = captions.tokens.mean((1, 2))[:, None, None, None]
        return jnp.sin(3 * seen[..., :3] + seen[..., 3:] + text)

    monkeypatch.setattr(UNet, "predict", convolutions)
    small = np.random.default_rng(0).integers(0, 256, (2, 6, 9, 3)).astype(np.uint8)
    whole = pipeline.upsample(PROMPTS, small, seed=1)
    assert whole.shape == (2, 24, 36, 3) and whole.std() > 20
    tiles = pipeline.upsample(PROMPTS, small, seed=1, tile=16)
    assert np.abs(whole.astype(int) - tiles).max() <= 1
    np.testing.assert_array_equal(tiles, pipeline.upsample(PROMPTS, small, seed=1, tile=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile": 8}, "tile=8: must be a multiple of 1, at least 16"),
        ({"tile": 16, "reuse": 2}, "reuse=2: with tile only 1"),
    ],
)
def test_tiles_that_cannot_be_are_refused_in_one_line(pipeline, options, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline.upsample(PROMPTS, np.zeros((2, 6, 6, 3), np.uint8), **options)
    one_line(error)
