"""One road from prompts to pictures: from noise, a picture, into its hole, with a context."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FEWER, SMALLEST, as_users_compile, config_dict, random_params

from contextdiff_jax import Pipeline, diffusion
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.diffusion import Denoised, samplers
from contextdiff_jax.diffusion.grids import NAMES
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.inference import sampling
from contextdiff_jax.inference.opening import of_run, run_steps
from contextdiff_jax.inference.optimised import optimised_spacing
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import parse

PROMPTS = ["a large red circle", "a small blue square"]
SEED = 3


@pytest.fixture(scope="module")
def settings():
    return parse(config_dict(**SMALLEST, **{"sample.steps": 4, "sample.guidance": 2.0}))


@pytest.fixture(scope="module")
def params(settings):
    params = random_params(settings)
    params["context"]["gamma"][...] = jnp.asarray(1.5)
    return params


@pytest.fixture(scope="module")
def pipeline(settings, params):
    return of_run(settings, load_tokenizer(), params)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def masks():
    masks = np.zeros((2, 16, 16), np.float32)
    masks[0, :8], masks[1, :, 4:] = 1, 1
    return masks


def ways(pipeline, pictures, masks, **options):
    """Pictures by each of the three ways."""
    options = {"seed": SEED} | options
    return {
        "text": pipeline.text_to_image(PROMPTS, **options),
        "image": pipeline.image_to_image(PROMPTS, pictures, strength=0.5, **options),
        "inpaint": pipeline.inpaint(PROMPTS, pictures, masks, **options),
    }


@pytest.mark.slow  # half a minute as users compile: pytest -m slow tests/test_inference.py
def test_at_gain_0_every_way_gives_the_pictures_of_plain_diffusion_to_the_bit(
    request, settings, params, pictures, masks
):
    if FEWER:
        return as_users_compile(request.node.nodeid)
    params = jax.tree.map(jnp.copy, params)
    params["context"]["gamma"][...] = jnp.asarray(0.0)
    plain = dataclasses.replace(
        settings, context=dataclasses.replace(settings.context, shift="none")
    )
    both = [
        ways(of_run(each, load_tokenizer(), params), pictures, masks) for each in (settings, plain)
    ]
    for name in both[0]:
        np.testing.assert_array_equal(both[0][name], both[1][name], err_msg=name)


def test_the_context_reaches_every_way(pipeline, settings, params, pictures, masks):
    plain = dataclasses.replace(
        settings, context=dataclasses.replace(settings.context, shift="none")
    )
    without = ways(of_run(plain, load_tokenizer(), params), pictures, masks)
    for name, made in ways(pipeline, pictures, masks).items():
        assert np.abs(made.astype(int) - without[name]).mean() > 0.5, name


def test_a_picture_is_noised_by_the_forward_process_of_its_caption(
    settings, params, pictures, monkeypatch
):
    """x_t = a_t x0 + k_t r + b_t e in float64, with the network's own r."""

    def start(denoise, x, *_):
        return x / 4  # what the sampler is given, inside of [-1, 1]

    monkeypatch.setitem(samplers.SAMPLERS, "ddim", start)
    tokenizer, noise = load_tokenizer(), np.random.default_rng(1).standard_normal((2, 16, 16, 3))
    made = of_run(settings, tokenizer, params).image_to_image(
        PROMPTS, pictures, strength=0.5, noise=noise
    )
    schedule = settings.diffusion.make_schedule()
    t = 24  # four trailing steps of 50: 49, 37, 24 and 12; the last half begins at 24
    alphas_cumprod = np.float64(schedule.alphas_cumprod[t])
    model = build_model(model_graph(settings), params)
    captions = model.encode(*tokenizer.encode(PROMPTS, settings.data.max_length))
    x0 = np.float64(to_unit(pictures))
    r = np.float64(jax.jit(model.relate)(jnp.float32(x0), captions, jnp.full(2, t)))
    a, b = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
    expected = a * x0 + a * (1 - a) * r + b * noise
    assert np.abs(a * (1 - a) * r).max() > 0.02
    np.testing.assert_allclose(to_unit(made), np.clip(expected / 4, -1, 1), atol=0.51 / 127.5)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm"}, {"eta": 0.5, "reuse": 2}])
def test_an_inpainted_picture_keeps_what_is_outside_of_the_hole(pipeline, pictures, masks, options):
    made = pipeline.inpaint(PROMPTS, pictures, masks, seed=SEED, **options)
    outside = masks < 0.5
    np.testing.assert_array_equal(made[outside], pictures[outside])
    assert np.abs(made[~outside].astype(int) - pictures[~outside]).mean() > 20


def test_guidance_leads_away_from_the_negative_text(pipeline):

    def sample(**options):
        return pipeline.text_to_image(PROMPTS, seed=SEED, **options).astype(int)

    plain, negative = sample(), sample(negative="a large green triangle")
    each = sample(negative=["a large green triangle", ""])
    assert np.abs(negative - plain).mean() > 0.1
    np.testing.assert_array_equal(each, [negative[0], plain[1]])
    # A negative text that is the prompt leaves nothing to lead away from.
    np.testing.assert_allclose(sample(negative=PROMPTS), sample(guidance=1.0), atol=1)


def test_every_option_of_guidance_reaches_the_denoise_function(settings, params, monkeypatch):
    pipeline, found = of_run(settings, load_tokenizer(), params), {}

    def make(model, schedule, captions, null, **options):
        found.update(options, null=null, captions=captions)
        return lambda x, t, s: Denoised(0 * x, 0 * x, 0 * x)

    monkeypatch.setattr(sampling, "make_denoise", make)
    given = {
        "guidance_rescale": 0.3,
        "guidance_interval": (0.2, 0.8),
        "context_scale": 0.7,
        "dynamic_threshold": 90.0,
        "perpendicular": 0.6,
    }
    pipeline.text_to_image(PROMPTS, negative="a large red circle", steps=1, **given)
    assert {name: found[name] for name in given} == given
    negative, empty, prompt = (found[name].tokens for name in ("negative", "null", "captions"))
    assert negative.shape == empty.shape == prompt.shape and found["weaker"] is None
    pipeline.text_to_image(PROMPTS, negative="blue", steps=1)
    assert found["negative"] is None and found["perpendicular"] == 0


def test_a_model_that_guides_itself_changes_nothing_and_another_does(pipeline, params):
    def made(pipeline, guidance):
        return pipeline.text_to_image(PROMPTS, seed=SEED, guidance=guidance).astype(int)

    weights = jax.tree.map(lambda leaf: 0.8 * leaf, params)
    weaker = pipeline.with_params(weights)
    guided = pipeline.guided_by(weaker)
    assert np.abs(made(guided, 3.0) - made(pipeline, 1.0)).mean() > 1
    itself = guided.with_params(weights)
    np.testing.assert_allclose(made(itself, 3.0), made(weaker, 1.0), atol=1)
    with pytest.raises(ValueError, match="negative: isn't read with autoguidance"):
        guided.text_to_image(PROMPTS, negative="blue")


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"diffusion.num_timesteps": 60}, "its schedule is another; must be the model's"),
        ({"diffusion.schedule": "linear"}, "its schedule is another; must be the model's"),
        ({"context.shift": "none"}, "its context.shift is none; must be the model's, quadratic"),
        ({"data.image_size": 8}, r"its shape of x0 is \(8, 8, 3\); must be"),
    ],
)
def test_a_guide_of_another_process_or_size_is_refused_in_one_line(
    pipeline, params, changes, error
):
    other = of_run(parse(config_dict(**SMALLEST | changes)), load_tokenizer(), params)
    with pytest.raises(ValueError, match=f"^autoguidance: {error}") as raised:
        pipeline.guided_by(other)
    assert "\n" not in str(raised.value)


def test_a_callback_sees_each_steps_estimate_and_at_last_the_picture(pipeline):
    seen = []
    made = pipeline.text_to_image(
        PROMPTS, seed=SEED, callback=lambda step, x0: seen.append((step, x0))
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(x0.shape == (2, 16, 16, 3) for _, x0 in seen)
    np.testing.assert_array_equal(np.round((seen[-1][1] + 1) * 127.5), made)
    np.testing.assert_array_equal(made, pipeline.text_to_image(PROMPTS, seed=SEED))


@pytest.mark.parametrize("name", ["flow", "cosine_continuous", "edm"])
def test_every_grid_gives_the_steps_of_a_path_or_of_indices(settings, name):
    path = diffusion.make_schedule(name)
    for spacing in NAMES:
        options = dataclasses.replace(settings.sample, spacing=spacing, spacing_factor=2.0)
        for schedule in (path, diffusion.make_schedule(num_timesteps=50)):
            expected = np.asarray(diffusion.time_grid(schedule, 4, spacing, factor=2.0))
            steps = run_steps(schedule, options)
            np.testing.assert_array_equal(steps.timesteps, expected)
            assert steps.timesteps.dtype == expected.dtype and steps.ends is None
    for change, error in (
        ({"steps_offset": 1}, "steps_offset=1.* are for discrete schedules"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=False: are for discrete"),
        ({"spacing": "0.5,0.25"}, "must have steps=4"),
    ):
        with pytest.raises(ValueError, match=error):
            run_steps(path, dataclasses.replace(settings.sample, **change))


def test_a_list_of_times_says_how_many_steps_there_are(pipeline):
    times = np.asarray(diffusion.time_grid(pipeline.opened.process.schedule, 4, "karras"))
    named = pipeline.text_to_image(PROMPTS, seed=SEED, spacing="karras")
    for given in (times.tolist(), ",".join(map(str, times))):
        assert pipeline.options(spacing=given).steps == 4
        made = pipeline.text_to_image(PROMPTS, seed=SEED, spacing=given)
        np.testing.assert_array_equal(made, named)
    assert np.abs(named - pipeline.text_to_image(PROMPTS, seed=SEED).astype(int)).max() > 5
    assert pipeline.options(spacing="40,20").steps == 2
    with pytest.raises(ValueError, match=r"spacing: a list of shape \(2,\); must have steps=3"):
        pipeline.text_to_image(PROMPTS, spacing="40,20", steps=3)
    with pytest.raises(ValueError, match="must descend, in 0..49"):
        pipeline.text_to_image(PROMPTS, spacing="50,20")


def test_a_grid_is_optimised_for_the_model_and_sampled_on(pipeline):
    every = np.asarray(pipeline.opened.find_steps(pipeline.options(steps=6)).timesteps)
    times = optimised_spacing(pipeline, PROMPTS, 3, seed=SEED, steps=6)
    assert len(times) == 3 and times[0] == every[0] and set(times) <= set(every.tolist())
    assert optimised_spacing(pipeline, PROMPTS, 6, steps=6) == tuple(every.tolist())
    assert pipeline.text_to_image(PROMPTS, spacing=times).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="optimise_spacing=7: must lie in 1..6"):
        optimised_spacing(pipeline, PROMPTS, 7, steps=6)


def test_a_model_on_a_path_samples_at_floats_and_tells_each_step(pipeline):
    flow = diffusion.make_schedule("flow")
    process = Process(schedule=flow, prediction_type="v", shift="quadratic")
    opened = dataclasses.replace(
        pipeline.opened,
        process=process,
        find_steps=lambda options, shape: run_steps(flow, options),
    )
    seen = []
    made = Pipeline(opened).text_to_image(
        PROMPTS,
        seed=SEED,
        sampler="dpmpp_2m",
        spacing="1.0,0.75,0.25",
        callback=lambda step, x0: seen.append((step, x0)),
    )
    assert [step for step, _ in seen] == [1, 2, 3]
    np.testing.assert_array_equal(np.round((np.clip(seen[-1][1], -1, 1) + 1) * 127.5), made)


def test_a_picture_depends_on_its_number_and_not_on_how_many_there_are(pipeline):
    many = pipeline.text_to_image(PROMPTS, num=2, seed=SEED)
    assert len(many) == 4 and np.abs(many[0].astype(int) - many[1]).mean() > 5
    alone = pipeline.text_to_image(PROMPTS[1:], seed=SEED, first=2)
    np.testing.assert_allclose(alone[0].astype(int), many[2].astype(int), atol=1)
    parts = pipeline.text_to_image(PROMPTS, num=2, seed=SEED, batch_size=3)
    np.testing.assert_allclose(parts.astype(int), many.astype(int), atol=1)


def test_every_seed_of_64_bits_draws_its_own_pictures(pipeline):
    low, high = (pipeline.text_to_image(PROMPTS, seed=seed, steps=1) for seed in (0, 2**32))
    assert np.abs(low.astype(int) - high).mean() > 5


def test_a_run_makes_pictures_of_another_size(pipeline):
    assert pipeline.text_to_image(PROMPTS, size=(24, 8), steps=1).shape == (2, 24, 8, 3)


def test_a_sampler_of_the_documented_signature_makes_pictures_and_refuses_the_rest(
    pipeline, pictures, masks, monkeypatch
):
    def sample(denoise, x_T, schedule, timesteps, eta=0.0, key=None, shift="quadratic"):
        return samplers.ddim_sample(denoise, x_T, schedule, timesteps, eta, key, shift)

    monkeypatch.setitem(samplers.SAMPLERS, "mine", sample)
    mine, ddim = (pipeline.text_to_image(PROMPTS, sampler=name) for name in ("mine", "ddim"))
    np.testing.assert_array_equal(mine, ddim)
    with pytest.raises(ValueError, match="'mine': doesn't take project, for inpainting; one of"):
        pipeline.inpaint(PROMPTS, pictures, masks, sampler="mine")
    able = "ddpm, ddim, euler, dpmpp_2s, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc"
    with pytest.raises(ValueError, match=f"doesn't take reuse, for reuse=2; one of {able}$"):
        pipeline.text_to_image(PROMPTS, sampler="mine", reuse=2)


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda p: p.text_to_image([]), "the list is empty"),
        (lambda p: p.text_to_image("red"), "prompts='red'"),
        (lambda p: p.text_to_image(PROMPTS, negative=["a"]), "negative: 1 texts; must be one"),
        (lambda p: p.text_to_image(PROMPTS, perpendicular=0.5), "perpendicular=0.5: needs a neg"),
        (lambda p: p.text_to_image(PROMPTS, negative="", perpendicular=-1.0), "perpendicular=-1.0"),
        (lambda p: p.text_to_image(PROMPTS, context_scale=-1.0), "context_scale=-1.0: must be fin"),
        (lambda p: p.text_to_image(PROMPTS, guidance_interval=(0.8, 0.2)), "must be two shares of"),
        (
            lambda p: p.text_to_image(PROMPTS, guidance_interval=(0, 0.5, 1)),
            "must be two shares of",
        ),
        (lambda p: p.text_to_image(PROMPTS, seed=-1), "seed=-1: must lie in"),
        (lambda p: p.text_to_image(PROMPTS, sampler="magic"), "sampler='magic': unknown; one of"),
        (lambda p: p.text_to_image(PROMPTS, noise=np.zeros((1, 16, 16, 3))), "noise: shape"),
        (lambda p: p.image_to_image(PROMPTS, np.zeros((1, 16, 16, 3), np.uint8)), "images: 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(pipeline, call, error):
    with pytest.raises(ValueError, match=error) as raised:
        call(pipeline)
    assert "\n" not in str(raised.value)
