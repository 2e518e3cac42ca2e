"""One step of a student for several of its teacher: the target, the run, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALLEST, config_dict, random_params
from references import draws
from test_motion import batch_for

from contextdiff_jax import diffusion
from contextdiff_jax.models.contextdiff import Frozen, Teacher
from contextdiff_jax.models.denoising import make_denoise
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import parse
from contextdiff_jax.training.distillation import step_times, teacher_motion
from contextdiff_jax.training.step import loss_fn

STUDENT = {
    "diffusion.prediction_type": "data",
    "context.estimate": "velocity",
    "distill.teacher": "runs/teacher",
    "distill.steps": 4,
    "distill.substeps": 3,
    "sample.steps": 4,
    "sample.guidance": 1.0,
}

HIDDEN = (False, True, False, False)  # captions from the student and its teacher


def settings_of(**changes):
    return parse(config_dict(**SMALLEST, **(STUDENT | changes)))


@pytest.mark.parametrize("name", ["flow", "cosine", "cosine_continuous"])
def test_the_times_are_the_teachers_between_two_of_the_students(name):
    schedule = diffusion.make_schedule(name, 48)
    shares = jnp.array([1.0, 0.8, 0.76, 0.74, 0.1, 0.0])
    times = np.asarray(step_times(schedule, shares, 4, 3))
    all_times = np.append(diffusion.time_grid(schedule, 12), schedule.clean)
    starts = np.array([0, 0, 0, 1, 3, 3])
    np.testing.assert_array_equal(times, all_times[3 * starts + np.arange(4)[:, None]])
    students = np.append(diffusion.time_grid(schedule, 4), schedule.clean)
    np.testing.assert_allclose(times[0], students[starts], rtol=1e-6)
    np.testing.assert_allclose(times[-1], students[starts + 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["flow", "cosine"])
def test_a_step_by_the_motion_ends_where_the_teachers_steps_end(name):
    schedule = diffusion.make_schedule(name, 48)
    x_t = jnp.asarray(draws(6)[0])
    times = step_times(schedule, jnp.array([1.0, 0.8, 0.6, 0.4, 0.3, 0.05]), 4, 3)

    def denoise(x, t, s):
        level = schedule.alpha(t)[:, None]
        return diffusion.Denoised(jnp.tanh(level * x), jnp.sin(3 * x), jnp.sin(3 * x))

    M = teacher_motion(denoise, schedule, x_t, times, "quadratic")
    for row in range(len(x_t)):
        x, path = x_t[row : row + 1], [time[row] for time in times]
        for t, s in zip(path[:-1], path[1:], strict=True):
            out = denoise(x, t[None], s[None])
            x = diffusion.q_posterior(
                schedule, out.x0, x, out.context_t, out.context_s, t, s, 0.0
            ).mean

        def moved(x, t, s, M=M[row : row + 1]):
            return diffusion.Denoised(M, jnp.zeros_like(M), jnp.zeros_like(M))

        once = diffusion.ddim_sample(
            moved, x_t[row : row + 1], schedule, times[:1, row], next_timesteps=times[-1:, row]
        )
        np.testing.assert_allclose(once, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["data", "velocity"])
def test_the_loss_is_the_students_distance_from_the_teachers_motion(target):
    settings = settings_of(**{"diffusion.schedule": "flow", "diffusion.prediction_type": target})
    taught = parse(config_dict(**SMALLEST, **{"diffusion.schedule": "flow"}))
    teacher = build_model(model_graph(taught), random_params(taught, 0.5))
    params, graph = random_params(settings, 0.3), model_graph(settings)
    frozen = Frozen(teacher=Teacher(teacher, taught.diffusion.prediction_type))
    batch, null = batch_for(settings)
    batch["dropped"] = jnp.array(HIDDEN)
    schedule, shift = settings.process.schedule, settings.context.shift

    @jax.jit
    def both(params):
        model = build_model(graph, params, frozen)
        loss, _ = loss_fn(model, batch, null, settings.process, settings)
        x0 = batch["image"] / 127.5 - 1
        times = step_times(schedule, schedule.share(batch["t"]), 4, 3)
        t = times[0]
        captions = teacher.encode(batch["token_ids"], batch["token_mask"])
        r = teacher.relate(x0, captions, 1000 * t)
        x_t = diffusion.q_sample(schedule, x0, r, t, batch["noise"], shift)

        def shown(model):
            full = model.encode(batch["token_ids"], batch["token_mask"])
            empty = model.encode(null["token_ids"], null["token_mask"])
            rows = [
                empty if hidden else jax.tree.map(lambda a, i=i: a[i : i + 1], full)
                for i, hidden in enumerate(HIDDEN)
            ]
            return jax.tree.map(lambda *rows: jnp.concatenate(rows), *rows)

        text = shown(teacher)
        denoise = make_denoise(teacher, schedule, text, prediction_type="v", shift=shift)
        M = teacher_motion(denoise, schedule, x_t, times, shift)
        output = model.predict(x_t, 1000 * t, shown(model))
        time = t[:, None, None, None]
        wanted = M if target == "data" else (x_t - M) / time
        return loss, jnp.mean((output - wanted) ** 2)

    loss, expected = both(params)
    assert float(loss) > 1e-3
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion.prediction_type": "x0", "context.estimate": "plugin"}, "velocity, data"),
        ({"context.estimate": "posterior_mean"}, "has no estimate of r"),
        ({"context.kind": "text", "context.shift": "prior"}, "a kind that reads x0, or 'none'"),
        ({"sample.steps": 5}, "sample.steps=5.*distill.steps=4"),
        ({"sample.spacing": "leading"}, "'leading'"),
        ({"sample.sampler": "dpmpp_2m"}, "'ddim' or 'euler'"),
        ({"distill.guidance": 2.0, "sample.guidance": 3.0}, "sample.guidance=3.0.*already"),
        ({"distill.substeps": 1}, "distill.substeps=1: must be at least 2"),
        ({"distill.substeps": 20}, "80 steps; diffusion.num_timesteps=50"),
    ],
)
def test_students_that_cannot_learn_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        settings_of(**changes)
    assert "\n" not in str(error.value)
