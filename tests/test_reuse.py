"""The UNet's coarser levels, kept for some steps: the same network where they are its own, and a
loop as it is written.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_LEVEL, SMALLEST, config_dict, random_params
from flax import nnx

from contextdiff_jax import diffusion
from contextdiff_jax.benchmarks import reuse as benchmark
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.inference.sampling import Method, Steps, Text, make_sample
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import parse
from contextdiff_jax.training.state import init_state
from contextdiff_jax.training.step import make_train_step

B = 2


def made(**changes):
    # Odd: levels of 9 and 5.
    settings = parse(config_dict(**{"data.image_size": 9, "context.patch_size": 3} | changes))
    return settings, build_model(model_graph(settings), random_params(settings, gain=0.5))


@pytest.fixture(scope="module")
def tiny():
    return made()


def inputs(settings):
    rng = np.random.default_rng(0)
    L, D = settings.data.max_length, settings.model.cross_attention_dim
    mask = np.arange(L) < np.array([[5], [L]])
    return (
        rng.standard_normal((B, 9, 9, 3), np.float32),
        rng.standard_normal((B, L, D), np.float32),
        mask,
    )


def program(settings, guidance, **method):
    """`run(model, x, ids, mask, timesteps)`, the jitted sampling loop."""
    run = make_sample(settings.process, Method(guided=guidance != 1, **method))

    def sample(model, x, ids, mask, timesteps):
        text, key = Text(ids, mask, ids[:1], mask[:1]), jax.random.key(0)
        return run(model, x, text, Steps(timesteps), jnp.float32(guidance), key)

    return sample


def sample(settings, model, x, text, timesteps, guidance, **method):
    return np.asarray(jax.jit(program(settings, guidance, **method))(model, x, *text, timesteps))


@pytest.mark.parametrize("changes", [{}, ONE_LEVEL, {"model.mid_block_type": None}])
def test_a_networks_own_deep_features_change_nothing_and_anothers_do(changes):
    settings, model = made(**changes)
    x, tokens, mask = inputs(settings)
    captions, t = Captions(tokens, mask), np.array([3, 40])
    deep, predict = jax.jit(model.deep_features), jax.jit(model.predict)
    own, other = (deep(x, time, captions) for time in (t, t[::-1]))
    whole = predict(x, t, captions)
    np.testing.assert_allclose(predict(x, t, captions, own), whole, atol=1e-5)
    assert np.abs(predict(x, t, captions, other) - whole).max() > 1e-3


@pytest.mark.parametrize("estimate", ["plugin", "posterior_mean"])
def test_sampling_is_the_loop_with_what_the_first_step_of_each_group_computed(estimate):
    """Six steps by three, DDIM without guidance, against a loop of equation (3)'s mean."""
    settings, model = made(**{"context.estimate": estimate})
    x, ids = inputs(settings)[0], np.arange(1, 1 + B * 12).reshape(B, 12)
    mask, schedule = inputs(settings)[2], settings.diffusion.make_schedule()
    timesteps = np.asarray(diffusion.spaced_timesteps(schedule.num_timesteps, 6, "trailing"))
    made_by_us = sample(settings, model, x, (ids, mask), timesteps, 1.0, reuse=3)

    captions = model.encode(ids, mask)
    deep_features, predict, relate = map(
        jax.jit, (model.deep_features, model.predict, model.relate)
    )
    timesteps = np.append(timesteps, -1)
    for i, (t, s) in enumerate(zip(timesteps[:-1], timesteps[1:], strict=True)):
        t, s = np.full(B, t), np.full(B, s)
        if i % 3 == 0:
            deep = deep_features(x, t, captions)
        output = predict(x, t, captions, deep)
        output, r_hat = output if estimate == "posterior_mean" else (output, None)
        x0 = jnp.clip(diffusion.predict_x0(schedule, output, x, t, "v"), -1, 1)
        r_t, r_s = (
            (r_hat, r_hat)
            if r_hat is not None
            else (relate(x0, captions, np.maximum(i, 0)) for i in (t, s))
        )
        x = diffusion.q_posterior(schedule, x0, x, r_t, r_s, t, s, 0.0, "quadratic").mean
    np.testing.assert_allclose(made_by_us, x, atol=2e-5)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 1.0)])
def test_guided_and_noisy_samples_stay_near_those_without_reuse(tiny, sampler, eta):
    """The steps and the noise are the same: the network's coarser levels make the difference."""
    settings, model = tiny
    x, ids, mask = inputs(settings)[0], np.arange(1, 1 + B * 12).reshape(B, 12), inputs(settings)[2]
    T = settings.diffusion.num_timesteps
    timesteps = np.asarray(diffusion.spaced_timesteps(T, 6, "trailing"))
    plain, twos = (
        sample(
            settings, model, x, (ids, mask), timesteps, 2.0, sampler=sampler, eta=eta, reuse=reuse
        )
        for reuse in (1, 2)
    )
    assert 1e-6 < np.abs(twos - plain).mean() < 0.2 * np.abs(plain).mean()


def test_an_interval_of_one_step_is_no_reuse(tiny):
    schedule, rng = tiny[0].diffusion.make_schedule(), np.random.default_rng(1)
    x = rng.standard_normal((B, 4), np.float32)

    def denoise(x, t, s, kept=0.5):
        return diffusion.Denoised(kept * jnp.tanh(x), 0.1 * x, 0.2 * x)

    arguments = x, schedule, np.array([40, 20, 9, 0])
    plain = diffusion.ddim_sample(denoise, *arguments, eta=0.5, key=jax.random.key(0))
    kept = diffusion.ddim_sample(
        denoise,
        *arguments,
        eta=0.5,
        key=jax.random.key(0),
        reuse=diffusion.Reuse(1, lambda x, t: jnp.float32(0.5)),
    )
    np.testing.assert_array_equal(plain, kept)


def test_an_interval_that_does_not_divide_the_steps_is_refused(tiny):
    settings, _ = tiny
    with pytest.raises(ValueError, match="reuse=3: must be a positive divisor of steps=4"):
        dataclasses.replace(settings.sample, reuse=3)
    with pytest.raises(ValueError, match="reuse=3: must divide the number of steps, 4"):
        diffusion.ddim_sample(
            lambda x, t, s, kept: diffusion.Denoised(x, x, x),
            jnp.ones((1, 2)),
            settings.diffusion.make_schedule(),
            np.array([9, 5, 2, 0]),
            reuse=diffusion.Reuse(3, lambda x, t: x),
        )


def test_a_training_step_and_a_sampling_program_are_traced_once():
    """Whatever comes in later, the first step's own state above all, looks like what came first."""
    settings = parse(config_dict(**SMALLEST))
    state, length = jax.eval_shape(lambda: init_state(settings)), settings.data.max_length

    def captions(batch):
        ids = jax.ShapeDtypeStruct((batch, length), np.int32)
        return {"token_ids": ids, "token_mask": jax.ShapeDtypeStruct((batch, length), bool)}

    image = jax.ShapeDtypeStruct((8, 16, 16, 3), np.uint8)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(make_train_step(settings), n=1))
    batch, null = {"image": image} | captions(8), captions(1)
    after, _ = jax.eval_shape(step, state, batch, null)
    jax.eval_shape(step, after, batch, null)

    graph, run = model_graph(settings), program(settings, 2.0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sample(params, *inputs):
        return run(nnx.merge(graph, params), *inputs)

    # Another guidance scale or other timesteps are the same program.
    x, text = np.zeros((B, 16, 16, 3), np.float32), captions(B).values()
    for params, first in ((state.params, 49), (after.params, 40)):
        jax.eval_shape(sample, params, x + first, *text, np.array([first, 12]))


def test_a_second_trace_gives_the_same_programs():
    """Tracing leaves nothing behind in Python: no count, key or cache that a program depends on."""
    settings = parse(config_dict(**SMALLEST))
    state, length = jax.eval_shape(lambda: init_state(settings)), settings.data.max_length
    image = jax.ShapeDtypeStruct((8, 16, 16, 3), np.uint8)
    step, graph, run = make_train_step(settings), model_graph(settings), program(settings, 2.0)

    def sample(params, *inputs):
        return run(nnx.merge(graph, params), *inputs)

    def captions(batch):
        ids = jax.ShapeDtypeStruct((batch, length), np.int32)
        return {"token_ids": ids, "token_mask": jax.ShapeDtypeStruct((batch, length), bool)}

    x, timesteps = jax.ShapeDtypeStruct((B, 16, 16, 3), np.float32), np.array([49, 12])
    for function, arguments in (
        (step, (state, {"image": image} | captions(8), captions(1))),
        (sample, (state.params, x, *captions(B).values(), timesteps)),
    ):
        # Wrapped anew each time, or JAX gives out what it has traced.
        first, again = (str(jax.make_jaxpr(lambda *a, f=function: f(*a))(*arguments)) for _ in "12")
        assert len(first) > 10_000 and first == again


def test_the_shared_part_is_computed_once_a_group(tiny):
    """Convolutions in the compiled program: a whole network, and one finest level more for the
    steps that reuse.
    """
    settings, model = tiny
    x, ids, mask = inputs(settings)[0], np.arange(1, 1 + B * 12).reshape(B, 12), inputs(settings)[2]
    graph, state = nnx.split(model)

    def convolutions(reuse):
        sample = program(settings, 1.0, reuse=reuse)
        run = jax.jit(lambda state, *rest: sample(nnx.merge(graph, state), *rest))
        compiled = run.lower(state, x, ids, mask, np.array([49, 37, 25, 12])).compile()
        return compiled.as_text().count(" convolution(")

    fine = 1 + 2 + 2 * 2 + 1  # conv_in, a resnet down, two up, conv_out
    # Its three down there are in `keep` and in the step beside it; XLA may write one out twice of
    # its own accord.
    assert fine <= convolutions(2) - convolutions(1) < fine + 3


@pytest.mark.slow  # bash launch/test.sh -m slow tests/test_reuse.py
def test_the_benchmark_tells_the_difference_to_all_steps(tiny_settings, monkeypatch):
    params = random_params(tiny_settings)
    pipeline = of_run(tiny_settings, load_tokenizer(), params, source="step 7 of a run")
    monkeypatch.setattr(benchmark.Pipeline, "open", lambda workdir: pipeline)
    monkeypatch.setattr(benchmark, "VARIANTS", ((4, 1), (4, 2), (2, 1)))
    result = benchmark.run("somewhere", rounds=1)
    whole, *others = result.rows
    assert whole["error"] == 0 and whole["speedup"] == 1 and whole["pictures"] == 16
    assert [row["name"] for row in others] == ["4 steps, reuse 2", "2 steps, reuse 1"]
    assert (
        all(0 < row["error"] < 1 and row["seconds"] > 0 for row in others)
        and "step 7" in result.text
    )
