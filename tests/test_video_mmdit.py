"""The transformer for clips: it starts as the image network, and edits as the UNet does."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mmdit_dict, one_line, random_params
from edit_settings import edit_settings
from flax import nnx

from contextdiff_jax.configs.edit_shapes import video_sections
from contextdiff_jax.data.moving_shapes import frames_of as pictures_of
from contextdiff_jax.data.moving_shapes import make_moving_shape
from contextdiff_jax.editing.attention import align
from contextdiff_jax.editing.edits import sample_edits
from contextdiff_jax.editing.end_to_end import run_edit
from contextdiff_jax.editing.inversion import invert, reconstruct
from contextdiff_jax.editing.output import save_frames
from contextdiff_jax.editing.settings import parse_edit
from contextdiff_jax.editing.tuning import trainable, tuning_loss
from contextdiff_jax.editing.video_model import open_editor
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.video import inflate
from contextdiff_jax.models.video_mmdit import Clip, FrameAttention
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import parse

B, F, L = 2, 4, 5
predict = nnx.jit(lambda model, x, t, *text: model.predict(x, t, Captions(*text)))


def awake(module, scale=0.3, seed=0):
    """Every parameter away from its start, so that no branch is silent."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        leaf.set_value(leaf.get_value() + scale * noise)


@pytest.fixture(scope="module")
def networks():
    """(image model, its inflation, which has the same weights): two stacked layers with a second
    attention, then the last; and a context head.
    """
    changes = {"model.dual_attention_layers": (0, 1), "context.estimate": "posterior_mean"}
    settings = parse(mmdit_dict(**changes))
    params = random_params(settings)
    image, copy = (build_model(model_graph(settings), params) for _ in range(2))
    return image, inflate(copy.backbone, copy.context)


def inputs(frames=F):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((B, frames, 8, 12, 3)).astype(np.float32)
    text = rng.standard_normal((B, L, 16)).astype(np.float32)
    mask = np.arange(L) < np.array([[3], [5]])
    return jnp.asarray(x), jnp.array([3.5, 900.0]), jnp.asarray(text), jnp.asarray(mask)


def test_a_clip_of_one_frame_is_the_picture_to_the_bit_and_equal_frames_are_to_rounding(networks):
    image, video = networks
    x, t, text, mask = inputs(1)
    pictures = predict(image, x[:, 0], t, text, mask)
    one, four = (predict(video, jnp.repeat(x, n, axis=1), t, text, mask) for n in (1, F))
    for expected, same, near in zip(pictures, one, four, strict=True):
        assert np.std(expected) > 0.1
        np.testing.assert_array_equal(same[:, 0], expected)
        for frame in range(F):
            np.testing.assert_allclose(near[:, frame], expected, atol=2e-5 * np.abs(expected).max())


def test_frames_see_none_that_comes_later_before_the_temporal_layers_are_trained(networks):
    _, video = networks
    x, t, text, mask = inputs()

    def seen_by(video, changed):
        before, after = (
            predict(video, y, t, text, mask)[0] for y in (x, x.at[:, changed].add(1.0))
        )
        return list(np.flatnonzero(np.abs(after - before).max(axis=(0, 2, 3, 4)) > 1e-5))

    assert seen_by(video, 0) == [0, 1, 2, 3] and seen_by(video, 2) == [2, 3]
    trained = nnx.clone(video)
    for stack in trained.backbone.image.stacks:
        awake(stack.layers.temporal)
    assert seen_by(trained, 3) == [0, 1, 2, 3]


def test_clips_of_a_batch_know_nothing_of_each_other(networks):
    video = nnx.clone(networks[1])
    for stack in video.backbone.image.stacks:
        awake(stack.layers.temporal)
    x, t, text, mask = inputs()
    together = predict(video, x, t, text, mask)
    for i in range(B):
        own = slice(i, i + 1)
        alone = predict(video, x[own], t[own], text[own], mask[own])
        for several, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(several[own], one, atol=2e-5 * np.abs(one).max())


class Same:
    """A control that changes nothing, and watches the first word."""

    def changed(self, weights):
        return weights, weights[..., 0].mean(1)

    def changes_frames(self, tokens):
        return True

    def sparse_causal(self, weights, grid):
        return weights

    def collect(self, looks, grid):
        self.looks = looks, grid


def test_a_frame_finds_its_own_the_first_and_the_previous_one_a_third_each_and_its_text():
    rng = np.random.default_rng(0)
    N, H, D = 6, 2, 4
    picture, text = (
        tuple(jnp.asarray(rng.standard_normal((F * B, n, H, D)), jnp.float32) for _ in range(3))
        for n in (N, L)
    )
    mask = jnp.tile(inputs()[3], (F, 1))  # the first frame of every clip comes first
    found = []
    for control in (None, Same()):
        by = FrameAttention(Clip(B, (2, 3), control), mask, "auto")
        heads = [tuple(jnp.swapaxes(a, 1, 2) for a in each) for each in (picture, text)]
        heads = [(q * D**-0.5, k, v) for q, k, v in heads]  # as the projections give them
        got = jax.jit(lambda *heads, by=by: (*by.joint(*heads, both=True), by.alone(*heads[0])))(
            *heads
        )
        found.append([jnp.swapaxes(a, 1, 2) for a in got])
    for plain, controlled in zip(*found, strict=True):
        np.testing.assert_allclose(controlled, plain, atol=1e-5)

    def attend(q, k, v, share):
        weights = np.exp(np.einsum("nhd,mhd->hnm", q, k) / D**0.5) * share
        return np.einsum("hnm,mhd->nhd", weights / weights.sum(-1, keepdims=True), v)

    q, k, v = (np.asarray(a, np.float64).reshape(F, B, N, H, D) for a in picture)
    q_text, k_text, v_text = (np.asarray(a, np.float64).reshape(F, B, L, H, D) for a in text)
    for f, b in np.ndindex(F, B):
        frames = [f, 0, max(f - 1, 0)]
        seen = [np.concatenate([a[i, b] for i in frames]) for a in (k, v)]
        counts = np.asarray(mask)[b].astype(float)
        share = np.concatenate([np.full(3 * N, 1 / 3), counts])
        both = [np.concatenate([s, a[f, b]]) for s, a in zip(seen, (k_text, v_text), strict=True)]
        joint, read, alone = (a[f * B + b] for a in found[0])
        np.testing.assert_allclose(joint, attend(q[f, b], *both, share), atol=1e-5)
        np.testing.assert_allclose(alone, attend(q[f, b], *seen, 1.0), atol=1e-5)
        own = [np.concatenate([a[f, b], c[f, b]]) for a, c in ((k, k_text), (v, v_text))]
        share = np.concatenate([np.ones(N), counts])
        np.testing.assert_allclose(read, attend(q_text[f, b], *own, share), atol=1e-5)


def test_the_control_sees_each_layer_of_a_scan_and_its_answer_is_used(networks):
    _, video = networks
    x, t, text, mask = inputs()

    class Uniform(Same):
        """As far as `share` says, all words are looked at alike."""

        def __init__(self, share):
            self.share = share

        def changed(self, weights):
            assert weights.shape == (B, 2, F, 6, L)
            total = weights.sum(-1, keepdims=True)
            weights = (1 - self.share) * weights + self.share * total / L
            return weights, weights[..., 0].mean(1) / total[..., 0].mean(1)

    @nnx.jit
    def watched(model, share):
        control = Uniform(share)
        out = model.predict(x, t, Captions(text, mask), control)
        return out, control.looks[0]

    plain = predict(video, x, t, text, mask)
    (same, looks), (other, even) = (watched(video, share) for share in (0.0, 1.0))
    for a, b, c in zip(plain, same, other, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())
        assert np.abs(c - a).max() > 1e-2
    assert looks.shape == (B, F, 6) and np.ptp(looks) > 1e-3
    np.testing.assert_allclose(even, 1 / L, rtol=1e-5)  # the mean over all three layers


EDIT = {
    "edit.steps": 3,
    "edit.inversion": "exact",
    "edit.tolerance": 1e-5,
    "edit.control": "refine",
    "edit.blend": "changed",
    "edit.blend_range": (0.0, 1.0),
    "edit.blend_threshold": 0.9,
    "edit.guidance": 4.0,
    "edit.reweight": (("blue", 2.0),),
}


@pytest.fixture(scope="module")
def editor():
    """That of a velocity on the straight path, as `configs/shapes_mmdit.py` trains it."""
    editor = open_editor(edit_settings("mmdit", **{"model.num_layers": 2}))
    awake(editor.model, 0.1)
    return editor


@functools.cache
def program(editor):
    """(path, reconstruction, edited clips) of (x0, the scale of the temporal layers' weights)."""
    settings = edit_settings("mmdit", **EDIT)
    video, edit, process = settings.video, settings.edit, editor.process
    text = editor.encode_text([video.prompt, *video.edit_prompts])
    null = editor.encode_text([""])
    found = align(video.prompt, video.edit_prompts, editor.count_tokens, editor.text_length, edit)
    graph, temporal, rest = nnx.split(
        editor.model, lambda path, _: "temporal" in path and path[0] != "context", ...
    )

    @jax.jit
    def run(x0, over_time):
        model = nnx.merge(graph, jax.tree.map(lambda a: over_time * a, temporal), rest)
        source = jax.tree.map(lambda a: a[:1], text)
        path = invert(model, process, x0, source, video, edit)
        again = reconstruct(model, process, path[-1], source, video, edit)
        return path, again, sample_edits(model, process, path, text, null, found, video, edit)[0]

    return run


def test_a_clip_on_the_straight_path_is_inverted_given_back_and_edited(editor):
    clip = pictures_of(make_moving_shape(0, 2).scenes, 16)
    path, again, clips = program(editor)(editor.encode(clip), 1.0)
    assert path.shape == (4, 1, 2, 16, 16, 3)
    assert np.abs(again - path[0]).mean() < 1e-3
    np.testing.assert_array_equal(clips[0], path[0, 0])
    # the second asks for the source, and guidance leads away from the source's own prompt
    assert np.abs(clips[2] - path[0, 0]).mean() < 1e-3
    same = np.abs(clips[1] - path[0, 0]).max(-1) < 1e-6
    assert 0.02 < same.mean() < 0.98  # outside of the mask the clip stays, to the bit
    assert np.abs(clips[1] - clips[0]).max() > 1e-2


def test_frames_that_are_equal_stay_equal(editor):
    clip = pictures_of(make_moving_shape(0, 1).scenes, 16).repeat(2, axis=0)
    path, again, clips = program(editor)(editor.encode(clip), 0.0)
    for frames in (path[-1, 0], again[0], clips[1]):
        np.testing.assert_allclose(frames[0], frames[1], atol=1e-4)
    assert np.abs(clips[1] - clips[0]).max() > 1e-2


def test_tuning_reaches_what_is_chosen_and_at_gain_zero_it_is_plain_diffusions(editor):
    settings = edit_settings("mmdit", **{"train.batch_size": 1, "video.num_frames": 2})
    graph, params, frozen = nnx.split(editor.model, trainable("temporal"), ...)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert not any("text/attn" in name for name in names if not name.startswith("context"))
    assert any(name.endswith("block/picture/attn/to_q/kernel") for name in names)
    assert any("layers/temporal/attention/to_v" in name for name in names)
    clip = editor.encode(pictures_of(make_moving_shape(0, 2).scenes, 16))
    text, null = editor.encode_text(["a red circle"]), editor.encode_text([""])
    plain = type(editor.process)(**vars(editor.process) | {"shift": "none"})

    @jax.jit
    def losses(params, gain):
        params = jax.tree.map(lambda a: a, params)
        params["context"]["image"]["gamma"][...] = gain * params["context"]["image"]["gamma"][...]

        def loss(params, process):
            model = nnx.merge(graph, params, frozen)
            rest = clip, text, null, jax.random.key(0), settings.base.train, 0
            return tuning_loss(model, process, *rest)

        return jax.value_and_grad(loss)(params, editor.process), loss(params, plain)

    (loss, grads), other = losses(params, 1.0)
    assert np.abs(loss - other) > 1e-5
    assert all(g[...].any() for path, g in nnx.to_flat_state(grads) if path[0] != "context")
    assert grads["context"]["image"]["gamma"][...] != 0
    (loss, _), other = losses(params, 0.0)
    np.testing.assert_allclose(loss, other, rtol=1e-6)


def test_a_context_that_shapes_the_noise_is_refused_in_one_line():
    changes = {"context.kind": "gaussian_source", "context.shift": "prior"}
    with pytest.raises(ValueError, match="gaussian_source.*transfer_context=False") as error:
        open_editor(edit_settings("mmdit", **{"model.num_layers": 1} | changes))
    one_line(error)


@pytest.mark.slow  # compiles seven programs: pytest -m slow tests/test_video_mmdit.py
def test_a_clip_is_edited_end_to_end(tmp_path):
    save_frames(pictures_of(make_moving_shape(0, 2).scenes, 16), tmp_path / "clip")
    changes = {"train.batch_size": 1, "train.steps": 4, "train.checkpoint_every": 2}
    config = mmdit_dict(**changes) | video_sections()
    config["video"] |= dict(
        path=str(tmp_path / "clip"),
        prompt="a red circle",
        edit_prompts=("a blue circle", "a red square"),
        num_frames=2,
        remat=True,
    )
    config["edit"] |= {name.removeprefix("edit."): value for name, value in EDIT.items()}
    config = json.loads(json.dumps(config))
    metrics = run_edit(parse_edit(config), config, tmp_path / "edit")
    assert metrics["reconstruction"]["x0_error"] < 1e-3
    assert len(list((tmp_path / "edit/edits/01").glob("*.png"))) == 2
    again = run_edit(parse_edit(config), config, tmp_path / "edit")  # its tuning is taken up
    assert again["reconstruction"]["psnr"] == metrics["reconstruction"]["psnr"]


@pytest.mark.slow  # two gradients: pytest -m slow tests/test_video_mmdit.py
def test_recomputed_layers_have_the_same_gradient():
    settings = parse(mmdit_dict())
    params, (x, t, text, mask) = random_params(settings), inputs()
    gradients = []
    for remat in (False, True):
        image = build_model(model_graph(settings), params)
        graph, state = nnx.split(inflate(image.backbone, image.context, remat=remat))

        def loss(state, graph=graph):
            return jnp.square(nnx.merge(graph, state).predict(x, t, Captions(text, mask))).mean()

        gradients.append(jax.jit(jax.grad(loss))(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *gradients)


FLOW = {"diffusion.schedule": "flow", "diffusion.prediction_type": "velocity"}


@pytest.mark.slow  # traces of eight pairs: pytest -m slow tests/test_video_mmdit.py
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion.schedule": "cosine", "diffusion.prediction_type": "v"},
        {"diffusion.schedule": "flow", "diffusion.prediction_type": "x0"},
        {**FLOW, "context.estimate": "posterior_mean"},
        {**FLOW, "context.estimate": "velocity"},
        {**FLOW, "context.kind": "text", "context.shift": "prior"},
        {**FLOW, "context.kind": "two_ends", "context.shift": "constant"},
        {**FLOW, "context.kind": "none", "context.shift": "none"},
        {**FLOW, "diffusion.schedule": "edm", "context.estimate": "velocity"}
        | {"context.shift": "data_normalization", "context.kind": "text"},
    ],
    ids=str,
)
def test_every_estimate_on_every_schedule_is_tuned_and_inverted(kind, changes):
    changes = {"context.estimate": "plugin"} | changes
    settings = edit_settings(kind, **{"edit.steps": 2, "train.batch_size": 2} | changes)
    editor = open_editor(settings)
    graph, state = nnx.split(editor.model)
    text, null = editor.encode_text(["a red circle"]), editor.encode_text([""])
    x0 = jnp.zeros((1, 2, 16, 16, 3))

    def both(state):
        model = nnx.merge(graph, state)
        path = invert(model, editor.process, x0, text, settings.video, settings.edit)
        rest = x0, text, null, jax.random.key(0), settings.base.train, 0
        return path, tuning_loss(model, editor.process, *rest)

    path, loss = jax.eval_shape(both, state)
    assert path.shape == (3, 1, 2, 16, 16, 3) and loss.shape == ()
