"""What samplers, losses and networks agree on: denoise and context functions, samplers."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Real

from contextdiff_jax.diffusion.process import Samples
from contextdiff_jax.diffusion.schedule import Schedule


class Denoised(NamedTuple):
    """An estimate of the clean sample and of its context at the current and at the next time."""

    x0: Float[Array, "B *D"]
    context_t: Float[Array, "B *D"]
    context_s: Float[Array, "B *D"]


@runtime_checkable
class DenoiseFn(Protocol):
    """`denoise(x_t, t, s)` estimates the clean sample, and the context at t (where x_t is) and at s
    (where it goes); with `Reuse` it has a fourth argument, what was kept.
    """

    def __call__(
        self, x_t: Float[Array, "B *D"], t: Real[Array, "B"], s: Real[Array, "B"]
    ) -> Denoised: ...


@runtime_checkable
class ContextFn(Protocol):
    """`context_fn(x0, t)` is r_phi with its text bound."""

    def __call__(self, x0: Float[Array, "B *D"], t: Real[Array, "B"]) -> Float[Array, "B *D"]: ...


@runtime_checkable
class KeepFn(Protocol):
    """`keep(x_t, t)` computes what the next steps use again, a tree of arrays."""

    def __call__(self, x_t: Float[Array, "B *D"], t: Real[Array, "B"]) -> PyTree: ...


@runtime_checkable
class ProjectFn(Protocol):
    """`project(x, t, context)` replaces x after a step; t is where the next one begins,
    `schedule.clean` at the end, and context is the estimate of r there.
    """

    def __call__(
        self, x: Float[Array, "B *D"], t: Real[Array, ""], context: Float[Array, "B *D"]
    ) -> Float[Array, "B *D"]: ...


@runtime_checkable
class Sampler(Protocol):
    """`ddim_sample` and its likes: noise x_T to clean data x0, over descending times (`timesteps`
    of a discrete schedule, floats of a path).

    A sampler takes every argument and may ignore what it has no use for. It may also take, by name,
    the options `next_timesteps`, `project` and `reuse` of `ddim_sample`. One that doesn't works all
    the same: its steps end where the next begins, and inpainting and reuse are refused.
    """

    def __call__(
        self,
        denoise: DenoiseFn,
        x_T: Samples,
        schedule: Schedule,
        timesteps: Real[ArrayLike, "S"],
        eta: float = 0.0,
        key: PRNGKeyArray | None = None,
        shift: str = "quadratic",
    ) -> Float[Array, "B *D"]: ...


class Reuse(NamedTuple):
    """A part of a step that serves the next ones too: `keep(x_t, t)` is computed every `interval`
    steps and handed to the denoise function, `denoise(x_t, t, s, kept)`.
    """

    interval: int
    keep: KeepFn
