"""Upsamplers: their data, their context in both processes, and their pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALLEST, config_dict, one_line, random_params, with_gamma

from contextdiff_jax import diffusion
from contextdiff_jax.data import Pieces, load_tokenizer, make_loader
from contextdiff_jax.data.shapes import ShapesConfig, ShapesSource
from contextdiff_jax.diffusion.process import bcast
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.denoising import make_denoise
from contextdiff_jax.models.low_resolution import LowResolution, augment, enlarged, shrink
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import parse
from contextdiff_jax.training.reporter import small_pictures
from contextdiff_jax.training.step import draw, low_resolution

FACTOR = 4
UPSAMPLER = SMALLEST | {
    "super_resolution.factor": FACTOR,
    "super_resolution.max_level": 0.6,
    "context.kind": "low_resolution",
    "sample.guidance": 1.5,
}
PROMPTS = ["a large red circle", "a small blue square"]


@pytest.fixture(scope="module")
def settings():
    return parse(config_dict(**UPSAMPLER))


@pytest.fixture(scope="module")
def params(settings):
    return with_gamma(random_params(settings), 1.5)


@pytest.fixture(scope="module")
def pipeline(settings, params):
    return of_run(settings, load_tokenizer(), params)


@pytest.fixture(scope="module")
def small():
    return np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)


def test_a_piece_shrinks_to_that_piece_of_the_shrunk_picture():
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 16, 3)).astype(np.uint8)
    found = shrink(images, 4)
    blocks = [images[:, p::4, q::4].astype(np.float64) for p in range(4) for q in range(4)]
    assert found.dtype == np.uint8
    assert np.abs(found - np.mean(blocks, axis=0)).max() <= 0.5
    np.testing.assert_array_equal(shrink(images[:, 8:20, 4:12], 4), found[:, 2:5, 1:3])
    np.testing.assert_array_equal(jax.jit(shrink, static_argnums=1)(images, 4), found)
    with pytest.raises(ValueError, match=r"super_resolution.factor=5: must divide .* 24 x 16"):
        shrink(images, 5)


def test_the_level_says_how_much_of_the_low_resolution_picture_is_left():
    rng = np.random.default_rng(0)
    y, noise = (jnp.asarray(rng.standard_normal((3, 8, 8, 3), np.float32)) for _ in range(2))
    noised = augment(y, jnp.asarray([0.0, 0.5, 1.0]), noise)
    np.testing.assert_array_equal(noised[0], y[0])
    np.testing.assert_allclose(noised[1], (y[1] + noise[1]) / 2**0.5, atol=1e-6)
    np.testing.assert_allclose(noised[2], noise[2], atol=1e-6)
    low = enlarged(jnp.ones_like(y), 2, jnp.zeros(3), noise)
    np.testing.assert_allclose(low.picture, np.ones((3, 16, 16, 3)), atol=1e-6)


def test_pieces_are_at_every_place_by_record_and_epoch_whatever_the_share_of_the_batch():
    source = ShapesSource(ShapesConfig(image_size=16, length=32))
    pieces, whole = Pieces(8, True, seed=1), source[3]["image"]

    def places(piece):
        found = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if (whole[top : top + 8, left : left + 8] == piece).all()
        ]
        assert found
        return found

    whole = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    drawn = [places(pieces(whole, 3, epoch))[0] for epoch in range(400)]
    assert {top for top, _ in drawn} == {left for _, left in drawn} == set(range(9))
    np.testing.assert_array_equal(pieces(whole, 3, 5), pieces(whole, 3, 5))
    assert places(Pieces(8, False)(whole, 3, 5)) == [(4, 4)]
    with pytest.raises(ValueError, match=r"data.crop_size=17: a picture has 16 x 16"):
        Pieces(17, False)(whole, 0, 0)
    options = dict(batch_size=8, seed=2, num_threads=0, pieces=pieces)
    all_rows, half = (
        make_loader(source, **options, process_index=count - 1, process_count=count)
        for count in (1, 2)
    )
    batches = [(next(all_rows)["image"], next(half)["image"]) for _ in range(6)]
    assert batches[0][0].shape == (8, 8, 8, 3)
    for every, second in batches:
        np.testing.assert_array_equal(every[4:], second)
    half.set_state(half.get_state() | {"next_batch": 4})
    np.testing.assert_array_equal(next(half)["image"], batches[4][1])


def conditions(settings, model):
    """A training batch's captions and low-resolution pictures, with x0 and the batch."""
    rng = np.random.default_rng(2)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)),
        "token_ids": jnp.zeros((2, 12), jnp.int32),
    }
    batch = draw(jax.random.key(4), batch, settings)
    assert batch["level"].shape == (2,) and 0 < float(batch["level"].max()) <= 0.6
    low = low_resolution(model, batch, settings.super_resolution)
    tokens = jnp.asarray(rng.standard_normal((2, 12, 16), np.float32))
    return Captions(tokens, jnp.ones((2, 12), bool), low=low), to_unit(batch["image"]), batch


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("target", ["x0", "epsilon", "v", "velocity", "data"])
def test_the_context_of_sampling_is_that_of_training_to_the_bit_and_x0_is_found(
    settings, params, monkeypatch, schedule, target
):
    changes = {"diffusion.schedule": schedule, "diffusion.prediction_type": target}
    own = parse(config_dict(**UPSAMPLER, **changes))
    model, process = build_model(model_graph(own), params), own.process
    captions, x0, batch = conditions(own, model)
    t, noise = batch["t"], batch["noise"]
    r = model.relate(x0, captions, process.schedule.network_time(t))  # as the step has it
    assert float(jnp.abs(r).max()) > 0.1
    x_t = diffusion.q_sample(process.schedule, x0, r, t, noise, process.shift)
    wanted = diffusion.training_target(
        process.schedule, x0, x_t, t, target, context=r, shift=process.shift
    )
    monkeypatch.setattr(ContextDiffusion, "predict", lambda *_: wanted)
    denoise = make_denoise(
        model, process.schedule, captions, prediction_type=target, shift=process.shift
    )
    out = denoise(x_t, t, jnp.maximum(t - 1, 0) if schedule == "cosine" else 0.9 * t)
    np.testing.assert_array_equal(out.context_t, r)
    np.testing.assert_array_equal(out.context_s, r)
    # as far as x_t and the target's rounding say what x0 is
    scale = 1 / bcast(process.schedule.alpha(t), x0)
    assert float(jnp.abs((out.x0 - x0) / scale).max()) < 1e-5


def test_the_other_kinds_of_context_read_x0_of_an_upsampler():
    own = parse(config_dict(**UPSAMPLER | {"context.kind": "linear"}))
    model = build_model(model_graph(own), with_gamma(random_params(own), 1.5))
    captions, x0, _ = conditions(own, model)
    r, other = (model.relate(x, captions, jnp.zeros(2)) for x in (x0, -x0))
    assert float(jnp.abs(r - other).max()) > 1e-2


def test_the_text_alone_is_hidden_for_guidance():
    low = LowResolution(jnp.ones((1, 4, 4, 3)), jnp.ones(1))
    hidden = Captions(jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool), low=low).hidden()
    assert hidden.low is low and not hidden.tokens.any()


def test_pictures_are_enlarged_by_what_they_are_and_by_the_level(pipeline, small):
    def enlarge(images=small, prompts=PROMPTS, seed=1, **options):
        return pipeline.upsample(prompts, images, seed=seed, **options).astype(int)

    made = enlarge()
    assert made.shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(made, enlarge())
    changed = np.concatenate([small[:1], 255 - small[1:]])
    other = enlarge(changed)
    np.testing.assert_array_equal(made[0], other[0])
    assert np.abs(made[1] - other[1]).max() > 10
    assert np.abs(made - enlarge(augmentation=0.6)).max() > 10
    assert len(pipeline._made) == 1  # the level is an argument, not another program
    last = enlarge(small[1:], PROMPTS[1:], first=1)  # its noises are by its number
    assert np.abs(last[0] - made[1]).max() <= 1


def test_at_gain_0_an_upsampler_is_plain_diffusion(settings, params, small):
    zero = with_gamma(params, 0.0)
    plain = parse(config_dict(**UPSAMPLER | {"context.shift": "none"}))
    both = [
        of_run(each, load_tokenizer(), zero).upsample(PROMPTS, small, guidance=1.0)
        for each in (settings, plain)
    ]
    np.testing.assert_array_equal(*both)


def test_what_an_upsampler_cannot_do_is_refused_in_one_line(pipeline, small):
    with pytest.raises(ValueError, match="it is only for upsample") as error:
        pipeline.text_to_image(PROMPTS)
    one_line(error)
    with pytest.raises(ValueError, match="augmentation=0.7: must be at most 0.6") as error:
        pipeline.upsample(PROMPTS, small, augmentation=0.7)
    one_line(error)
    with pytest.raises(ValueError, match="images: 1; one for each of the 2 pictures") as error:
        pipeline.upsample(PROMPTS, small[:1])
    one_line(error)
    base = parse(config_dict(**SMALLEST))
    with pytest.raises(ValueError, match="it doesn't enlarge pictures") as error:
        of_run(base, load_tokenizer(), random_params(base)).upsample(PROMPTS, small)
    one_line(error)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"super_resolution.factor": 1}, "super_resolution.factor=1: must be at least 2"),
        ({"super_resolution.factor": 0}, "context.kind='low_resolution': reads an upsampler's"),
        ({"super_resolution.factor": 3}, "data.image_size=16: must be a multiple of 3"),
        ({"super_resolution.max_level": 2.0}, r"max_level=2.0: must lie in \[0, 1\]"),
        ({"sample.augmentation": 0.7}, "augmentation=0.7: must be at most 0.6"),
        ({"sample.prompts": ("a dog",)}, r"sample.prompts: an upsampler's .* must be \(\)"),
        ({"data.crop_size": 6}, "data.crop_size=6: must be a multiple of 4"),
        ({"data.crop_size": 32}, "data.crop_size=32: must be at most data.image_size=16"),
    ],
)
def test_settings_that_make_no_upsampler_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(config_dict(**UPSAMPLER | changes))
    one_line(error)


def test_the_samples_of_training_are_of_held_out_pictures(settings):
    captions, images = small_pictures(settings, count=3)
    assert len(captions) == 3 and images.shape == (3, 4, 4, 3)
