"""Inversion, attention control, windows and tuning of the editor, on closed forms and on a tiny
model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_LEVEL, config_dict
from flax import nnx

from configs.edit_shapes import video_sections
from contextdiff_jax import diffusion
from contextdiff_jax.diffusion import Denoised
from contextdiff_jax.editing.attention import Control, align, blend_mask, changed_words
from contextdiff_jax.editing.denoise import window_weights, windowed
from contextdiff_jax.editing.edits import sample_edits
from contextdiff_jax.editing.inversion import edit_timesteps, invert, reconstruct
from contextdiff_jax.editing.settings import EditConfig, parse_edit
from contextdiff_jax.editing.tuning import init_tuning, make_tuning_step, trainable
from contextdiff_jax.editing.video_model import open_editor

SCHEDULE = diffusion.make_schedule("cosine", 100)


def gaussian_denoise(x, t, s):
    """Exact for data N(0, 0.5^2), with a context that is not linear in x0."""
    a, variance = jnp.sqrt(SCHEDULE.alpha_bar(t)), SCHEDULE.variance(t)
    x0 = (a * 0.25 / (a**2 * 0.25 + variance))[:, None] * x
    return Denoised(x0, 0.5 * jnp.sin(3 * x0), 0.5 * jnp.sin(3 * x0 + s[:, None] / 100))


@pytest.mark.parametrize("shift", ["quadratic", "none"])
def test_the_exact_inversion_gives_the_start_back_and_the_explicit_one_does_not(shift):
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)) * 0.5, jnp.float32)
    ascending = np.arange(9, 100, 10)

    def back(x):
        return diffusion.ddim_sample(
            gaussian_denoise,
            x,
            SCHEDULE,
            ascending[::-1],
            shift=shift,
            next_timesteps=np.append(ascending[::-1][1:], 0),
        )

    explicit = diffusion.ddim_invert(gaussian_denoise, x0, SCHEDULE, ascending, shift)
    exact, path = diffusion.ddim_invert(
        gaussian_denoise, x0, SCHEDULE, ascending, shift, iterations=100, tolerance=1e-6, keep=True
    )
    np.testing.assert_allclose(back(exact), x0, atol=1e-4)
    assert np.abs(back(explicit) - x0).mean() > 1e-2
    np.testing.assert_array_equal(path[-1], exact)
    assert path.shape == (10, 3, 8)


def test_the_shift_acts_on_the_inversion():
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)) * 0.5, jnp.float32)
    results = [
        diffusion.ddim_invert(gaussian_denoise, x0, SCHEDULE, np.arange(9, 100, 10), s)
        for s in ("none", "quadratic")
    ]
    assert np.abs(results[0] - results[1]).max() > 1e-2


def count(word: str) -> int:
    return 2 if word == "retriever" else 1


def test_replaced_words_take_the_attention_of_the_word_in_their_place():
    found = align(
        "a grey dog sits", ["a golden retriever sits"], count, 10, EditConfig(control="replace")
    )
    expected = np.zeros((10, 10))
    for source, target, share in (
        (0, 0, 1),
        (1, 1, 1),
        (2, 2, 1),
        (3, 3, 0.5),
        (3, 4, 0.5),
        (4, 5, 1),
    ):
        expected[source, target] = share
    np.testing.assert_array_equal(found.mapper[0], expected)
    assert list(found.keep[0]) == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_refined_words_keep_their_attention_and_the_others_take_the_source_s():
    edit = EditConfig(control="refine", reweight=(("snow", 2.5),), blend="changed")
    found = align(
        "a jeep on a road", ["a jeep on a road with snow", "a red jeep on a road"], count, 10, edit
    )
    assert list(found.keep[0]) == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert list(found.keep[1]) == [1, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    assert found.mapper[1][2, 3] == found.mapper[1][5, 6] == 1  # jeep, road
    assert list(found.gain[0]) == [1, 1, 1, 1, 1, 1, 1, 2.5, 1, 1] and (found.gain[1] == 1).all()
    assert list(np.flatnonzero(found.blended[1])) == [6, 7] and list(
        np.flatnonzero(found.blended[2])
    ) == [2]
    assert changed_words("a porsche car drives", "a silver jeep drives") == [1, 2]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(control="replace"), "has 3 words and the clip's prompt 2"),
        (dict(reweight=(("snow", 2.0),)), "'snow' is in none of the prompts"),
        (dict(blend="dog"), "'dog' is in none of the prompts"),
    ],
)
def test_words_that_cannot_be_aligned_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        align("a jeep", ["a red jeep"], count, 10, EditConfig(**options))


def test_a_prompt_beyond_the_text_encoder_is_one_line():
    with pytest.raises(ValueError, match="'e' lies beyond the text encoder's 6 tokens"):
        align("a b c d e", ["a"], count, 6, EditConfig())


def test_the_control_replaces_rows_of_the_batch_and_nothing_of_the_source():
    rng = np.random.default_rng(0)
    found = align(
        "a b",
        ["a c", "d b"],
        count,
        5,
        EditConfig(control="refine", reweight=(("c", 3.0),), blend="c"),
    )
    # Source, two edits, and the other branch.
    weights = jnp.asarray(rng.random((6, 2, 3, 4, 5)), jnp.float32)
    control = Control(found, jnp.float32(1), jnp.float32(1), 4)
    out = control.cross(weights, (2, 2))
    np.testing.assert_array_equal(out[0], weights[0])
    np.testing.assert_array_equal(out[3:], weights[3:])
    np.testing.assert_allclose(out[1][..., :2], weights[0][..., :2], rtol=1e-6)  # the start and "a"
    # "c": new, and weighed.
    np.testing.assert_allclose(out[1][..., 2], 3 * weights[1][..., 2], rtol=1e-6)
    np.testing.assert_allclose(out[2][..., 2], weights[0][..., 2], rtol=1e-6)  # "b"
    np.testing.assert_allclose(
        control.mean_map((2, 2))[1].reshape(3, 4), 3 * weights[1][..., 2].mean(0), rtol=1e-5
    )
    selves = jnp.asarray(rng.random((6, 3, 2, 4, 8)), jnp.float32)
    out = control.sparse_causal(selves, (2, 2))
    for row, source in enumerate((0, 0, 0, 3, 4, 5)):
        np.testing.assert_array_equal(out[row], selves[source])
    np.testing.assert_array_equal(Control(found, 1.0, 0.0, 4).sparse_causal(selves, (2, 2)), selves)
    np.testing.assert_array_equal(Control(found, 1.0, 1.0, 3).sparse_causal(selves, (2, 2)), selves)
    np.testing.assert_allclose(
        Control(align("a", ["b"], count, 5, EditConfig()), 0.0, 0.0, 0).cross(weights[:2], (2, 2)),
        weights[:2],
        rtol=1e-6,
    )


def test_the_mask_is_that_of_the_source_s_and_of_the_edit_s_words():
    maps = np.zeros((2, 1, 2, 3), np.float32)
    maps[0, 0, 0], maps[1, 0, 1] = [1, 0.2, 0], [0, 0, 4]
    assert blend_mask(jnp.asarray(maps), 0.3)[1, 0, ..., 0].tolist() == [[1, 0, 0], [0, 0, 1]]
    assert blend_mask(jnp.asarray(maps), 0.1)[0, 0, ..., 0].tolist() == [[1, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    "frames, window, overlap, starts",
    [
        (24, 8, 2, [0, 6, 12, 16]),
        (9, 8, 2, [0, 1]),
        (8, 8, 2, [0]),
        (5, 0, 2, [0]),
        (6, 2, 0, [0, 2, 4]),
        (20, 8, 4, [0, 4, 8, 12]),
    ],
)
def test_windows_cover_every_frame_and_their_weights_sum_to_one(frames, window, overlap, starts):
    parts = window_weights(frames, window, overlap)
    assert [part.start for part, _ in parts] == starts
    total = np.zeros(frames)
    for part, weight in parts:
        assert (weight > 0).all()
        total[part] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_a_function_that_sees_each_frame_alone_is_the_same_through_windows():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 11, 3)), jnp.float32)
    function = lambda x, scale: {"a": scale * x, "b": x.sum(-1) ** 2}  # noqa: E731
    for name, value in windowed(function, 11, 4, 2)(x, 3.0).items():
        np.testing.assert_allclose(value, function(x, 3.0)[name], rtol=1e-5)
    assert windowed(function, 4, 4, 2) is function


def edit_settings(**changes):
    """A tiny model's editing config with changes as "section.field": value. The second edit asks
    for the source.
    """
    own = {
        name: value
        for name, value in changes.items()
        if name.split(".")[0] not in ("video", "edit")
    }
    config = config_dict(**ONE_LEVEL | own)
    sections = video_sections()
    sections["video"] |= dict(prompt="a red circle", edit_prompts=("a blue circle", "a red circle"))
    sections["edit"] |= dict(steps=5)
    for name, value in changes.items():
        section, field = name.split(".")
        if section in sections:
            sections[section][field] = value
    return parse_edit(config | sections)


FRAMES = 4


@pytest.fixture(scope="module")
def tiny():
    """(editor, its model with every branch awake, a clip) of a tiny model with context."""
    editor = open_editor(edit_settings())
    rng = np.random.default_rng(0)
    for leaf in jax.tree.leaves(
        nnx.state(editor.model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        leaf.set_value(
            leaf.get_value() + 0.1 * rng.standard_normal(leaf.get_value().shape).astype(np.float32)
        )
    clip = rng.integers(0, 256, (FRAMES, 8, 12, 3)).astype(np.uint8)
    return editor, clip


def program(editor, settings):
    """The function of (state, x0) whose results are (path, reconstruction, edited clips), and its
    state.
    """
    text, null = (
        editor.encode_text([settings.video.prompt, *settings.video.edit_prompts]),
        editor.encode_text([""]),
    )
    found = align(
        settings.video.prompt,
        settings.video.edit_prompts,
        editor.count_tokens,
        editor.text_length,
        settings.edit,
    )
    graph, state = nnx.split(editor.model)

    def run(state, x0):
        model, source = nnx.merge(graph, state), jax.tree.map(lambda a: a[:1], text)
        path = invert(model, editor.process, x0, source, settings.video, settings.edit)
        again = reconstruct(model, editor.process, path[-1], source, settings.video, settings.edit)
        return (
            path,
            again,
            sample_edits(
                model, editor.process, path, text, null, found, settings.video, settings.edit
            )[0],
        )

    return run, state


def edits(editor, clip, settings):
    """The program's results."""
    run, state = program(editor, settings)
    return jax.jit(run)(state, editor.encode(clip))


@pytest.fixture(scope="module")
def plain(tiny):
    return edits(*tiny, edit_settings(**{"edit.inversion": "exact", "edit.guidance": 7.0}))


def test_the_source_row_is_the_clip_and_another_prompt_changes_it(tiny, plain):
    path, again, clips = plain
    np.testing.assert_array_equal(clips[0], path[0, 0])
    assert np.abs(again - path[0]).mean() < 1e-3
    assert np.abs(clips[1] - clips[0]).mean() > 1e-3


def test_an_edit_by_the_source_s_own_prompt_gives_the_source_back_whatever_the_guidance(plain):
    path, _, clips = plain
    assert np.abs(clips[2] - path[0, 0]).mean() < 1e-3


def test_a_window_that_holds_the_clip_changes_nothing(tiny):
    editor, clip = tiny
    traced = []
    for window in (0, FRAMES, FRAMES - 1):
        run, state = program(editor, edit_settings(**{"video.window": window}))
        traced.append(str(jax.make_jaxpr(run)(state, editor.encode(clip))))
    assert traced[0] == traced[1] != traced[2]


def test_control_blending_and_windows_act_together(tiny):
    settings = edit_settings(
        **{
            "edit.control": "refine",
            "edit.blend": "changed",
            "edit.blend_range": (0.0, 1.0),
            "edit.inversion": "exact",
            "edit.guidance": 1.0,
            "video.window": 3,
            "edit.reweight": (("blue", 2.0),),
            "edit.blend_threshold": 0.9,
            "edit.strength": 0.6,
        }
    )
    path, again, clips = edits(*tiny, settings)
    assert (
        path.shape[0] == 1 + 3
        and np.isfinite(clips).all()
        and np.abs(again - path[0]).mean() < 1e-3
    )
    same = np.abs(clips[1:] - path[0]).max(-1) < 1e-6
    assert 0.02 < same.mean() < 0.98  # outside of the mask the clip stays, to the bit


def test_the_shift_changes_inversion_and_sampling_of_the_model(tiny):
    editor, clip = tiny
    assert abs(float(editor.model.context.gain)) > 1e-3
    settings, source = edit_settings(), editor.encode_text(["a red circle"])
    noise = jax.random.normal(jax.random.key(0), (1, *clip.shape))
    results = []
    for shift in ("quadratic", "none"):
        process = dataclasses.replace(editor.process, shift=shift)
        arguments = source, settings.video, settings.edit
        for function, x in ((invert, editor.encode(clip)), (reconstruct, noise)):
            run = nnx.jit(lambda model, x, f=function, p=process: f(model, p, x, *arguments))  # noqa: B023
            results.append(run(editor.model, x))
    assert (
        np.abs(results[0] - results[2]).max() > 1e-3
        and np.abs(results[1] - results[3]).max() > 1e-3
    )


def test_strength_cuts_the_noisiest_steps_off():
    assert list(edit_timesteps(100, EditConfig(steps=10))) == [
        9,
        19,
        29,
        39,
        49,
        59,
        69,
        79,
        89,
        99,
    ]
    assert list(edit_timesteps(100, EditConfig(steps=10, strength=0.3))) == [9, 19, 29]


def test_tuning_moves_only_what_is_chosen_and_lowers_the_loss(tiny):
    editor, clip = tiny
    settings = edit_settings(
        **{
            "train.learning_rate": 3e-3,
            "train.warmup_steps": 1,
            "train.steps": 60,
            "train.decay": "constant",
        }
    )
    graph, params, frozen = nnx.split(editor.model, trainable("temporal"), ...)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    assert all("temporal" in n or "to_q" in n or n.startswith("context") for n in names)
    assert any("attn1/to_q" in n for n in names) and any("temporal/conv" in n for n in names)
    step = jax.jit(make_tuning_step(graph, editor.process, settings.base.train, 0))
    state = init_tuning(params, settings.base.train, 0)
    text, null = editor.encode_text(["a red circle"]), editor.encode_text([""])
    losses = []
    for _ in range(60):
        state, loss = step(state, frozen, editor.encode(clip), text, null)
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    before, after = nnx.to_flat_state(params), dict(nnx.to_flat_state(state.params))
    changed = [path for path, value in before if np.abs(value[...] - after[path][...]).max() > 0]
    assert len(changed) > 0.8 * len(names)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("video.prompt", " ", "video.prompt"),
        ("video.edit_prompts", (), "at least one text"),
        ("video.size", (8, 0), "video.size"),
        ("video.stride", 0, "video.stride=0: must be at least 1"),
        ("video.overlap", 9, None),
        ("video.window", 2, "video.overlap=2: must be below video.window=2"),
        ("edit.control", "swap", "one of none, replace, refine"),
        ("edit.inversion", "null", "one of ddim, exact"),
        ("edit.strength", 0.1, "leave one of 5 steps"),
        ("edit.cross_range", (0.5, 0.1), "edit.cross_range"),
        ("edit.reweight", (("snow",),), "edit.reweight"),
        ("edit.guidence", 2.0, "nearest: guidance"),
        ("video.model", "nowhere", None),
    ],
)
def test_a_wrong_field_is_one_line(field, value, words):
    if words is None:
        edit_settings(**{field: value})
        return
    with pytest.raises(ValueError, match=words) as error:
        edit_settings(**{field: value})
    assert "\n" not in str(error.value)


def test_a_model_that_is_none_and_a_size_that_does_not_fit_are_one_line(tmp_path, tiny):
    with pytest.raises(
        ValueError, match="video.model=.*neither a Stable Diffusion folder nor a trained run"
    ):
        open_editor(edit_settings(**{"video.model": str(tmp_path)}))
    with pytest.raises(
        ValueError,
        match=r"frames are 9 x 12; .* multiples of 4, as with --config.video.size=\(8, 12\)",
    ):
        tiny[0].check_size(np.zeros((1, 9, 12, 3), np.uint8))
