"""Distillation: one step of a student for several of its teacher (after Salimans & Ho 2022, who
take two, and halve again and again).

A DDIM step of the teacher moves x by its estimates of x0 and of r. Several of them lead from x_t to
x_s, and x_s = K x_t + (a_s - a_t K) M, K = b_s / b_t, (12) of `diffusion.process`, says by which M
one step leads there: that is the student's target. M holds x0 and the context together, so the
student keeps what the context did to the path, and needs no estimate of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.likelihood import flow_velocity
from contextdiff_jax.diffusion.process import bcast
from contextdiff_jax.diffusion.samplers import DenoiseFn
from contextdiff_jax.models.contextdiff import ContextDiffusion, Frozen, Teacher
from contextdiff_jax.models.denoising import empty_like, make_denoise, related
from contextdiff_jax.models.low_resolution import LowResolution
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.cached_text import captions_of
from contextdiff_jax.training.objective import drop


def load_teacher(settings: Settings, frozen: Frozen) -> Teacher:
    """The model of `distill.teacher`, which shares the frozen networks.

    Raises ValueError for a run whose x_t isn't the student's.
    """
    run = load_run(settings.distill.teacher)
    theirs = run.settings
    for field in (
        "diffusion.schedule",
        "diffusion.num_timesteps",
        "diffusion.beta_start",
        "diffusion.beta_end",
        "diffusion.zero_terminal_snr",
        "context.shift",
        "context.caption",
        "context.clip",
        "data.image_size",
        "data.max_length",
        "data.tokenizer",
        "latent.vae",
        "super_resolution.factor",
        "text.pretrained",
    ):
        section, name = field.split(".")
        ours, other = (getattr(getattr(each, section), name) for each in (settings, theirs))
        if ours != other:
            raise ValueError(
                f"{field}={ours!r}: distill.teacher={settings.distill.teacher!r} has {other!r}"
            )
    model = build_model(model_graph(theirs), run.params, frozen)
    return Teacher(model, theirs.diffusion.prediction_type)


def step_times(
    schedule: diffusion.Schedule, share: Float[Array, "B"], steps: int, substeps: int
) -> Real[Array, "M B"]:
    """The times of the teacher in the student's step at each share of the path: from where it
    begins to where it ends.
    """
    with jax.ensure_compile_time_eval():
        grid = diffusion.time_grid(schedule, steps * substeps, "trailing")
        grid = jnp.append(grid, schedule.clean)
    step = jnp.clip(((1 - share) * steps).astype(jnp.int32), 0, steps - 1)
    return grid[substeps * step + jnp.arange(substeps + 1)[:, None]]


def teacher_motion(
    denoise: DenoiseFn,
    schedule: diffusion.Schedule,
    x_t: Float[Array, "B *D"],
    times: Real[Array, "M B"],
    shift: str,
) -> Float[Array, "B *D"]:
    """M of the one step that leads where DDIM's steps through all the times lead."""

    def step(x, ends):
        t, s = ends
        out = denoise(x, t, s)
        contexts = out.context_t, out.context_s
        return diffusion.q_posterior(schedule, out.x0, x, *contexts, t, s, 0.0, shift).mean, None

    x_s, _ = jax.lax.scan(step, x_t, (times[:-1], times[1:]))
    t, s = times[0], times[-1]
    K = schedule.sigma(s) / schedule.sigma(t)
    moved = schedule.alpha(s) - schedule.alpha(t) * K
    return (x_s - bcast(K, x_t) * x_t) / bcast(moved, x_t)


def distilled_errors(
    model: ContextDiffusion,
    batch: dict[str, Array],
    null: dict[str, Array],
    x0: Float[Array, "B H W C"],
    pixels: Float[Array, "B H2 W2 3"] | None,
    low: LowResolution | None,
    process: diffusion.Process,
    settings: Settings,
) -> tuple[Float[Array, "B"], Real[Array, "B"]]:
    """(each example's mean squared error of the student, the time it is at). With guidance in the
    teacher all captions are read; without, they are dropped for both, and the student can be guided
    as its teacher.
    """
    config, schedule, shift = settings.distill, process.schedule, process.shift
    teacher, noise = model.teacher.model, batch["noise"]
    times = step_times(schedule, schedule.share(batch["t"]), config.steps, config.substeps)
    t = times[0]

    def read(model):
        captions = captions_of(model, batch)
        empty = model.encode_empty(null["token_ids"], null["token_mask"])
        shown = captions if config.guidance != 1 else drop(batch["dropped"], empty, captions)
        texts = captions, shown, empty_like(shown, empty)
        return [each._replace(low=low) for each in texts]

    captions, shown, nothing_said = read(teacher)
    shifted_by = related(process.caption, captions, lambda true: shown)
    r = teacher.relate(x0, shifted_by, schedule.network_time(t), pixels, noise)
    x_t = diffusion.q_sample(schedule, x0, r, t, noise, shift)
    denoise = make_denoise(
        teacher,
        schedule,
        shown,
        nothing_said,
        prediction_type=model.teacher.prediction_type,
        shift=shift,
        guidance=config.guidance,
        caption=process.caption,
    )
    target = teacher_motion(denoise, schedule, x_t, times, shift)
    if process.prediction_type == "velocity":
        nothing = jnp.zeros_like(target)
        moved = diffusion.Denoised(target, nothing, nothing)
        target = flow_velocity(schedule, moved, x_t, t, "none")
    output = model.predict(*schedule.network_input(x_t, t), read(model)[1])
    error = (output - jax.lax.stop_gradient(target)) ** 2
    return jnp.mean(error, axis=tuple(range(1, error.ndim))), t
