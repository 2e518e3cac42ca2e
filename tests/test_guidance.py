"""Guidance as wrappers of denoise functions, and whose caption r reads, against float64 numpy."""

from __future__ import annotations

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config_dict

from contextdiff_jax import diffusion
from contextdiff_jax.models.contextdiff import Captions, ContextDiffusion, make_denoise
from contextdiff_jax.settings import parse
from contextdiff_jax.training.step import loss_fn

B, L, T = 3, 2, 50
SHAPE = (B, 2, 2, 1)


class Formulas(ContextDiffusion):
    """A model of closed forms: r = tanh(c x0), x0_hat = 0.7 x + 0.2 c, c the mean of the tokens."""

    def __init__(self, head=False):
        self.text = types.SimpleNamespace(reads_padding=True)
        self.unet = types.SimpleNamespace(context_head="head" if head else None)
        self.context = types.SimpleNamespace(gain=0.1)
        self.vae = self.vision = None

    def encode(self, ids, mask):
        return Captions(jnp.asarray(ids, jnp.float32)[..., None], mask)

    def relate(self, x0, captions, t, pixels=None):
        return jnp.tanh(caption_mean(captions) * x0)

    def predict(self, x, t, captions, deep=None):
        x0 = 0.7 * x + 0.2 * caption_mean(captions)
        return x0 if self.unet.context_head is None else (x0, jnp.sin(caption_mean(captions) * x))


def caption_mean(captions):
    return captions.tokens.mean((1, 2))[:, None, None, None]


def captions(values):
    """Captions whose tokens' means are `values`."""
    tokens = np.repeat(np.float32(values)[:, None, None], L, 1)
    return Captions(tokens, np.ones(tokens.shape[:2], bool))


def draw(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape)


def coefficients(schedule, t):
    abar = np.float64(schedule.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    return np.sqrt(abar), np.sqrt(1 - abar)


# ---------------------------------------------------------------- whose caption r reads


@pytest.mark.parametrize("caption", ["true", "dropped"])
def test_in_training_r_reads_the_true_caption_or_what_the_denoiser_reads(caption):
    """The loss of pictures whose captions are hidden, shown, hidden, in float64."""
    settings = parse(config_dict(**{"diffusion.prediction_type": "x0", "context.caption": caption}))
    schedule, t = settings.diffusion.make_schedule(), np.array([5, 20, 45])
    image = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
    noise, dropped = draw(1), np.array([True, False, True])
    ids = np.array([[1, 2], [0, 1], [3, 3]])
    batch = {
        "image": image,
        "token_ids": ids,
        "token_mask": np.ones((B, L), bool),
        "t": t,
        "noise": jnp.float32(noise),
        "dropped": dropped,
    }
    null = {"token_ids": np.array([[-1, -1]]), "token_mask": np.ones((1, L), bool)}
    loss, _ = loss_fn(Formulas(), batch, null, schedule, settings)

    (a, b), x0 = coefficients(schedule, t), image / 127.5 - 1
    true = ids.mean(1).reshape(-1, 1, 1, 1)
    read = np.where(dropped.reshape(-1, 1, 1, 1), -1.0, true)
    r = np.tanh((read if caption == "dropped" else true) * x0)
    x_t = a * x0 + a * (1 - a) * r + b * noise
    expected = np.mean((0.7 * x_t + 0.2 * read - x0) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("caption", ["true", "dropped"])
def test_in_sampling_the_branch_without_a_caption_has_the_r_of_its_training(caption):
    schedule, x, scale = diffusion.make_schedule("cosine", T), draw(2), 2.0
    t, s = np.full(B, 30), np.full(B, 12)
    true, null = np.array([0.5, 1.0, -0.8]), np.array([-0.4, -0.4, -0.4])
    denoise = make_denoise(
        Formulas(),
        schedule,
        captions(true),
        captions(null),
        prediction_type="x0",
        guidance=scale,
        caption=caption,
    )
    out = denoise(jnp.float32(x), t, s)
    x0, r = [], []
    for text in (true, null):
        text = text.reshape(-1, 1, 1, 1)
        x0.append(np.clip(0.7 * x + 0.2 * text, -1, 1))
        read = text if caption == "dropped" else true.reshape(-1, 1, 1, 1)
        r.append(np.tanh(read * x0[-1]))
    guided = [u + scale * (c - u) for c, u in (x0, r)]
    np.testing.assert_allclose(out.x0, np.clip(guided[0], -1, 1), atol=1e-5)
    np.testing.assert_allclose(out.context_t, guided[1], atol=1e-5)
    np.testing.assert_allclose(out.context_s, guided[1], atol=1e-5)


def test_an_unknown_choice_of_the_caption_is_refused_in_one_line():
    settings = parse(config_dict())
    with pytest.raises(ValueError, match="context.caption='none': unknown; one of true, dropped$"):
        dataclasses.replace(settings.context, caption="none")
