"""Several edits, strengths and seeds in one batch, each as it is alone; and words that are kept."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edit_settings import edit_settings
from flax import nnx

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion import Denoised
from contextdiff_jax.editing import edits as movers
from contextdiff_jax.editing import strength
from contextdiff_jax.editing.attention import Alignment, align
from contextdiff_jax.editing.edits import MOVERS, for_each_seed
from contextdiff_jax.editing.end_to_end import Programs, edit_clip
from contextdiff_jax.editing.settings import EditConfig, VideoConfig
from contextdiff_jax.editing.video_model import open_editor
from contextdiff_jax.models.captions import Captions

PROCESS = diffusion.Process(
    schedule=diffusion.make_schedule("cosine", 100), prediction_type="x0", shift="none"
)
L = 4  # the prompts' tokens: the start, and three words
X0 = np.random.default_rng(0).standard_normal((1, 2, 4, 4, 3)).astype(np.float32)


class Model(nnx.Module):
    """Without context."""

    def context(self, z, *_):
        return jnp.zeros_like(z)


@pytest.fixture
def synthetic(monkeypatch):
    """A denoiser that pulls each row to its text's number, and attends to words by brightness."""

    def make_denoise(model, process, text, null=None, *, control=None, **_):
        wanted = text.tokens[:, 0, 0].reshape(-1, 1, 1, 1, 1)

        def denoise(x, t, s):
            if control is not None:
                looks = x.mean(-1).reshape(len(x), 1, 2, -1, 1) * jnp.arange(1.0, L + 1)
                control.cross(jax.nn.softmax(looks, -1), (4, 4))
            return Denoised(0.3 * x + wanted, jnp.zeros_like(x), jnp.zeros_like(x))

        return denoise

    monkeypatch.setattr(movers, "make_denoise", make_denoise)
    monkeypatch.setattr("contextdiff_jax.editing.inversion.make_denoise", make_denoise)
    monkeypatch.setattr(strength, "make_denoise", make_denoise)


def move(prompts, edit, seed=0):
    """(clips, maps) of the numbers in `prompts`, the first the source's, by a drawn alignment."""
    E = len(prompts) - 1
    video = VideoConfig(prompt="a", edit_prompts=("b",) * E)
    text = Captions(jnp.full((1 + E, L, 4), jnp.asarray(prompts)[:, None, None]), jnp.ones((1, L)))
    watched = np.broadcast_to(np.eye(L, dtype=np.float32)[[1, 2, 3]][:, None], (3, E, L))
    alignment = Alignment(np.zeros((E, L, L)), np.zeros((E, L)), np.ones((E, L)), watched)
    mover, model = MOVERS[edit.method], Model()

    def both(key):
        source = jax.tree.map(lambda a: a[:1], text)
        path = mover.make_path(key, model, PROCESS, X0, source, video, edit)
        return mover.move(key, model, PROCESS, path, text, text, alignment, video, edit)

    return jax.jit(lambda: for_each_seed(both, edit.seeds))()


@pytest.mark.parametrize("method", MOVERS)
@pytest.mark.parametrize("blend", ["", "difference", "b"])
def test_each_edit_of_a_batch_is_the_one_of_its_strength_alone(synthetic, method, blend):
    common = dict(method=method, steps=10, blend=blend, keep=("a",), keep_threshold=0.9)
    clips, maps = move([0.1, 0.5, -0.4], EditConfig(strength=(0.4, 0.9), **common))
    for i, (number, share) in enumerate(((0.5, 0.4), (-0.4, 0.9))):
        alone, own = move([0.1, number], EditConfig(strength=(share,), **common))
        np.testing.assert_array_equal(clips[0, 1 + i], alone[0, 1])
        np.testing.assert_array_equal(maps[0, i::2], own[0])
        assert np.abs(alone[0, 1] - X0[0]).max() > 0.1
    np.testing.assert_array_equal(clips[0, 0], X0[0])


def test_ranges_are_of_the_steps_that_are_made():
    edit = EditConfig(steps=100, strength=(1.0, 0.5), cross_range=(0.0, 0.5))
    rows = movers._plan(PROCESS.schedule, edit, 2)  # 100 times, of which the first is the clip's
    assert rows.started.sum(0).tolist() == [99, 50] and rows.started[0].tolist() == [1, 0]
    assert rows.cross_on.sum(0).tolist() == [50, 25] and rows.cross_on[49].tolist() == [1, 1]
    assert (rows.cross_on <= rows.started).all()


@pytest.mark.parametrize("method", ["sdedit", "flowedit"])
def test_each_seed_of_a_batch_is_the_one_alone(synthetic, method):
    common = dict(method=method, steps=5, blend="difference", blend_threshold=0.9)
    clips, _ = move([0.1, 0.5], EditConfig(seeds=(7, 2**32), **common))
    for i, seed in enumerate((7, 2**32)):
        alone, _ = move([0.1, 0.5], EditConfig(seeds=(seed,), **common))
        np.testing.assert_array_equal(clips[i], alone[0])
    if method == "sdedit":  # the other's noise cancels where the estimates are linear in x
        assert np.abs(clips[0] - clips[1]).max() > 1e-3


def test_where_kept_words_are_looked_at_the_clip_stays_to_the_bit(synthetic):
    for blend in ("", "difference", "b"):
        edit = EditConfig(steps=5, blend=blend, keep=("a",), keep_threshold=0.9)
        clips, maps = move([0.1, 0.5], edit)
        kept = maps[0, 2] > 0.9 * maps[0, 2].max()
        assert 0 < kept.mean() < 1
        np.testing.assert_array_equal(clips[0, 1][kept], X0[0][kept])
        changed = np.abs(clips[0, 1] - X0[0]).max(-1) > 1e-3
        assert changed[~kept].mean() > 0.1


def test_a_clip_fits_the_prompt_by_which_the_model_errs_less(synthetic):
    settings = edit_settings(**{"video.window": 2, "video.overlap": 1})
    clips = np.random.default_rng(1).standard_normal((3, 3, 4, 4, 3)).astype(np.float32)
    numbers = jnp.asarray([0.1, 0.5])[:, None, None]
    prompts = Captions(jnp.broadcast_to(numbers, (2, L, 4)), jnp.ones((2, L)))
    graph, state = nnx.split(Model())
    found = jax.jit(strength.make_fits(graph, PROCESS, settings))(state, clips, prompts)
    wanted = 0
    for i, share in enumerate(strength.TIMES):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), clips.shape[1:])
        t = PROCESS.schedule.time_of_share(jnp.float32(share))
        a, b = jnp.sqrt(PROCESS.schedule.alpha_bar(t)), PROCESS.schedule.sigma(t)
        x = a * clips + b * noise
        d, c = (((0.3 * x + n - clips) ** 2).mean((1, 2, 3, 4)) for n in (0.1, 0.5))
        wanted += 2 * (d - c) / (d + c) / len(strength.TIMES)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-6)


def test_the_least_strength_that_fits_enough_is_chosen_or_the_best():
    fits = np.array([-0.2, 0.1, 0.3, 0.25, 0.4, 0.2])
    enough, best = strength.choose(0.25, fits), strength.choose(0.5, fits)
    assert (enough["strength"], enough["reached"]) == (0.7, True)
    assert (best["strength"], best["reached"]) == (0.9, False)
    assert enough["fits"]["0.3"] == -0.2 and best["fit_of_the_clip"] == 0.5


def test_an_edit_of_automatic_strength_is_the_one_of_the_strength_that_is_chosen(synthetic):
    numbers = {"a": 0.1, "b": 0.5, "c": -1.5, "": 0.0}
    clip = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)

    def encode_text(prompts):
        values = jnp.asarray([numbers[prompt] for prompt in prompts])[:, None, None]
        return Captions(jnp.broadcast_to(values, (len(prompts), L, 4)), jnp.ones((len(prompts), L)))

    editor = SimpleNamespace(
        process=PROCESS,
        encode_text=encode_text,
        count_tokens=lambda word: 1,
        text_length=L,
        decode=lambda x: np.uint8(np.clip(127 + 60 * x[0], 0, 255)),
    )

    def edited(at):
        changes = {"video.prompt": "a", "video.edit_prompts": ("b", "c"), "edit.steps": 10}
        drawn = {"edit.method": "flowedit", "edit.seeds": (1, 2), "edit.strength": at}
        settings = edit_settings(**changes, **drawn)
        return edit_clip(editor, Model(), clip, X0, settings, Programs())

    found = edited(("auto",))
    assert [choice["prompt"] for choice in found.choices] == ["b", "c"]
    alone = edited(tuple(choice["strength"] for choice in found.choices))
    assert found.outputs == alone.outputs and not alone.choices
    for one, other in zip(found.clips, alone.clips, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.maps, alone.maps)


@pytest.mark.slow  # compiles five programs: pytest -m slow tests/test_edit_batches.py
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_a_network_s_edits_of_two_strengths_are_those_of_one_each(kind):
    options = {"edit.control": "refine", "edit.blend": "changed", "edit.keep": ("circle",)}
    editor = open_editor(edit_settings(kind, **options))
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(
        nnx.state(editor.model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        noise = rng.standard_normal(leaf.get_value().shape).astype(np.float32)
        leaf.set_value(leaf.get_value() + 0.1 * noise)
    graph, state = nnx.split(editor.model)
    x0 = editor.encode(rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8))
    prompts = ("a blue circle", "a red square")

    def edited(prompts, shares, method="inversion", seeds=(0,)):
        own = {"edit.method": method, "edit.strength": shares, "edit.seeds": seeds}
        settings = edit_settings(kind, **options | own | {"video.edit_prompts": prompts})
        video, edit = settings.video, settings.edit
        counts = editor.count_tokens, editor.text_length
        found = align(video.prompt, prompts, *counts, edit)
        text, null = editor.encode_text([video.prompt, *prompts]), editor.encode_text([""])

        def run(state, x0):
            model, mover = nnx.merge(graph, state), MOVERS[edit.method]
            source, rest = jax.tree.map(lambda a: a[:1], text), (text, null, found, video, edit)

            def one(key):
                path = mover.make_path(key, model, editor.process, x0, source, video, edit)
                return mover.move(key, model, editor.process, path, *rest)[0]

            return for_each_seed(one, edit.seeds)

        return jax.jit(run)(state, x0)

    both = edited(prompts, (0.4, 0.8))
    for i, share in enumerate((0.4, 0.8)):
        alone = edited(prompts[i : i + 1], (share,))
        # a network may round a row differently in a larger batch; all else is equal to the bit
        np.testing.assert_allclose(both[0, 1 + i], alone[0, 1], atol=1e-4)
    seeds = edited(prompts, (0.8,), "flowedit", (3, 4))
    alone = edited(prompts, (0.8,), "flowedit", (4,))
    np.testing.assert_allclose(seeds[1], alone[0], atol=1e-4)
