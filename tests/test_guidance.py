"""Guidance as wrappers of denoise functions, against float64 numpy."""

from __future__ import annotations

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.inference.sampling import Method, Steps, Text, Weaker, make_sample
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.context import ContextConfig
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.denoising import make_denoise

B, L, T = 3, 2, 50
SHAPE = (B, 2, 2, 1)


class Formulas(ContextDiffusion):
    """A model of closed forms: x0_hat = 0.7 x + 0.2 c, r = tanh(c x0), c the mean of the tokens;
    with a head r_hat = sin(c x).
    """

    backbone = None  # in the place of a network

    def __init__(self, head=False):
        self.backbone = types.SimpleNamespace(
            context_head="head" if head else None, keeps_coarse=True
        )
        self.context = types.SimpleNamespace(gain=0.1, config=ContextConfig())
        self.vae = self.vision = None
        self.text = types.SimpleNamespace(zeros_for_empty=False)

    def encode(self, ids, mask):
        return Captions(jnp.asarray(ids, jnp.float32)[..., None], mask)

    def relate(self, x0, captions, t, pixels=None, noise=None):
        return jnp.tanh(caption_mean(captions) * x0)

    def predict(self, x, t, captions, deep=None, piece=None):
        x0 = 0.7 * x + 0.2 * caption_mean(captions)
        x0 = x0 if deep is None else x0 + deep
        return (
            x0 if self.backbone.context_head is None else (x0, jnp.sin(caption_mean(captions) * x))
        )

    def deep_features(self, x, t, captions):
        return 0.1 * caption_mean(captions) * jnp.cos(x)


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


# ---------------------------------------------------------------- wrappers


def estimate(w):
    """A denoise function in closed form, and the same in numpy: tanh(w x), and two contexts."""

    def denoise(x, t, s):
        return diffusion.Denoised(*formulas(jnp, w, x))

    return denoise


def formulas(np, w, x):
    return np.tanh(w * x), np.sin(w * x), w * np.cos(x)


def rows_of(*weights):
    """The branches of those weights as one batch, side by side as `interleave` has them."""

    def denoise(x, t, s):
        w = jnp.tile(jnp.float32(weights), len(x) // len(weights)).reshape(-1, 1, 1, 1)
        return diffusion.Denoised(*formulas(jnp, w, x))

    return denoise


def rescaled(guided, reference, amount):
    """Lin et al. 2023, eq. 15-16, of x0 alone."""
    axes = (1, 2, 3)
    std = reference[0].std(axes, keepdims=True) / guided[0].std(axes, keepdims=True)
    return (amount * guided[0] * std + (1 - amount) * guided[0], *guided[1:])


def line(conditional, unconditional, scale):
    return [u + scale * (c - u) for c, u in zip(conditional, unconditional, strict=True)]


def agree(out, expected):
    for actual, wanted in zip(out, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


X, TIMES = draw(3), (np.full(B, 30), np.full(B, 12))
X32 = jnp.float32(X)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_autoguidance_leads_away_from_the_weaker_model(rescale):
    strong, weak = formulas(np, 1.3, X), formulas(np, 0.4, X)
    expected = line(strong, weak, 2.5)
    if rescale:
        expected = rescaled(expected, strong, rescale)
    denoise = diffusion.autoguided(estimate(1.3), estimate(0.4), 2.5, rescale)
    agree(denoise(X32, *TIMES), expected)


@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_a_perpendicular_negative_is_perpendicular_and_leaves_the_rest(rescale):
    """Perp-Neg as it is written: of each sample, the negative's part along the prompt's goes."""
    prompt, empty, negative = (formulas(np, w, X) for w in (1.3, 0.1, -0.6))
    scale, weight = 3.0, 0.8
    expected = [np.zeros(SHAPE) for _ in range(3)]
    for i in range(B):
        towards, away = prompt[0][i] - empty[0][i], negative[0][i] - empty[0][i]
        share = np.vdot(away, towards) / np.vdot(towards, towards)
        assert abs(np.vdot(away - share * towards, towards)) < 1e-9 < abs(share)
        for whole, p, u, n in zip(expected, prompt, empty, negative, strict=True):
            step = (p[i] - u[i]) - weight * ((n[i] - u[i]) - share * (p[i] - u[i]))
            whole[i] = u[i] + scale * step
    if rescale:
        expected = rescaled(expected, prompt, rescale)
    denoise = diffusion.perpendicular_negative(rows_of(1.3, 0.1, -0.6), scale, rescale, weight)
    agree(denoise(X32, *TIMES), expected)


def test_a_negative_that_is_the_prompt_turns_nothing_away():
    """All of it lies along the prompt: guidance is classifier-free."""
    plain = diffusion.classifier_free(rows_of(1.3, 0.1), 3.0)
    turned = diffusion.perpendicular_negative(rows_of(1.3, 0.1, 1.3), 3.0, 0.0, 5.0)
    chex.assert_trees_all_close(*(f(X32, *TIMES) for f in (plain, turned)), atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "cosine_continuous", "edm"])
def test_an_interval_is_of_the_share_of_noise_on_every_schedule(name):
    """b / (a + b) in (low, high]; inside it one function answers, outside of it the other."""
    schedule = diffusion.make_schedule(name, T)
    if name in ("linear", "cosine"):
        times = np.arange(T)
        a = np.sqrt(np.float64(schedule.alphas_cumprod))
        b = np.sqrt(1 - a**2)
    else:
        times = np.float32(np.linspace(0.02, 1, 50)) ** (3 if name == "edm" else 1)
        u, times = np.float64(times), times * np.float32(80 if name == "edm" else 1)
        a, b = {
            "flow": (1 - u, u),
            "cosine_continuous": (np.cos(np.pi / 2 * u), np.sin(np.pi / 2 * u)),
            "edm": (np.ones_like(u), 80 * u),
        }[name]
    share = b / (a + b)
    np.testing.assert_allclose(diffusion.noise_share(schedule, times), share, atol=2e-4)
    limited = diffusion.within(estimate(1.3), estimate(0.4), schedule, (0.3, 0.7))

    def answers(t):
        return limited(X32, jnp.full(B, t), jnp.full(B, t)).x0

    found = np.asarray(jax.lax.map(answers, jnp.asarray(times)))
    clear = np.minimum(abs(share - 0.3), abs(share - 0.7)) > 1e-3
    inside = (share > 0.3) & (share <= 0.7)
    assert 3 < inside.sum() < 48
    for is_inside, w in ((True, 1.3), (False, 0.4)):
        for x0 in found[clear & (inside == is_inside)]:
            np.testing.assert_allclose(x0, np.tanh(w * X), atol=1e-5)


def test_outside_of_its_interval_guidance_computes_the_conditional_branch_alone():
    schedule, calls = diffusion.make_schedule("flow"), []

    def counted(w, name):
        def denoise(x, t, s):
            jax.debug.callback(lambda t: calls.append((name, round(float(t), 3))), t[0])
            return diffusion.Denoised(*formulas(jnp, w, x))

        return denoise

    limited = diffusion.within(counted(1.3, "in"), counted(0.4, "out"), schedule, (0.3, 0.8))
    times = np.float32([1.0, 0.7, 0.4, 0.2])
    jax.block_until_ready(diffusion.ddim_sample(limited, X32, schedule, times))
    jax.effects_barrier()
    assert calls == [("out", 1.0), ("in", 0.7), ("in", 0.4), ("out", 0.2)]


def test_an_interval_of_all_noise_is_the_guided_function_itself():
    schedule, denoise = diffusion.make_schedule("flow"), estimate(1.3)
    assert diffusion.within(denoise, estimate(0.4), schedule, diffusion.ALWAYS) is denoise


def test_under_vmap_each_time_is_inside_or_outside_by_itself():
    schedule, times = diffusion.make_schedule("flow"), jnp.float32([0.9, 0.5, 0.1])
    limited = diffusion.within(estimate(1.3), estimate(0.4), schedule, (0.3, 0.8))
    found = jax.vmap(lambda t: limited(X32, jnp.full(B, t), jnp.full(B, t)).x0)(times)
    for x0, w in zip(found, (0.4, 1.3, 0.4), strict=True):
        np.testing.assert_allclose(x0, np.tanh(w * X), atol=1e-5)


@pytest.mark.parametrize("percentile", [0.0, 90.0])
def test_wrappers_compose_under_jit_with_a_traced_scale(percentile):
    """Bounds of a scaled context of guidance in an interval, in a scan over two times."""
    schedule = diffusion.make_schedule("flow")

    @jax.jit
    def both(scale):
        guided = diffusion.classifier_free(rows_of(2.3, 0.1), scale, 0.4)
        denoise = diffusion.within(guided, estimate(2.3), schedule, (0.3, 0.8))
        denoise = diffusion.bounded(diffusion.scale_context(denoise, 0.5), percentile)
        times = jnp.float32([0.9, 0.6])
        return jax.lax.map(lambda t: denoise(X32, jnp.full(B, t), jnp.full(B, t)), times)

    conditional, unconditional = formulas(np, 2.3, X), formulas(np, 0.1, X)
    guided = rescaled(line(conditional, unconditional, 4.0), conditional, 0.4)
    outs = both(4.0)
    for i, (x0, *contexts) in enumerate((conditional, guided)):
        if percentile:
            limit = np.percentile(np.abs(x0), percentile, axis=(1, 2, 3), keepdims=True)
            limit = np.maximum(limit, 1)
            x0 = np.clip(x0, -limit, limit) / limit
        wanted = (np.clip(x0, -1, 1), *(0.5 * context for context in contexts))
        agree([part[i] for part in outs], wanted)


# ---------------------------------------------------------------- in a model's denoise function


def denoise_by(model=None, **options):
    """`make_denoise` of closed forms, whose captions' means are TRUE and NULL."""
    schedule, texts = diffusion.make_schedule("cosine", T), (captions(TRUE), captions(NULL))
    options = {"prediction_type": "x0", "guidance": 2.0} | options
    return make_denoise(model or Formulas(), schedule, *texts, **options)


TRUE, NULL, NEGATIVE = np.array([[0.5, 1.0, -0.8], [-0.4, -0.4, -0.4], [0.9, -0.9, 0.3]])


def branch(text, read=TRUE, head=False):
    """x0_hat and r_hat of one branch, in numpy."""
    text, read = (values.reshape(-1, 1, 1, 1) for values in (text, read))
    x0 = 0.7 * X + 0.2 * text
    if head:
        return x0, *[np.sin(text * X)] * 2
    x0 = np.clip(x0, -1, 1)
    return x0, *[np.tanh(read * x0)] * 2


def clipped(x0, *contexts):
    return np.clip(x0, -1, 1), *contexts


@pytest.mark.parametrize("head", [False, True], ids=["plugin", "posterior_mean"])
def test_the_scale_of_the_context_multiplies_its_estimate(head):
    out = denoise_by(Formulas(head), context_scale=0.6)(X32, *TIMES)
    x0, *contexts = line(branch(TRUE, head=head), branch(NULL, head=head), 2.0)
    agree(out, clipped(x0, *(0.6 * context for context in contexts)))


@pytest.mark.parametrize("interval, inside", [((0.4, 0.7), True), ((0.0, 0.4), False)])
def test_a_model_is_guided_within_the_interval_alone(interval, inside):
    """At t = 30 of 50, where b / (a + b) is 0.59, with a traced scale."""
    denoise = jax.jit(lambda g: denoise_by(guidance=g, guidance_interval=interval)(X32, *TIMES))
    both = clipped(*line(branch(TRUE), branch(NULL), 3.0))
    agree(denoise(3.0), both if inside else branch(TRUE))


@pytest.mark.parametrize("caption", ["true", "dropped"])
def test_a_models_negative_text_is_a_third_branch(caption):
    out = denoise_by(negative=captions(NEGATIVE), perpendicular=0.7, caption=caption)(X32, *TIMES)
    prompt, empty, negative = (
        branch(text, text if caption == "dropped" else TRUE) for text in (TRUE, NULL, NEGATIVE)
    )
    axes, (p, u, n) = (1, 2, 3), (prompt[0], empty[0], negative[0])
    share = ((n - u) * (p - u)).sum(axes) / ((p - u) ** 2).sum(axes)
    share = share.reshape(-1, 1, 1, 1)
    expected = [
        u + 2.0 * ((p - u) - 0.7 * ((n - u) - share * (p - u)))
        for p, u, n in zip(prompt, empty, negative, strict=True)
    ]
    agree(out, clipped(*expected))


# ---------------------------------------------------------------- in the loop of a sampler


@pytest.mark.parametrize("way", ["classifier-free", "perpendicular", "autoguidance"])
@pytest.mark.parametrize("reuse", [1, 2])
def test_sampling_is_ddim_of_the_guided_estimates(way, reuse):
    """Four steps, the first of them out of the interval, with r_hat at 0.6; in float64."""
    schedule, scale, context_scale = diffusion.make_schedule("cosine", T), 2.0, 0.6
    process = Process(schedule=schedule, prediction_type="x0", shift="quadratic", caption="dropped")
    method = Method(
        guidance_interval=(0.0, 0.9),
        context_scale=context_scale,
        perpendicular=0.7 if way == "perpendicular" else 0.0,
        reuse=reuse,
    )
    means = {"prompt": TRUE, "empty": NULL, "negative": NEGATIVE, "weaker": 0.3 * TRUE}
    ids = {name: np.repeat(np.float32(mean)[:, None], L, 1) for name, mean in means.items()}
    mask, times = np.ones((B, L), bool), np.array([49, 36, 24, 12])
    negative = (ids["negative"], mask) if way == "perpendicular" else ()
    weaker = Weaker(Formulas(), "x0", ids["weaker"], mask) if way == "autoguidance" else None
    sample = make_sample(process, method)
    made = jax.jit(
        lambda x, g: sample(
            Formulas(),
            x,
            Text(ids["prompt"], mask, ids["empty"], mask, *negative),
            Steps(times),
            g,
            jax.random.key(0),
            weaker=weaker,
        )
    )(X32, scale)

    def deep(x, text):
        return 0.1 * text * np.cos(x)

    def estimates(x, text, kept):
        x0 = np.clip(0.7 * x + 0.2 * text + (0 if kept is None else kept[id(text)]), -1, 1)
        return np.array([x0, np.tanh(text * x0)])

    prompt, empty, away, weak = (mean.reshape(-1, 1, 1, 1) for mean in means.values())
    x, kept = X, None
    for i, t in enumerate(times):
        s = times[i + 1] if i < 3 else -1
        if reuse > 1 and i % reuse == 0:
            kept = {id(text): deep(x, text) for text in (prompt, empty, away, weak)}
        own, other, third, weaker = (
            estimates(x, text, kept) for text in (prompt, empty, away, weak)
        )
        a, b = coefficients(schedule, np.array([t]))
        if b / (a + b) > 0.9:
            x0, r = own
        elif way == "classifier-free":
            x0, r = other + scale * (own - other)
        elif way == "autoguidance":
            x0, r = weaker + scale * (own - weaker)
        else:
            p, n = own - other, third - other
            share = (n[0] * p[0]).sum((1, 2, 3)) / (p[0] ** 2).sum((1, 2, 3))
            x0, r = other + scale * (p - 0.7 * (n - share.reshape(-1, 1, 1, 1) * p))
        x0, r = np.clip(x0, -1, 1), context_scale * r
        a_s, b_s = (1.0, 0.0) if s < 0 else coefficients(schedule, np.array([s]))
        noise = (x - a * x0 - a * (1 - a) * r) / b
        x = a_s * x0 + a_s * (1 - a_s) * r + b_s * noise
    np.testing.assert_allclose(made, x, atol=1e-4)
