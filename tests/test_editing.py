"""Inversion, windows and tuning of the editor, on closed forms and on a tiny model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edit_settings import edit_settings
from flax import nnx

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion import Denoised
from contextdiff_jax.editing import edits as movers
from contextdiff_jax.editing.attention import align
from contextdiff_jax.editing.denoise import window_weights, windowed
from contextdiff_jax.editing.edits import MOVERS, flow_edits, sample_edits
from contextdiff_jax.editing.inversion import edit_timesteps, invert, noised, reconstruct
from contextdiff_jax.editing.settings import METHODS, EditConfig, VideoConfig
from contextdiff_jax.editing.tuning import Tuning, init_tuning, make_tuning_step, trainable
from contextdiff_jax.editing.video_model import open_editor
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.runtime.errors import RunError

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


@pytest.mark.parametrize(
    "frames, window, overlap, starts",
    [
        (24, 8, 2, [0, 6, 12, 16]),
        (9, 8, 2, [0, 1]),
        (6, 2, 0, [0, 2, 4]),
        (20, 8, 4, [0, 4, 8, 12]),
    ],
)
def test_windows_cover_every_frame_and_their_weights_sum_to_one(frames, window, overlap, starts):
    first, weights = window_weights(frames, window, overlap)
    assert list(first) == starts
    total = np.zeros(frames)
    for start, weight in zip(first, weights, strict=True):
        assert (weight > 0).all()
        total[start : start + window] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_a_function_that_sees_each_frame_alone_is_the_same_through_windows():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 11, 3)), jnp.float32)
    function = lambda x, scale: {"a": scale * x, "b": x.sum(-1) ** 2}  # noqa: E731
    for name, value in windowed(function, 11, 4, 2)(x, 3.0).items():
        np.testing.assert_allclose(value, function(x, 3.0)[name], rtol=1e-5)
    assert windowed(function, 4, 4, 2) is windowed(function, 5, 0, 2) is function


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
            "edit.strength": (0.6,),
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


def test_every_method_has_a_mover():
    assert tuple(MOVERS) == METHODS


@pytest.mark.parametrize("window", [0, 3])
def test_an_edit_without_inversion_leaves_the_source_and_its_own_prompt_as_they_are(tiny, window):
    editor, clip = tiny
    settings = edit_settings(
        **{"edit.method": "flowedit", "edit.guidance": 4.0, "video.window": window}
    )
    prompts = [settings.video.prompt, *settings.video.edit_prompts]
    text, null = editor.encode_text(prompts), editor.encode_text([""])
    graph, state = nnx.split(editor.model)
    x0 = editor.encode(clip)

    def run(state, x0):
        model, key = nnx.merge(graph, state), jax.random.key(0)
        arguments = text, null, None, settings.video, settings.edit
        return flow_edits(key, model, editor.process, x0[None], *arguments)[0]

    clips = jax.jit(run)(state, x0)
    np.testing.assert_array_equal(clips[0], x0[0])
    np.testing.assert_allclose(
        clips[2], x0[0], atol=1e-4
    )  # the second edit's prompt is the source's
    assert np.abs(clips[1] - x0[0]).mean() > 1e-3


def flow_edits_by(monkeypatch, denoise, schedule, edit, x0, rows):
    """The clips of `rows` prompts, the source's first, by a plain network whose estimates under a
    guidance are `denoise(x, t, guidance)`.
    """

    def make_denoise(*_, guidance, **__):
        def estimate(x, t, s):
            return Denoised(denoise(x, t, guidance), jnp.zeros_like(x), jnp.zeros_like(x))

        return estimate

    class Model:
        def context(self, z, *_):
            return jnp.zeros_like(z)

    monkeypatch.setattr(movers, "make_denoise", make_denoise)
    process = diffusion.Process(schedule=schedule, prediction_type="x0", shift="none")
    text = Captions(jnp.zeros((rows, 2, 4)), jnp.ones((rows, 2), bool))
    video = VideoConfig(prompt="a", edit_prompts=("b", "c")[: rows - 1])
    return flow_edits(jax.random.key(0), Model(), process, x0[None], text, text, None, video, edit)[
        0
    ]


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_an_edit_without_inversion_moves_one_gaussian_onto_another(monkeypatch, name):
    """Of N(m, 0.5^2) D is linear in x_t: the noise cancels, delta has a recursion of its own."""
    schedule, means = diffusion.make_schedule(name), np.array([0.2, -0.4, 0.7])
    edit = EditConfig(method="flowedit", steps=12)

    def signal_and_noise(t):
        return jnp.sqrt(schedule.alpha_bar(t)), schedule.sigma(t)

    def denoise(x, t, _):
        a, b = (v.reshape(-1, *[1] * (x.ndim - 1)) for v in signal_and_noise(t))
        m = means.reshape(-1, *[1] * (x.ndim - 1)).astype(np.float32)
        return m + a * 0.25 / (a**2 * 0.25 + b**2) * (x - a * m)

    x0 = np.random.default_rng(0).standard_normal((1, 2, 4, 4, 3)).astype(np.float32)
    clips = flow_edits_by(monkeypatch, denoise, schedule, edit, x0, 3)
    times = [*edit_timesteps(schedule, edit)[::-1], schedule.t_min]
    wanted, delta = means - means[0], np.zeros(3)
    for t, s in zip(times[:-1], times[1:], strict=True):
        (a, b), (a2, b2) = ([float(v) for v in signal_and_noise(time)] for time in (t, s))
        share = a * a * 0.25 / (a * a * 0.25 + b * b)
        rho = b2 * a / (a2 * b)
        delta = rho * delta + (1 - rho) * ((1 - share) * wanted + share * delta)
    assert abs(delta[2] - wanted[2]) < 0.2 * abs(wanted[2])  # and the recursion leads there
    np.testing.assert_allclose(clips, x0 + delta.reshape(3, 1, 1, 1, 1), atol=2e-4)


def test_guidance_acts_inside_its_interval_alone(monkeypatch):
    """Of estimates that don't depend on x_t, delta has a recursion of its own."""
    schedule, means = diffusion.make_schedule("flow"), np.array([0.2, -0.4])
    edit = EditConfig(method="flowedit", steps=8, guidance=3.0, guidance_interval=(0.4, 0.7))

    def denoise(x, _, guidance):
        x0 = guidance * means.reshape(2, 1, 1, 1, 1)
        return jnp.broadcast_to(x0, x.shape).astype(x.dtype)

    x0 = np.zeros((1, 2, 4, 4, 3), np.float32)
    clips = flow_edits_by(monkeypatch, denoise, schedule, edit, x0, 2)
    times = [*edit_timesteps(schedule, edit)[::-1], schedule.t_min]
    delta, guided = 0.0, 0
    for t, s in zip(times[:-1], times[1:], strict=True):
        inside = 0.4 < t <= 0.7  # on the straight path the share of noise is the time
        rho = s * (1 - t) / ((1 - s) * t)
        delta = rho * delta + (1 - rho) * (3.0 if inside else 1.0) * (means[1] - means[0])
        guided += inside
    assert 0 < guided < len(times) - 1
    np.testing.assert_allclose(clips[1], delta, atol=1e-5)


def test_attention_is_controlled_and_watched_inside_an_interval_too(tiny):
    changes = {"edit.control": "refine", "edit.blend": "changed", "edit.strength": (0.6,)}
    always, inside = (
        edits(*tiny, edit_settings(**changes, **{"edit.guidance_interval": interval}))[2]
        for interval in (diffusion.ALWAYS, (1e-6, 1.0))
    )
    np.testing.assert_allclose(inside, always, atol=1e-5)
    assert np.abs(inside[1] - inside[0]).max() > 1e-2


def test_a_noised_path_is_the_shifted_process_with_one_noise(tiny):
    editor, clip = tiny
    settings, x0 = edit_settings(), editor.encode(clip)
    source, process = editor.encode_text(["a red circle"]), editor.process
    key = jax.random.key(3)
    made = nnx.jit(
        lambda model: noised(key, model, process, x0, source, settings.video, settings.edit)
    )
    path, noise = made(editor.model), jax.random.normal(key, x0.shape)

    @nnx.jit
    def shifted(model, t):
        r = model.context(x0, source.tokens, source.mask, process.schedule.network_time(t))
        return diffusion.q_sample(process.schedule, x0, r, t, noise, process.shift), r

    for x, t in zip(path[1:], edit_timesteps(process.schedule, settings.edit), strict=True):
        wanted, r = shifted(editor.model, jnp.full((1,), t))
        np.testing.assert_allclose(x, wanted, atol=1e-5)
        assert np.abs(r).max() > 0
    np.testing.assert_array_equal(path[0], x0)


def test_blending_by_the_difference_keeps_what_both_prompts_agree_on(tiny):
    settings = edit_settings(
        **{"edit.blend": "difference", "edit.blend_threshold": 0.5, "edit.blend_range": (0.0, 1.0)}
    )
    path, _, clips = edits(*tiny, settings)
    same = np.abs(clips[1] - path[0, 0]).max(-1) < 1e-6
    assert 0.02 < same.mean() < 0.98
    np.testing.assert_array_equal(clips[2], path[0, 0])  # the same prompt differs nowhere


def test_strength_cuts_the_noisiest_steps_off():
    assert list(edit_timesteps(SCHEDULE, EditConfig(steps=10))) == [
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
    assert list(edit_timesteps(SCHEDULE, EditConfig(steps=10, strength=(0.1, 0.3)))) == [9, 19, 29]
    flow = diffusion.make_schedule("flow")
    times = edit_timesteps(flow, EditConfig(steps=10, strength=(0.3,)))
    np.testing.assert_allclose(times, [0.1, 0.2, 0.3], rtol=1e-6)
    assert edit_timesteps(flow, EditConfig(steps=2000))[0] > flow.t_min


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
    state = init_tuning(params, settings.base.train, jax.random.key(0))
    text, null = editor.encode_text(["a red circle"]), editor.encode_text([""])
    losses = []
    for _ in range(60):
        state, loss = step(state, frozen, editor.encode(clip), text, null)
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    before, after = nnx.to_flat_state(params), dict(nnx.to_flat_state(state.params))
    changed = [path for path, value in before if np.abs(value[...] - after[path][...]).max() > 0]
    assert len(changed) > 0.8 * len(names)


def test_weights_in_float16_are_tuned_in_float32(tiny):
    editor, clip = tiny
    train = edit_settings(**{"train.learning_rate": 1e-3, "train.warmup_steps": 0}).base.train
    graph, params, frozen = nnx.split(editor.model, trainable("temporal"), ...)
    half = jax.tree.map(lambda a: a.astype(jnp.float16), params)
    state = init_tuning(half, train, jax.random.key(0))
    step = jax.jit(make_tuning_step(graph, editor.process, train, 0))
    text = editor.encode_text(["a red circle"])
    for _ in range(3):
        state, loss = step(state, frozen, editor.encode(clip), text, text)
        assert np.isfinite(loss)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, half)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


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
        ("edit.method", "magic", "one of inversion, sdedit, flowedit"),
        ("edit.inversion", "null", "one of ddim, exact"),
        ("edit.strength", (1.0, 0.1), "leave one of 5 steps"),
        ("edit.strength", (1.0, 0.5, 0.2), "one number, or one for each of the 2 edit prompts"),
        ("edit.strength", (0.5, "auto"), "must be numbers, or 'auto' alone"),
        ("edit.seeds", (1, 1), "edit.seeds.*at least one, each once"),
        ("edit.seeds", (0, 1), "'inversion' draws no noise; leave one seed"),
        ("edit.cross_range", (0.5, 0.1), "edit.cross_range"),
        ("edit.reweight", (("snow",),), "edit.reweight"),
        ("edit.guidence", 2.0, "nearest: guidance"),
        ("edit.guidance_interval", (0.7, 0.2), "must be two shares of noise .* ascending"),
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


def test_tuning_ends_at_a_loss_that_is_not_finite_and_names_its_step():
    task = Tuning(lambda state: (state, jnp.float32(jnp.nan)), lambda params: 0.0)
    state = task.advance("as it was", 7, lambda doing: None)
    with pytest.raises(RunError, match="step 7: the loss is not finite"):
        task.check(state)
