"""The relational network and the embedded text encoder."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from contextdiff_jax.models.context import (
    ContextConfig,
    RelationalNetwork,
    position_embedding,
    unpatch,
)
from contextdiff_jax.models.context_kinds import (
    KINDS,
    CrossAttention,
    Kind,
    LowResolutionContext,
    TextOnly,
    compact_bilinear,
)
from contextdiff_jax.models.text import TextConfig, TextEncoder
from contextdiff_jax.models.video import VideoContext

WITH_CONTEXT = [name for name, kind in KINDS.items() if not kind.is_zero]
OF_ONE_PART = [name for name in WITH_CONTEXT if KINDS[name].parts == 1]
CONFIG = ContextConfig(width=16, num_blocks=1, num_heads=2, text_width=12, patch_size=4)


def randomised(params):
    """Weights away from their zero-initialised branches, so that an effect anywhere reaches the
    output.
    """
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def network(gamma=0.5, **changes):
    model = RelationalNetwork(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    if gamma and not model.config.network.is_zero:
        model.gamma[...] = jnp.full_like(model.gamma[...], gamma)
    return model


@nnx.jit
def run(module, *args, **more):
    """A module's output by one program; without it each operation of each shape would be one."""
    return module(*args, **more)


def inputs(batch=2, height=8, width=12):
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.normal(size=(batch, height, width, 3)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(batch, 5, 12)), jnp.float32)
    mask = jnp.asarray(np.arange(5) < np.array([[3], [5]]))
    return x0, text, mask, jnp.array([3, 40])


@pytest.mark.parametrize("kind", WITH_CONTEXT)
def test_context_is_exactly_zero_at_the_start_yet_its_gain_learns(kind):
    model, (x0, text, mask, t) = network(gamma=0, kind=kind), inputs()
    noise = jnp.sin(x0)
    more = dict(noise=noise, low=x0)
    graph, state = nnx.split(model)

    def error(state):
        r = nnx.merge(graph, state)(x0, text, mask, t, **more)
        return jnp.sum((r - 1) ** 2), r

    grads, r = jax.jit(jax.grad(error, has_aux=True))(state)
    assert (r == 0).all()
    assert float(jnp.abs(grads["gamma"][...]).min()) > 1e-4


@pytest.mark.parametrize("kind", OF_ONE_PART)
def test_context_has_the_gain_as_root_mean_square_per_sample(kind):
    model, (x0, text, mask, t) = network(kind=kind, max_gain=0.7), inputs()
    rms = jnp.sqrt(jnp.mean(run(model, x0, text, mask, t, low=x0) ** 2, axis=(1, 2, 3)))
    if KINDS[kind].linear_in_x0:  # at most; see below
        assert (0.1 * 0.7 * np.tanh(0.5) < rms).all() and (rms < 0.7 * np.tanh(0.5)).all()
    else:
        np.testing.assert_allclose(rms, 0.7 * np.tanh(0.5), rtol=1e-5)
    np.testing.assert_allclose(model.gain, 0.7 * np.tanh(0.5), rtol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "linear"])
def test_a_kind_is_as_linear_in_the_picture_as_it_says(kind):
    """A linear kind's plugged in mean is the mean of the context."""
    model, (x0, text, mask, t) = network(kind=kind), inputs()
    other = jnp.cos(3 * x0)
    mean = 0.25 * run(model, x0, text, mask, t) + 0.75 * run(model, other, text, mask, t)
    apart = float(jnp.abs(run(model, 0.25 * x0 + 0.75 * other, text, mask, t) - mean).max())
    assert apart < 1e-6 if KINDS[kind].linear_in_x0 else apart > 1e-2


def test_an_affine_context_reaches_its_bound_where_every_pixel_is_as_bad_as_can_be():
    """One output a token: the largest picture has the signs of its row of the matrix, turned to the
    constant's sign.
    """
    model = network(kind="affine", gamma=20.0, max_gain=1.0)  # tanh is 1
    only = jnp.arange(48) == 7
    model.unembed.kernel[...] = model.unembed.kernel[...] * only
    _, text, mask, t = inputs()
    row = np.asarray(model.raw.embed.kernel[...]) @ np.asarray(model.unembed.kernel[:, 7])
    constant = model.unembed(
        model.raw(jnp.zeros((2, 6, 48)), position_embedding(2, 3, 16), text, mask, None)
    )[..., 7]
    worst = jnp.sign(constant)[..., None] * jnp.asarray(np.sign(row))  # [2, 6, 48]

    def size(tokens):
        return np.sqrt(
            np.mean(
                np.square(run(model, unpatch(tokens, 4, (2, 8, 12, 3)), text, mask, t)),
                axis=(1, 2, 3),
            )
        )

    np.testing.assert_allclose(size(worst), 1, rtol=1e-5)
    assert (size(0.9 * worst) < 0.999).all() and (size(-worst) < 0.999).all()


@pytest.mark.parametrize("kind", WITH_CONTEXT)
def test_every_kind_reads_what_it_says_and_padding_nowhere(kind):
    model, (x0, text, mask, t) = network(kind=kind), inputs()
    r = run(model, x0, text, mask, t, noise=x0, low=x0)

    def change(x0=x0, text=text, noise=x0, low=x0):
        return float(jnp.abs(run(model, x0, text, mask, t, noise=noise, low=low) - r).max())

    assert (change(x0=jnp.cos(3 * x0)) > 0) == KINDS[kind].reads_x0
    assert (change(noise=jnp.cos(3 * x0)) > 0) == KINDS[kind].reads_noise
    assert (change(low=jnp.cos(3 * x0)) > 0) == KINDS[kind].reads_low
    known = isinstance(model.raw, TextOnly | LowResolutionContext)
    assert KINDS[kind].reads_x0 or known
    assert change(text=jnp.cos(3 * text)) > 1e-3
    assert change(text=jnp.where(mask[..., None], text, 1e3)) < 1e-5


@pytest.mark.parametrize("kind", WITH_CONTEXT)
def test_time_enters_only_if_asked_for(kind):
    x0, text, mask, t = inputs()
    fixed, timed = network(kind=kind), network(kind=kind, time_dependent=True)
    if isinstance(timed.raw, CrossAttention):
        block = timed.raw.blocks[0].modulation
    elif kind == "joint":
        block = timed.raw.blocks[0].picture.modulation
    else:
        block = None
    if block is not None:  # adaLN starts at zero: give it weights
        block.kernel[...] = jax.random.normal(jax.random.key(0), block.kernel.shape)

    def change(model):
        both = (run(model, x0, text, mask, times, noise=x0, low=x0) for times in (t, t + 5))
        return float(jnp.abs(next(both) - next(both)).max())

    assert (change(fixed) > 0) == KINDS[kind].moves == fixed.config.moves
    assert change(timed) > 1e-4 and timed.config.moves


def test_two_ends_are_joined_by_a_straight_line_and_a_source_is_a_gaussian():
    x0, text, mask, _ = inputs()
    ends = network(kind="two_ends", max_gain=0.7)
    ends.gamma[...] = jnp.array([0.5, -2.0])
    at = [run(ends, x0, text, mask, jnp.full(2, t)) for t in (0.0, 1000.0, 250.0)]
    for r, gain in zip(at, jnp.abs(ends.gain), strict=False):
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(r**2, axis=(1, 2, 3))), gain, rtol=1e-5)
    np.testing.assert_allclose(at[2], 0.75 * at[0] + 0.25 * at[1], atol=1e-6)

    source = network(kind="gaussian_source", max_gain=0.7)
    noise = jnp.sin(jnp.arange(x0.size)).reshape(x0.shape)
    mean, one, there = (
        run(source, x0, text, mask, noise=e) for e in (jnp.zeros_like(x0), jnp.ones_like(x0), noise)
    )
    np.testing.assert_allclose(there, mean + (one - mean) * noise, atol=1e-6)
    log_sigma = jnp.log1p(one - mean)
    for part in (mean, log_sigma):
        rms = jnp.sqrt(jnp.mean(part**2, axis=(1, 2, 3)))
        np.testing.assert_allclose(rms, 0.7 * np.tanh(0.5), rtol=1e-5)


def test_kind_none_is_zero_without_parameters():
    model, (x0, text, mask, t) = network(kind="none"), inputs()
    assert (model(x0, text, mask, t) == 0).all() and float(model.gain) == 0
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))


def test_a_new_kind_is_one_class_and_one_line(monkeypatch):
    class Brightness(Kind):
        """Each patch's mean, everywhere."""

        def __init__(self, config, **policy):
            self.width = config.width

        def __call__(self, tokens, position, text, mask, temb):
            return jnp.broadcast_to(tokens.mean(-1, keepdims=True), (*tokens.shape[:2], self.width))

    monkeypatch.setitem(KINDS, "brightness", Brightness)
    model, (x0, text, mask, t) = network(kind="brightness"), inputs()
    context = model(x0, text, mask, t)
    chex.assert_shape(context, x0.shape)
    assert float(jnp.abs(context - model(jnp.cos(3 * x0), text, mask, t)).max()) > 1e-3
    with pytest.raises(ValueError, match="context.kind='foo'.*brightness"):
        dataclasses.replace(CONFIG, kind="foo")
    VideoContext(model, rngs=nnx.Rngs(0))(x0[:, None], text, mask, t)


@pytest.mark.parametrize("kind", ["text", "none"])
def test_tokens_of_clip_need_a_kind_that_reads_the_picture(kind):
    with pytest.raises(ValueError, match="a context.kind that reads x0"):
        dataclasses.replace(CONFIG, kind=kind, tokens="clip", clip="x")


def test_gradients_are_finite_on_an_empty_picture():
    model, (x0, text, mask, t) = network(), inputs()
    graph, state = nnx.split(model)
    cube = jax.jit(lambda s: jnp.sum(nnx.merge(graph, s)(0 * x0, text, mask, t) ** 3))
    grads = jax.grad(cube)(state)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_compact_bilinear_keeps_products_of_inner_products():
    rng = np.random.default_rng(1)
    a, b, c, d = (jnp.asarray(rng.normal(size=8), jnp.float32) for _ in range(4))
    # Exact as the width grows: E<phi(a, b), phi(c, d)> = <a, c><b, d>, variance ~ 1 / width.
    got = float(compact_bilinear(a, b, 1 << 16) @ compact_bilinear(c, d, 1 << 16))
    np.testing.assert_allclose(got, float((a @ c) * (b @ d)), atol=0.5)
    assert abs(float((a @ c) * (b @ d))) > 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "affine", "tokens": "clip", "clip": "x"}, "context.tokens='clip'.*affine"),
        ({"kind": "foo"}, "context.kind='foo'.*cross_attention"),
        ({"max_gain": -1.0}, "context.max_gain=-1.0"),
        ({"width": 10}, "context.width=10"),
        ({"patch_size": 0}, "context.patch_size=0"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_picture_that_patches_do_not_fit_is_refused():
    _, text, mask, t = inputs()
    with pytest.raises(ValueError, match="context.patch_size=4.*6 x 8"):
        network()(jnp.zeros((2, 6, 8, 3)), text, mask, t)


def test_text_states_do_not_depend_on_the_amount_of_padding():
    encoder = TextEncoder(
        TextConfig(vocab_size=20, max_length=9, width=16, num_layers=2, num_heads=2),
        rngs=nnx.Rngs(0),
    )
    nnx.update(encoder, randomised(nnx.state(encoder)))
    ids = jnp.array([[1, 5, 7, 2]])
    short = run(encoder, ids, jnp.ones((1, 4), bool))
    long = run(encoder, jnp.pad(ids, ((0, 0), (0, 5))), jnp.arange(9)[None] < 4)
    np.testing.assert_allclose(short, long[:, :4], atol=1e-5)
    assert (
        float(
            jnp.abs(short - run(encoder, ids.at[0, 1].set(6), jnp.ones((1, 4), bool)))[:, 3].max()
        )
        > 1e-4
    )


def test_the_text_encoder_starts_as_a_lookup_of_its_words():
    """A changed word changes its own state, by about its norm, and no other word's."""
    encoder = TextEncoder(
        TextConfig(vocab_size=50, max_length=8, width=32, num_layers=2, num_heads=4),
        rngs=nnx.Rngs(0),
    )
    mask = jnp.ones((2, 8), bool)
    states = np.asarray(
        run(encoder, jnp.array([[1, 7, 8, 9, 10, 11, 12, 2], [1, 7, 8, 9, 10, 11, 13, 2]]), mask)
    )
    changed = np.linalg.norm(states[0] - states[1], axis=-1)
    assert changed[6] > 0.7 * np.linalg.norm(states[0, 6])
    assert not np.delete(changed, 6).any()
