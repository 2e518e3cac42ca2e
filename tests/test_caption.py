"""Whose caption r reads where the denoiser's is dropped: training, sampling, tuning, edits."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config_dict
from test_guidance import (
    NULL,
    SHAPE,
    TIMES,
    TRUE,
    X32,
    B,
    Formulas,
    L,
    T,
    X,
    agree,
    branch,
    captions,
    clipped,
    coefficients,
    denoise_by,
    draw,
    line,
)

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.editing import denoise as editing_denoise
from contextdiff_jax.editing.tuning import tuning_loss
from contextdiff_jax.models.context import ContextConfig
from contextdiff_jax.settings import TrainConfig, parse
from contextdiff_jax.training.step import loss_fn


@pytest.mark.parametrize("caption", ["true", "dropped"])
def test_in_training_r_reads_the_true_caption_or_what_the_denoiser_reads(caption):
    """The loss of pictures whose captions are hidden, shown, hidden, in float64."""
    settings = parse(config_dict(**{"diffusion.prediction_type": "x0", "context.caption": caption}))
    assert settings.process.caption == caption  # for sampling and edits
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
    loss, _ = loss_fn(Formulas(), batch, null, settings.process, settings)

    (a, b), x0 = coefficients(schedule, t), image / 127.5 - 1
    true = ids.mean(1).reshape(-1, 1, 1, 1)
    read = np.where(dropped.reshape(-1, 1, 1, 1), -1.0, true)
    r = np.tanh((read if caption == "dropped" else true) * x0)
    x_t = a * x0 + a * (1 - a) * r + b * noise
    expected = np.mean((0.7 * x_t + 0.2 * read - x0) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("caption", ["true", "dropped"])
def test_in_sampling_the_branch_without_a_caption_has_the_r_of_its_training(caption):
    out = denoise_by(caption=caption)(X32, *TIMES)
    empty = branch(NULL, NULL if caption == "dropped" else TRUE)
    agree(out, clipped(*line(branch(TRUE), empty, 2.0)))


class ClipsContext:
    image = types.SimpleNamespace(config=ContextConfig())

    def __call__(self, x0, tokens, mask, t):
        return jnp.tanh(tokens.mean((1, 2)).reshape(-1, 1, 1, 1, 1) * x0)


class Clips:
    """As `Formulas`, of clips: x0_hat = 0.7 x + 0.2 c, r = tanh(c x0)."""

    backbone, bound, context = types.SimpleNamespace(context_head=None), None, ClipsContext()

    def predict(self, x, t, text, control=None):
        return 0.7 * x + 0.2 * text.tokens.mean((1, 2)).reshape(-1, 1, 1, 1, 1)


def clip_process(caption):
    schedule = diffusion.make_schedule("cosine", T)
    return Process(schedule=schedule, prediction_type="x0", shift="quadratic", caption=caption)


@pytest.mark.parametrize("caption, same", [("dropped", True), ("true", False)])
def test_tuning_on_a_clip_with_hidden_captions_is_tuning_on_the_empty_one(caption, same):
    """All captions hidden; under `true` the shift still reads them."""
    clip, key = jnp.float32(draw(5, (1, 2, 2, 2, 1))), jax.random.key(0)
    text, null = captions([0.9]), captions([-0.4])

    def loss(text, caption, dropout):
        train = TrainConfig(batch_size=4, caption_dropout=dropout)
        return tuning_loss(Clips(), clip_process(caption), clip, text, null, key, train, 0)

    hidden, empty = loss(text, caption, 0.999999), loss(null, "true", 0.0)
    assert (abs(hidden - empty) < 1e-6) == same


@pytest.mark.parametrize("caption", ["true", "dropped"])
def test_an_edits_branch_without_a_caption_has_the_r_of_its_tuning(caption):
    denoise = editing_denoise.make_denoise(
        Clips(), clip_process(caption), captions(TRUE), captions(NULL), guidance=2.0
    )
    out = denoise(X32[:, None], *TIMES)
    estimates = []
    for text in (TRUE, NULL):
        x0 = 0.7 * X + 0.2 * text.reshape(-1, 1, 1, 1)
        read = (text if caption == "dropped" else TRUE).reshape(-1, 1, 1, 1)
        estimates.append((x0, np.tanh(read * x0), np.tanh(read * x0)))
    agree([part[:, 0] for part in out], line(*estimates, 2.0))


def atoms(seed=0):
    """25 points in the plane, p(c | point) of five captions, and r = sin(x A + e_c) at root mean
    square 1, whose last column is the empty caption's.
    """
    rng, axis = np.random.default_rng(seed), np.linspace(-1, 1, 5)
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2) + 0.08 * rng.normal(size=(25, 2))
    angles = 2 * np.pi * np.arange(5) / 5
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    shares = np.exp(2 * points @ directions.T)
    shares /= shares.sum(1, keepdims=True)
    texts = np.vstack([2 * directions, np.zeros((1, 2))])
    r = np.sin(3 * points[:, None] @ rng.normal(size=(2, 2)) + texts)
    return points, shares, r / np.sqrt((r**2).mean((0, 2), keepdims=True))


def exact_branch(schedule, points, r, weights):
    """E[x0 | x_t] and E[r | x_t] of weighted points."""

    def denoise(x, t, s):
        a, b = (jnp.expand_dims(f(t), (1, 2)) for f in (schedule.alpha, schedule.sigma))
        apart = x[:, None] - a * points - a * (1 - a) * r
        share = jax.nn.softmax(jnp.log(weights) - (apart**2).sum(-1) / (2 * b[:, 0] ** 2), -1)
        return diffusion.Denoised(share @ points, share @ r, share @ r)

    return denoise


@pytest.mark.slow  # python -m pytest -q tests/test_caption.py -m slow -s
def test_exact_branches_of_dropped_guide_no_worse_than_those_of_true():
    """Total variation from p(x0) p(c | x0)^g, which guidance is meant to sample, over 4096 samples
    a caption: at scale 1 that of chance (0.03) for both, at 4 less by `dropped`.
    """
    schedule, N = diffusion.make_schedule("cosine"), 4096
    times, (points, shares, unit) = diffusion.spaced_timesteps(1000, 50), atoms()
    noise = jax.random.normal(jax.random.key(0), (N, 2))

    @functools.partial(jax.jit, static_argnames="caption")
    def sample(c, gain, scale, caption):
        r = gain * jnp.asarray(unit)
        own = exact_branch(schedule, points, r[:, c], jnp.asarray(shares)[:, c] / 25)
        if caption == "dropped":
            other = exact_branch(schedule, points, r[:, 5], np.full(25, 1 / 25))
        else:  # the caption is unknown: one of five
            rows = np.repeat(points, 5, 0), r[:, :5].reshape(-1, 2), shares.reshape(-1) / 25
            other = exact_branch(schedule, *rows)
        guided = diffusion.autoguided(own, other, scale)
        return diffusion.ddim_sample(guided, noise, schedule, times)

    def variation(gain, scale, caption):
        found = []
        for c in range(5):
            x = np.asarray(sample(c, gain, scale, caption))
            nearest = np.linalg.norm(x[:, None] - points, axis=-1).argmin(1)
            ideal = shares[:, c] ** scale / (shares[:, c] ** scale).sum()
            found.append(0.5 * np.abs(np.bincount(nearest, minlength=25) / N - ideal).sum())
        return np.mean(found)

    table = {}
    for gain, caption in (
        (0.0, "true"),
        (0.4, "true"),
        (0.4, "dropped"),
        (1.0, "true"),
        (1.0, "dropped"),
    ):
        row = [variation(gain, scale, caption) for scale in (1.0, 2.0, 4.0)]
        table[gain, caption] = row
        print(f"gain {gain}, {caption}: {', '.join(f'{v:.3f}' for v in row)} at 1, 2, 4")
    assert max(row[0] for row in table.values()) < 0.04
    assert table[1.0, "dropped"][2] < table[1.0, "true"][2] - 0.02


def test_an_unknown_choice_of_the_caption_is_refused_in_one_line():
    settings = parse(config_dict())
    with pytest.raises(ValueError, match="context.caption='none': unknown; one of true, dropped$"):
        dataclasses.replace(settings.context, caption="none")
