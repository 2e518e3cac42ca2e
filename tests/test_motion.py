"""What predicts how x moves, velocity and M: targets, denoise functions, training, likelihood."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALLEST, config_dict, random_params
from flax import nnx
from references import PATHS, column, draws

from contextdiff_jax import diffusion
from contextdiff_jax.configs.experiments import flow_one
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.diffusion.likelihood import flow_velocity, follow_flow
from contextdiff_jax.diffusion.losses import TIMESTEP_SAMPLINGS
from contextdiff_jax.evaluation.likelihood import check_flow, flow_times, model_bits
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import parse
from contextdiff_jax.training.objective import errors
from contextdiff_jax.training.step import draw, loss_fn

FLOW = diffusion.make_schedule("flow")
T = np.array([0.05, 0.3, 0.6, 0.95], np.float32)
t = jnp.asarray(T)


@pytest.mark.parametrize("name", PATHS)
def test_the_data_target_is_m_whatever_moves_r(name):
    """M = (b u - b' x) / (a' b - a b') with every derivative taken numerically, in float64."""
    schedule, (a, b) = diffusion.make_schedule(name), PATHS[name]
    x0, r, rate, e = draws(4)

    def x_at(u):
        k = a(u) * (1 - a(u))
        context = r + column(u - T) * rate
        return column(a(u)) * x0 + column(k) * context + column(b(u)) * e

    def slope(f, h=1e-6):
        u = T.astype(np.float64)
        return (f(u + h) - f(u - h)) / (2 * h)

    u = T.astype(np.float64)
    da, db = column(slope(a)), column(slope(b))
    m = (column(b(u)) * slope(x_at) - db * x_at(u)) / (da * column(b(u)) - column(a(u)) * db)
    given = {"context": r, "context_rate": rate}
    x_t = diffusion.q_sample(schedule, x0, r, t, e)
    data = diffusion.training_target(schedule, x0, x_t, t, "data", **given)
    np.testing.assert_allclose(data, m, rtol=1e-4, atol=1e-5)
    velocity = diffusion.training_target(schedule, x0, x_t, t, "velocity", **given)
    for output, kind in ((data, "data"), (velocity, "velocity")):
        motion = diffusion.motion_data(schedule, output, x_t, t, kind)
        np.testing.assert_allclose(motion, m, rtol=1e-3, atol=1e-4)
        again = diffusion.predict_x0(schedule, output, x_t, t, kind, **given)
        np.testing.assert_allclose(again, x0, rtol=1e-3, atol=1e-4)


def test_the_error_has_the_motion_as_its_target_and_a_fixed_target_trains_no_context():
    x0, r, rate, e = draws(4)
    process = diffusion.Process(schedule=FLOW, prediction_type="velocity", shift="quadratic")
    k = column(T * (1 - T))
    u = -x0 + column(1 - 2 * T) * r + k * rate + e
    x_t = column(1 - T) * x0 + k * r + column(T) * e
    seen = []

    def predict(x, time):
        seen.append((x, time))
        return 0.3 * x, 0.5 * x

    found, of_r = errors(predict, process, x0, r, t, e, rate)
    np.testing.assert_allclose(found, np.mean((0.3 * x_t - u) ** 2, 1), rtol=1e-5)
    np.testing.assert_allclose(of_r, np.mean((0.5 * x_t - r) ** 2), rtol=1e-5)
    np.testing.assert_allclose(seen[0][1], 1000 * T, rtol=1e-6)

    def blind(r, fixed):  # reads no x_t: r is only in the target
        return errors(lambda x, _: jnp.zeros_like(x), process, x0, r, t, e, rate, fixed)[0].sum()

    assert (jax.grad(blind)(jnp.asarray(r), True) == 0).all()
    expected = 2 / 3 * u * column(1 - 2 * T)
    np.testing.assert_allclose(jax.grad(blind)(jnp.asarray(r), False), expected, atol=1e-5)


def gaussian(r_is=0.7, mean=0.4, deviation=0.6):
    """Data N(m, s^2) and r = g x0, on `flow`: the exact E[x0], E[r], E[u] given x_t."""

    def exact(x, time):
        a, k = 1 - time, time * (1 - time)
        signal = a + k * r_is
        variance = signal**2 * deviation**2 + time**2
        x0 = mean + signal * deviation**2 / variance * (x - signal * mean)
        e = (x - signal * x0) / time
        return x0, r_is * x0, -x0 + (1 - 2 * time) * r_is * x0 + e, signal, variance

    return exact


@pytest.mark.parametrize("kind", ["velocity", "data", "x0", "v"])
def test_with_a_head_for_r_every_output_gives_the_means_of_x0_and_r(kind):
    x_t = draws(4)[0]
    x0, r, u = (jnp.asarray(a) for a in gaussian()(x_t, column(T))[:3])
    outputs = {
        "velocity": u,
        "data": x0 + column(T) ** 2 * r,
        "x0": x0,
        "v": column(1 - T) * (x_t - column(1 - T) * x0) / column(T) - column(T) * x0,
    }
    denoise = diffusion.posterior_mean_denoise(lambda x, t: (outputs[kind], r), FLOW, kind)
    out = denoise(jnp.asarray(x_t), t, t - 0.01)
    np.testing.assert_allclose(out.x0, x0, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.context_s, r)


@pytest.mark.parametrize("kind", ["velocity", "data", "x0"])
def test_a_context_of_the_text_needs_no_estimate_though_it_moves(kind):
    x0, first, rate, e = map(jnp.asarray, draws(4))

    def context_fn(time):
        return first + time[:, None] * rate

    r = context_fn(t)
    x_t = diffusion.q_sample(FLOW, x0, r, t, e, "constant")
    given = {"context": r, "context_rate": rate, "shift": "constant"}
    output = diffusion.training_target(FLOW, x0, x_t, t, kind, **given)
    if kind == "velocity":  # CAR-Flow: the ends' difference
        np.testing.assert_allclose(output, e - x0 + rate, atol=1e-4)
    way = diffusion.known_context_denoise(lambda x, t: output, context_fn, FLOW, kind, "constant")
    out = way(x_t, t, t - 0.04)
    np.testing.assert_allclose(out.x0, x0, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(out.context_t, r, rtol=1e-6)
    np.testing.assert_allclose(out.context_s, context_fn(t - 0.04), rtol=1e-5)


def test_the_rate_of_a_context_is_its_derivative_through_layers_without_a_forward_one():
    config = ContextConfig(
        time_dependent=True, width=8, num_blocks=1, num_heads=2, text_width=6, patch_size=4
    )
    network = RelationalNetwork(config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(network)
    params = jax.tree.map(lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params)
    x0, text = (
        jnp.sin(jnp.arange(2 * n)).reshape(2, *shape)
        for n, shape in ((192, (8, 8, 3)), (30, (5, 6)))
    )

    @jax.jit
    def r(params, time):
        return nnx.merge(graph, params)(x0, text, jnp.ones((2, 5), bool), 1000 * time)

    time = jnp.array([0.1, 0.3])
    value, rate = jax.jit(lambda p: diffusion.with_rate(lambda time: r(p, time), time))(params)
    np.testing.assert_allclose(value, r(params, time), atol=1e-6)
    numeric = (r(params, time + 2e-5) - r(params, time - 2e-5)) / 4e-5
    assert np.abs(numeric).max() > 10
    np.testing.assert_allclose(rate, numeric, atol=0.02 * np.abs(numeric).max())

    @jax.jit
    @jax.grad
    def of_params(params):
        return (diffusion.with_rate(lambda time: r(params, time), time)[1] ** 2).sum()

    gradient = of_params(params)["gamma"][...]
    assert np.isfinite(gradient) and gradient != 0


@pytest.mark.parametrize("sampling", TIMESTEP_SAMPLINGS)
def test_the_densities_of_the_times(sampling):
    scale = {"logit_normal": 0.8, "mode": 1.29}.get(sampling, 1.0)
    u = np.asarray(diffusion.sample_shares(jax.random.key(0), 4096, sampling, scale), np.float64)
    assert u.min() >= 0 and u.max() <= 1
    grid = (np.arange(200_000) + 0.5) / 200_000
    if sampling == "logit_normal":  # by inversion of the distribution function on a grid of normals
        normal = np.random.default_rng(0).standard_normal(400_000)
        grid = 1 / (1 + np.exp(-scale * normal))
    elif sampling == "mode":
        grid = 1 - grid - scale * (np.cos(np.pi / 2 * grid) ** 2 - 1 + grid)
    expected = np.quantile(grid, np.linspace(0.05, 0.95, 19))
    bound = 0.03 if sampling in ("uniform", "independent", "antithetic") else 0.006
    assert np.abs(np.quantile(u, np.linspace(0.05, 0.95, 19)) - expected).max() < bound
    if sampling == "antithetic":
        np.testing.assert_allclose(u[:2048] + u[2048:], 1, atol=1e-6)
    t = diffusion.sample_timesteps(jax.random.key(0), 4096, 50, sampling, scale)
    np.testing.assert_array_equal(t, np.minimum((np.float32(u) * np.float32(50)).astype(int), 49))


@pytest.mark.parametrize("name", [*PATHS, "cosine"])
def test_a_share_of_the_path_and_its_time_are_inverses(name):
    schedule = diffusion.make_schedule(name)
    u = jnp.array([0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
    times = schedule.time_of_share(u)
    np.testing.assert_allclose(times[::5], [schedule.t_min, schedule.t_max], rtol=1e-4)
    inner = slice(1, -1)
    np.testing.assert_allclose(schedule.share(times)[inner], u[inner], atol=1e-5)
    network = schedule.network_time(times)
    expected = times if name == "cosine" else 1000 * schedule.share(times)
    np.testing.assert_array_equal(network, expected)


def test_a_network_reads_edm_as_the_path_of_equal_angles():
    """x / sqrt(1 + sigma^2) is a x0 + b e of the angle whose tangent is sigma."""
    x0, _, _, e = draws(4)
    edm, cosine = diffusion.make_schedule("edm"), diffusion.make_schedule("cosine_continuous")
    zeros = jnp.zeros_like(x0)
    sigma = jnp.tan(jnp.pi / 2 * t)
    x = diffusion.q_sample(edm, x0, zeros, sigma, e)
    found = edm.network_input(x, sigma)
    same = cosine.network_input(diffusion.q_sample(cosine, x0, zeros, t, e), t)
    for one, other in zip(found, same, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_prior_term_on_paths():
    x0, r, *_ = draws(4)
    kl = diffusion.prior_kl(FLOW, x0, r, "prior")
    np.testing.assert_allclose(kl, np.mean(r**2, 1) / 2 / np.log(2), rtol=1e-5)
    kl = diffusion.prior_kl(diffusion.EDM(sigma_max=5.0), x0, r, "none")
    np.testing.assert_allclose(kl, np.mean((x0 / 5) ** 2, 1) / 2 / np.log(2), rtol=1e-5)


@pytest.mark.parametrize("r_is", [0.0, 0.7])
def test_the_density_that_a_flow_carries_is_the_gaussians(r_is):
    """log p(x_d) = log p(x_T) + the divergence's integral, for data and r whose p is known."""
    exact = gaussian(r_is)
    x_d = jnp.asarray(draws(6)[0])

    def velocity(x, t):
        x0, r, *_ = exact(x, t[:, None])
        return flow_velocity(FLOW, diffusion.Denoised(x0, r, r), x, t, "quadratic")

    times = jnp.linspace(0.1, 1.0, 101)
    x, divergence = follow_flow(velocity, x_d, times, jax.random.key(0))
    *_, signal, variance = exact(x_d, 0.1)

    def log_normal(x, mean, variance):
        nats = (x - mean) ** 2 / variance + np.log(2 * np.pi * variance)
        return -0.5 * np.sum(np.asarray(nats, np.float64), 1)

    expected = log_normal(x_d, signal * 0.4, variance)
    np.testing.assert_allclose(log_normal(x, 0, 1) + divergence, expected, atol=2e-3)


def flow_settings(**changes):
    flow = {"diffusion.schedule": "flow", "diffusion.prediction_type": "data"}
    dashed = {name.replace("__", "."): value for name, value in changes.items()}
    return parse(config_dict(**SMALLEST, **(flow | dashed)))


BATCH = 4


def batch_for(settings):
    rng, length = np.random.default_rng(0), settings.data.max_length
    mask = np.arange(length) < np.array([[3], [5], [7], [4]])
    batch = {
        "image": rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
        "token_ids": rng.integers(1, 50, (BATCH, length)) * mask,
        "token_mask": mask,
    }
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    null = {name: batch[name][:1] for name in ("token_ids", "token_mask")}
    return draw(jax.random.key(1), batch, settings), null


CAR_FLOW = {"context__kind": "two_ends", "context__shift": "constant"}
CSFM = {
    "context__kind": "gaussian_source",
    "context__shift": "prior",
    "context__estimate": "velocity",
    "context__variance_kl": 0.5,
    "context__alignment": 0.1,
}
VELOCITY = {"context__estimate": "velocity"}


@pytest.mark.parametrize(
    "arm",
    [pytest.param(CAR_FLOW, marks=pytest.mark.slow), CSFM],
    ids=["car-flow", "csfm"],
)
def test_sources_of_the_text_are_trained_sampled_and_scored(arm):
    """The slow one: bash launch/test.sh -m slow tests/test_motion.py"""
    settings = flow_settings(**arm)
    params = random_params(settings, 0.5)
    (batch, null), graph = batch_for(settings), model_graph(settings)

    @jax.jit
    def gradient(params):
        return jax.value_and_grad(
            lambda p: loss_fn(build_model(graph, p), batch, null, settings.process, settings)[0]
        )(params)

    loss, grads = gradient(params)
    assert np.isfinite(loss) and float(jnp.abs(grads["context"]["gamma"][...]).min()) > 0
    pipeline = of_run(settings, load_tokenizer(), params)
    shown = []
    made = pipeline.text_to_image(
        ["a red circle"], guidance=1.0, steps=2, callback=lambda i, x0: shown.append((i, x0))
    )
    assert made.shape == (1, 16, 16, 3) and [i for i, _ in shown] == [1, 2]

    model, key = build_model(graph, params), jax.random.key(0)
    captions = model.encode(batch["token_ids"], batch["token_mask"])
    x0, times = (
        0.9 * jnp.sin(jnp.arange(BATCH * 768.0)).reshape(BATCH, 16, 16, 3),
        flow_times(settings.process.schedule, 4),
    )
    score = jax.jit(
        lambda gain: model_bits(with_gain(model, gain), settings.process, x0, captions, key, times)
    )
    plain, shifted = score(0.0), score(1.0)
    assert np.isfinite(shifted).all() and np.abs(plain - shifted).min() > 1e-4


def with_gain(model, gamma):
    graph, params = nnx.split(model)
    params["context"]["gamma"] = jax.tree.map(
        lambda g: gamma * jnp.ones_like(g), params["context"]["gamma"]
    )
    return nnx.merge(graph, params)


def test_a_velocity_run_samples_without_noise_alone_and_at_gain_0_as_plain_flow():
    settings = flow_settings(**VELOCITY)
    assert not settings.process.estimates_context
    params = random_params(settings)
    pipeline = of_run(settings, load_tokenizer(), params)
    for options in ({"sampler": "ddpm"}, {"eta": 0.5}, {"sampler": "dpmpp_2m_sde"}):
        with pytest.raises(ValueError, match="noise needs an estimate of r"):
            pipeline.text_to_image(["a"], **options)
    with pytest.raises(ValueError, match="has only both together"):
        pipeline.text_to_image(["a"], dynamic_threshold=99.0)
    picture, mask = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16), np.float32)
    with pytest.raises(ValueError, match="inpainting: what is kept follows the estimate of r"):
        pipeline.inpaint(["a"], picture, mask)
    changed = pipeline.text_to_image(["a red circle"], guidance=2.0, sampler="dpmpp_2m", steps=3)
    assert changed.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context__estimate": "plugin"}, "'plugin': needs x0"),
        ({**VELOCITY, "diffusion__prediction_type": "x0"}, "needs one of velocity, data"),
        ({**CSFM, "context__estimate": "plugin"}, "'plugin': needs x0"),
        ({**CSFM, "context__shift": "data_normalization"}, "'gaussian_source' is for 'prior'"),
        ({**CAR_FLOW, "diffusion__schedule": "cosine_continuous"}, "must be 'flow'"),
        ({**CAR_FLOW, "context__estimate": "posterior_mean"}, "r depends on t"),
        (
            {**VELOCITY, "context__time_dependent": True, "diffusion__schedule": "cosine"},
            "no derivative in t",
        ),
        ({**VELOCITY, "diffusion__schedule": "edm"}, "is 0 at all times"),
        ({"diffusion__schedule": "edm", "diffusion__prediction_type": "v"}, "one of x0, epsilon"),
        ({**VELOCITY, "context__alignment": 0.1}, "are for gaussian_source"),
        ({**VELOCITY, "sample__sampler": "ddpm"}, "noise needs an estimate of r"),
        ({**VELOCITY, "diffusion__timestep_sampling": "beta"}, "logit_normal, mode"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        flow_settings(**changes)
    assert "\n" not in str(error.value)


def test_the_likelihood_is_of_flows_whose_derivative_is_known():
    check_flow(flow_settings(**VELOCITY))
    with pytest.raises(ValueError, match="time_dependent=True"):
        check_flow(flow_settings(**VELOCITY, context__time_dependent=True))
    with pytest.raises(ValueError, match="no continuous time"):
        check_flow(parse(config_dict()))


def test_every_arm_of_the_plan_is_a_config():
    plan = flow_one.get_plan()
    for name in plan.variants:
        settings = parse(plan.cell(name, 0).config)
        assert settings.process.schedule == FLOW
        steps = [steps for _, steps in plan.options["samplers"].values()]
        assert dataclasses.replace(settings.sample, steps=max(steps)).steps == 25
