"""Video networks: an inflated one is the image network frame by frame, until it is trained."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALLEST, config_dict
from flax import nnx

from contextdiff_jax.models.captions import Captions, pool
from contextdiff_jax.models.video import inflate
from contextdiff_jax.runs.model import make_model
from contextdiff_jax.settings import parse

B, F, L = 2, 3, 5
POOLED_TEXT_AND_SIZE = {  # read by the UNet, as XL's
    "model.addition_embed_type": "text_time",
    "model.addition_time_embed_dim": 4,
    "model.projection_class_embeddings_input_dim": 16 + 6 * 4,
}
predict = nnx.jit(lambda model, x, t, *text: model.predict(x, t, Captions(*text)))
context = nnx.jit(lambda model, *arguments: model.context(*arguments))


def noisy(module: nnx.Module, seed: int = 0) -> None:
    """Every parameter away from its start, so that no branch is silent."""
    rng = np.random.default_rng(seed)
    for leaf in jax.tree.leaves(
        nnx.state(module, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        leaf.set_value(
            leaf.get_value() + 0.3 * rng.standard_normal(leaf.get_value().shape).astype(np.float32)
        )


def networks(remat: bool = False, **changes):
    """(image model, its inflation), equal weights."""
    image = make_model(parse(config_dict(**SMALLEST | changes)))
    noisy(image)
    copy = nnx.clone(image)
    return image, inflate(copy.unet, copy.context, remat=remat)


def inputs(frames: int = F, size: tuple[int, int] = (8, 12)):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((B, frames, *size, 3)).astype(np.float32)
    text = rng.standard_normal((B, L, 16)).astype(np.float32)
    mask = np.arange(L) < np.array([[3], [5]])
    return jnp.asarray(x), jnp.array([3, 40]), jnp.asarray(text), jnp.asarray(mask)


@pytest.mark.parametrize(
    "changes",
    [{"context.estimate": "plugin"}, {"context.estimate": "posterior_mean"}, POOLED_TEXT_AND_SIZE],
    ids=["plugin", "posterior_mean", "pooled text and size"],
)
def test_a_video_of_one_frame_is_the_picture_to_the_bit(changes):
    image, video = networks(**changes)
    x, t, text, mask = inputs(frames=1)
    expected = predict(image, x[:, 0], t, text, mask)
    actual = predict(video, x, t, text, mask)
    for theirs, ours in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert np.std(theirs) > 0.1
        np.testing.assert_array_equal(ours[:, 0], theirs)
    np.testing.assert_array_equal(
        context(video, x, text, mask, t)[:, 0], context(image, x[:, 0], text, mask, t)
    )


def test_equal_frames_are_denoised_as_the_picture_is():
    """Keys of the first and of the previous frame are then the frame's own, twice."""
    image, video = networks()
    x, t, text, mask = inputs(frames=1)
    actual = predict(video, jnp.repeat(x, F, axis=1), t, text, mask)
    picture = predict(image, x[:, 0], t, text, mask)
    expected = np.repeat(np.asarray(picture)[:, None], F, axis=1)
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_frames_see_none_that_comes_later_before_the_temporal_layers_are_trained():
    _, video = networks()
    x, t, text, mask = inputs(frames=4)
    before = predict(video, x, t, text, mask)
    for changed, seen_by in ((0, [0, 1, 2, 3]), (2, [2, 3])):
        after = predict(video, x.at[:, changed].add(1.0), t, text, mask)
        differs = np.abs(after - before).max(axis=(0, 2, 3, 4)) > 1e-6
        assert list(np.flatnonzero(differs)) == seen_by


def test_trained_temporal_layers_look_at_later_frames_too():
    _, video = networks()
    noisy(video, seed=5)
    x, t, text, mask = inputs()
    change = predict(video, x.at[:, -1].add(1.0), t, text, mask) - predict(video, x, t, text, mask)
    assert np.abs(change[:, 0]).max() > 1e-3
    r = context(video, x.at[:, -1].add(1.0), text, mask, t) - context(video, x, text, mask, t)
    assert np.abs(r[:, 0]).max() > 1e-4


def test_clips_of_a_batch_know_nothing_of_each_other():
    _, video = networks()
    noisy(video, seed=5)
    x, t, text, mask = inputs()
    together = predict(video, x, t, text, mask), context(video, x, text, mask, t)
    for i in range(B):
        own = slice(i, i + 1)
        alone = (
            predict(video, x[own], t[own], text[own], mask[own]),
            context(video, x[own], text[own], mask[own], t[own]),
        )
        for several, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(several[own], one, atol=2e-5 * np.abs(one).max())


def test_an_affine_context_leaves_the_frames_apart_and_stays_linear_in_each():
    _, video = networks(**{"context.kind": "affine"})
    noisy(video, seed=5)
    x, t, text, mask = inputs()
    other = x.at[:, -1].multiply(-0.5)
    r, changed, between = (
        context(video, clip, text, mask, t) for clip in (x, other, 0.25 * x + 0.75 * other)
    )
    np.testing.assert_array_equal(changed[:, :-1], r[:, :-1])
    assert np.abs(changed[:, -1] - r[:, -1]).max() > 1e-3
    np.testing.assert_allclose(between, 0.25 * r + 0.75 * changed, atol=1e-6)


def test_each_frame_of_a_long_clip_reads_the_mean_of_its_caption():
    """XLA's CPU kernels got it wrong from 17 frames on."""
    rng = np.random.default_rng(0)
    text, mask = rng.standard_normal((1, 8, 32), np.float32), np.arange(8)[None] < 5

    @jax.jit
    def means(text, mask):
        return pool(*(jnp.repeat(a, 24, axis=0) for a in (text, mask)))[:, 0]

    for _ in range(4):  # what was read lay in memory that others had left
        expected = np.broadcast_to(text[0, :5].mean(0), (24, 32))
        np.testing.assert_allclose(means(text, mask), expected, atol=1e-6)


def test_the_control_sees_the_weights_and_its_answer_is_used():
    _, video = networks()
    x, t, text, mask = inputs()
    plain = predict(video, x, t, text, mask)
    seen, most = [], 96

    class Record:
        def cross(self, weights, grid):
            seen.append(("cross", weights.shape, grid))
            return weights

        def changes_frames(self, tokens):
            return tokens <= most

        def sparse_causal(self, weights, grid):
            seen.append(("self", weights.shape, grid))
            return weights

    watched = nnx.jit(lambda m: m.predict(x, t, Captions(text, mask), Record()))(video)
    np.testing.assert_allclose(watched, plain, atol=2e-5 * np.abs(plain).max())
    assert ("cross", (B, 2, F, 96, L), (8, 12)) in seen and (
        "self",
        (F, B, 2, 96, 192),
        (8, 12),
    ) in seen
    seen, most = [], 95  # of that grid no weights are in memory, so that a kernel may take it
    coarse = nnx.jit(lambda m: m.predict(x, t, Captions(text, mask), Record()))(video)
    np.testing.assert_allclose(coarse, plain, atol=2e-5 * np.abs(plain).max())
    assert ("cross", (B, 2, F, 96, L), (8, 12)) in seen
    assert all(name == "cross" or grid != (8, 12) for name, _, grid in seen)

    class Uniform(Record):
        def cross(self, weights, grid):
            return jnp.full_like(weights, 1 / L)

    uniform = nnx.jit(lambda m: m.predict(x, t, Captions(text, mask), Uniform()))(video)
    assert np.abs(uniform - plain).max() > 1e-3


def test_rematerialised_gradients_are_the_plain_ones():
    x, t, text, mask = inputs()
    gradients = []
    for remat in (False, True):
        _, video = networks(remat=remat)
        noisy(video, seed=5)
        graph, state = nnx.split(video)

        def loss(state):
            output = nnx.merge(graph, state).predict(x, t, Captions(text, mask))  # noqa: B023
            return jnp.mean(output**2)

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(state)))
    for plain, again in zip(*gradients, strict=True):
        np.testing.assert_allclose(again, plain, atol=1e-4 * max(1, np.abs(plain).max()))
