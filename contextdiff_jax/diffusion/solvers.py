"""Solvers of higher order, under the shift.

The marginals (2) move along d(x / b) = M d(a / b), (12): the equation of plain diffusion, with M in
the place of x0_hat. In the logarithm of the ratio, l = log(a / b), which every published solver of
this kind integrates in,

x_s = (b_s / b_t) x_t + b_s int e^l M dl = (b_s / b_t) x_t + (a_s - a_t b_s / b_t) <M>         (13)

where <M> is M's mean over the step, weighted by e^l. A solver is its guess of <M> from the M that
it knows: sum_j w_j M_j, with sum_j w_j = 1. Euler and Heun integrate in the ratio itself,

y = x / c,  tau = b / c,  dy / dtau = (y - M) / tau,  c = a, on `flow` c = a + b               (14)

which gives steps of the form (13) too.

M is x0 and r together, M_j = x0_j + rho_j r_j. But rho is known at all times: it needn't be guessed
with M, its mean over the step is <rho> (a_s - a_t b_s / b_t) = k_s - k_t b_s / b_t. Hence either

x_s = K x_t + (a_s - a_t K) sum_j w_j (x0_j + rho_j r_j),  K = b_s / b_t                       (15)
x_s = K x_t + sum_j w_j ((a_s - a_t K) x0_j + (k_s - k_t K) r_j)                               (16)

each for the solvers whose error it makes smaller, as docs/mathematics.md has it: (15) for Heun and
UniPC, (16) for the others and for the last step of all, to clean data. (16) with one w, 1, is
DDIM. With K = sqrt(b_s^2 - sigma^2) / b_t, (3), it is the same for sampling with noise, and with
one w DDPM. Where r depends on t, r_t -> r_s at the step's own estimate is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Real

from contextdiff_jax.diffusion.loop import scan_steps
from contextdiff_jax.diffusion.process import (
    Samples,
    drift_coefficient,
    posterior_scales,
    shift_coefficient,
)
from contextdiff_jax.diffusion.protocols import Denoised, DenoiseFn, ProjectFn, Reuse, Sampler
from contextdiff_jax.diffusion.schedule import Schedule

PerStep = Float[Array, "S"]
Weights = tuple[PerStep, ...]  # of the estimates in this step, the last, the one before it
_FAR = 1000.0  # b / a, from which on Heun's step is Euler's: `cosine` ends at 20,000, a = 0 at inf


class Grid(NamedTuple):
    """The steps of a sampler, from times `t` to times `s`. The last is of first order to clean
    data, and, as in diffusers, to a noisy end of fewer than 15.
    """

    schedule: Schedule
    shift: str
    t: Real[Array, "S"]
    s: Real[Array, "S"]
    first_order_end: bool = True

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        shift: str,
        times: Real[ArrayLike, "S"],
        end: Real[ArrayLike, ""] | None = None,
    ) -> Grid:
        """The grid of descending times, to `end` (None: clean data)."""
        times, last = jnp.asarray(times), schedule.clean if end is None else end
        ends = jnp.append(times[1:], last)
        return cls(schedule, shift, times, ends, end is None or len(times) < 15)

    @property
    def steps(self) -> np.ndarray:
        """The steps' numbers, 0..S-1."""
        return np.arange(self.t.shape[0])

    def middle(self, *left_out: int) -> Bool[np.ndarray, "S"]:
        """Which steps aren't `left_out`, numbers from the start or (negative) from the end."""
        return ~np.isin(self.steps, np.array(left_out) % max(len(self.steps), 1))

    @property
    def log_ratio(self) -> tuple[PerStep, PerStep]:
        """l = log(a / b) at t and at s."""
        at = [(self.schedule.alpha(t), self.schedule.sigma(t)) for t in (self.t, self.s)]
        return tuple(jnp.log(a) - jnp.log(b) for a, b in at)


class Rows(NamedTuple):
    """(15) or (16) for every step: the factor of its start, and those of x0, r and r_s - r_t of the
    three latest estimates.
    """

    keep: PerStep
    estimates: Float[Array, "S 3 F"]


class Plan(NamedTuple):
    """All steps of a solver.

    Attributes:
      t, s: where the denoise function is called, and where x goes.
      rows: from the base point to s.
      noise: the standard deviation of what is added, if any.
      fresh: whether the base point is x; else it is `base` of the base point before.
      stages: calls that make one step.
    """

    t: Real[Array, "S"]
    s: Real[Array, "S"]
    rows: Rows
    noise: PerStep | None = None
    fresh: Bool[Array, "S"] | None = None
    base: Rows | None = None
    stages: int = 1


def make_rows(
    grid: Grid,
    weights: Weights,
    place: PerStep | float = 0.0,
    *,
    eta: float = 0.0,
    start: Real[Array, "S"] | None = None,
    end: Real[Array, "S"] | None = None,
    moves: tuple[Array | float, ...] = (1.0, 0.0, 0.0),
    own_rho_at: Real[Array, "S"] | None = None,
) -> tuple[Rows, PerStep]:
    """(16) with these weights, and the deviation of the noise, from `start` (t) to `end` (s); (15)
    with the times of this step's estimates in `own_rho_at`.

    `place`: where in the step the weighted estimates are, 0 at its start. `moves` are 1 for those
    that say how r moves with time: k_s r_s - k_t K r_t is exact at a fixed x0, and the part of it
    that isn't in r at `place` is added.
    """
    t, s = grid.t if start is None else start, grid.s if end is None else end
    schedule, shift = grid.schedule, grid.shift
    keep, variance = posterior_scales(schedule, t, s, eta)
    data = schedule.alpha(s) - keep * schedule.alpha(t)
    k_s = shift_coefficient(schedule, s, shift)
    context = k_s - keep * shift_coefficient(schedule, t, shift)
    w = [jnp.broadcast_to(each, keep.shape) for each in (*weights, *[0.0] * (3 - len(weights)))]
    columns = [jnp.stack([data * each for each in w], 1)]
    if shift != "none":
        moved = k_s - place * context
        coefficients = [context] * 3
        if own_rho_at is not None:
            rho = drift_coefficient(schedule, own_rho_at, shift)
            inner = schedule.variance(s) > 0
            coefficients = [jnp.where(inner, data * jnp.roll(rho, j), context) for j in range(3)]
        columns.append(jnp.stack([c * each for c, each in zip(coefficients, w, strict=True)], 1))
        columns.append(jnp.stack([moved * each for each in moves], 1))
    return Rows(keep, jnp.stack(columns, -1)), jnp.sqrt(variance)


def parts_of(out: Denoised, shift: str) -> tuple[Array, ...]:
    """The parts of an estimate that rows have factors for."""
    if shift == "none":
        return (out.x0,)
    return out.x0, out.context_t, out.context_s - out.context_t


def combine(rows: Rows, start: Array, estimates: tuple[tuple[Array, ...], ...]) -> Array:
    """One row's (15) or (16) from `start`, of the latest estimates, the newest first."""
    total = rows.keep * start
    for row, parts in zip(rows.estimates, estimates, strict=True):
        total = total + sum(c * part for c, part in zip(row, parts, strict=True))
    return total


def run_plan(
    plan: Plan,
    denoise: DenoiseFn,
    x_T: Samples,
    schedule: Schedule,
    key: PRNGKeyArray | None,
    shift: str,
    project: ProjectFn | None,
    reuse: Reuse | None,
) -> Float[Array, "B *D"]:
    """x0 by the steps of a plan: one scan, with one call of `denoise` a step.

    Raises ValueError for noise without a key.
    """
    if plan.noise is not None and key is None:
        raise ValueError("sampling with noise needs a key")

    def step(carry, inputs, *kept):
        x, base, older = carry
        (t, s), rows, noise, fresh, base_rows, step_key = inputs
        B = x.shape[:1]
        out = denoise(x, jnp.full(B, t), jnp.full(B, s), *kept)
        estimates = (parts_of(out, shift), *older)
        if fresh is None:
            base = x
        else:
            base = jnp.where(fresh, x, combine(base_rows, base, estimates))
        x = combine(rows, base, estimates)
        if noise is not None:
            x = x + noise * jax.random.normal(step_key, x.shape, x.dtype)
        x = x if project is None else project(x, s, out.context_s)
        return (x, base, estimates[:2]), None

    x_T = jnp.asarray(x_T)
    keys = None if plan.noise is None else jax.random.split(key, plan.t.shape[0])
    nothing = (jnp.zeros_like(x_T),) * plan.rows.estimates.shape[-1]
    inputs = (plan.t, plan.s), plan.rows, plan.noise, plan.fresh, plan.base, keys
    carry = x_T, x_T, (nothing, nothing)
    return scan_steps(step, carry, inputs, reuse, lambda carry: carry[0])[0]


def linear(make_plan: Callable[[Grid], Plan]) -> Sampler:
    """The sampler whose steps are linear in the estimates, as `make_plan` says."""

    def sample(
        denoise: DenoiseFn,
        x_T: Samples,
        schedule: Schedule,
        timesteps: Real[ArrayLike, "S"],
        eta: float | Float[Array, ""] = 0.0,
        key: PRNGKeyArray | None = None,
        shift: str = "quadratic",
        *,
        project: ProjectFn | None = None,
        reuse: Reuse | None = None,
        end: Real[ArrayLike, ""] | None = None,
    ) -> Float[Array, "B *D"]:
        plan = make_plan(Grid.of(schedule, shift, timesteps, end))
        return run_plan(plan, denoise, x_T, schedule, key, shift, project, reuse)

    sample.__name__, sample.__doc__ = make_plan.__name__, make_plan.__doc__
    sample.make_plan = make_plan  # for its inversion
    return sample


@linear
def euler(grid: Grid) -> Plan:
    """Euler's method in tau (Karras et al. 2022, alg. 1 without its correction): <M> = M_t."""
    return Plan(grid.t, grid.s, make_rows(grid, (jnp.ones(len(grid.steps)),))[0])


def _two_points(grid: Grid, *, last: bool = False) -> tuple[Weights, PerStep]:
    # <M> = M + (h / 2 h_0) (M - M of the step before), h and h_0 the lengths of both in l: M at the
    # middle of the step. The first step has no other, the last goes to l = infinity.
    l_t, l_s = grid.log_ratio
    left_out = (0, -1) if last or grid.first_order_end else (0,)
    h, inner = l_s - l_t, grid.middle(*left_out)
    w = jnp.where(inner, 0.5 * h / jnp.roll(h, 1), 0.0)
    return (1 + w, -w), jnp.where(inner, 0.5, 0.0)


@linear
def dpmpp_2m(grid: Grid) -> Plan:
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2)."""
    return Plan(grid.t, grid.s, make_rows(grid, *_two_points(grid))[0])


@linear
def dpmpp_2m_sde(grid: Grid) -> Plan:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, appendix D.4): noise as at eta = 1, whatever eta is."""
    rows, noise = make_rows(grid, *_two_points(grid), eta=1.0)
    return Plan(grid.t, grid.s, rows, noise)


def _moments(h: PerStep) -> tuple[PerStep, PerStep]:
    # <z> and <z^2> of the place z in a step, 0..1: closed forms cancel in float32 for short steps.
    z, weights = (0.5 * a for a in np.polynomial.legendre.leggauss(24))
    z, h = jnp.asarray(z + 0.5, float), jnp.where(jnp.isfinite(h), h, 1.0)[:, None]
    mass = jnp.asarray(weights, float) * jnp.exp((z - 1) * h)
    mass = mass / mass.sum(1, keepdims=True)
    return (mass * z).sum(1), (mass * z**2).sum(1)


def _select(steps: Bool[np.ndarray, "S"], weights: Weights, others: tuple) -> Weights:
    return tuple(jnp.where(steps, *both) for both in zip(weights, others, strict=True))


@linear
def dpmpp_3m(grid: Grid) -> Plan:
    """DPM-Solver++(3M), of the authors' code (`multistep_dpm_solver_third_update`).

    Its term of M'' has half of Taylor's factor, there and in diffusers: so its order is 2, with a
    smaller error than 2M's. As in diffusers the step before the last is 2M's where there are fewer
    than 15.
    """
    l_t, l_s = grid.log_ratio
    h = l_s - l_t
    r0, r1 = jnp.roll(h, 1) / h, jnp.roll(h, 2) / h
    first, second = _moments(h)
    beta = (first * r0 + 0.5 * second) / (r0 + r1)
    alpha = first + beta
    weights = 1 + alpha / r0, -alpha / r0 - beta / r1, beta / r1
    few = [-2] if len(grid.steps) < 15 else []
    third = grid.middle(0, 1, *([-1] if grid.first_order_end else []), *few)
    lower, place = _two_points(grid)
    weights = _select(third, weights, (*lower, jnp.zeros_like(h)))
    return Plan(grid.t, grid.s, make_rows(grid, weights, jnp.where(third, first, place))[0])


def _again(steps: Bool[Array, "S"], like: Rows) -> dict[str, Array | Rows | int]:
    # These steps begin where the one before them began.
    same = Rows(jnp.ones_like(like.keep), jnp.zeros_like(like.estimates))
    return {"fresh": ~steps, "base": same, "stages": 2}


@linear
def dpmpp_2s(grid: Grid) -> Plan:
    """DPM-Solver++(2S) (Lu et al. 2022, alg. 1): every second step begins again where the one
    before it did, now with M there and at the time between, which is the grid's.
    """
    earlier, (l_t, l_s) = jnp.roll(grid.t, 1), grid.log_ratio
    l_earlier = jnp.roll(l_t, 1)
    # In pairs; the last step is a first one by itself, and with an even number the one before, too.
    pairs = (grid.steps % 2 == 1) & (grid.steps < len(grid.steps) - 1)
    second = pairs & jnp.isfinite(l_earlier)
    w = jnp.where(second, 0.5 * (l_s - l_earlier) / (l_t - l_earlier), 1.0)
    rows, _ = make_rows(
        grid,
        (w, 1 - w),
        jnp.where(second, 0.5, 0.0),
        start=jnp.where(second, earlier, grid.t),
        moves=(1.0, second, 0.0),
    )
    return Plan(grid.t, grid.s, rows, **_again(second, rows))


@linear
def _heun(grid: Grid) -> Plan:
    # Each step is two, Euler's to s and, with M there too, again to s; the last is Euler's alone.
    schedule, S = grid.schedule, len(grid.steps)
    t, s = (jnp.repeat(times, 2)[:-1] for times in (grid.t, grid.s))
    second = jnp.asarray(np.arange(2 * S - 1) % 2 == 1)
    ratio = [schedule.sigma(u) / schedule.scale(u) for u in (t, s)]
    # The mean of dy / dtau at both ends, (14), in the form (13): half of b / a times s's error.
    second_order = second & (jnp.maximum(*ratio) < _FAR)
    w = jnp.where(second_order, 0.5 * ratio[0] / ratio[1], 0.0)
    w_now, at = jnp.where(second, w, 1.0), jnp.where(second, s, t)
    rows, _ = make_rows(
        grid._replace(t=t, s=s),
        (w_now, 1 - w_now),
        jnp.where(second, w, 0.0),
        moves=(1.0, second, 0.0),
        own_rho_at=at,
    )
    return Plan(at, s, rows, **_again(second, rows))


def heun(
    denoise: DenoiseFn,
    x_T: Samples,
    schedule: Schedule,
    timesteps: Real[ArrayLike, "S"],
    eta: float | Float[Array, ""] = 0.0,
    key: PRNGKeyArray | None = None,
    shift: str = "quadratic",
    *,
    project: ProjectFn | None = None,
    end: Real[ArrayLike, ""] | None = None,
) -> Float[Array, "B *D"]:
    """Heun's method in tau (Karras et al. 2022, alg. 1): 2 S - 1 calls of `denoise` in S steps."""
    return _heun(denoise, x_T, schedule, timesteps, eta, key, shift, project=project, end=end)


heun.make_plan = _heun.make_plan


@linear
def unipc(grid: Grid) -> Plan:
    """UniPC-2 in data prediction with B_2 (Zhao et al. 2023, alg. 1-2): 2M, and x at each step's
    end corrected by the M that the next step begins with.
    """
    l_t, l_s = grid.log_ratio
    h = jnp.roll(l_s - l_t, 1)  # of the step that is corrected
    ratio = jnp.roll(h, 1) / h
    first, second = _moments(h)
    # M is the parabola through three points: <1>, <z>, <z^2> are exact.
    slope = (first - second) / (1 + ratio)
    weights = first - slope, 1 - (first - slope) + slope / ratio, -slope / ratio
    inner = grid.middle(0, 1)  # the first step was of first order
    corrected, _ = make_rows(
        grid,
        _select(inner, weights, (0.5, 0.5, 0.0)),
        jnp.where(inner, first, 0.5),
        start=jnp.concatenate([grid.t[:1], grid.t[:-1]]),
        end=grid.t,
        moves=(0.0, 1.0, 0.0),
        own_rho_at=grid.t,
    )
    rows, _ = make_rows(grid, *_two_points(grid, last=True), own_rho_at=grid.t)
    return Plan(grid.t, grid.s, rows, fresh=jnp.asarray(grid.steps == 0), base=corrected)


dpmpp_2m_sde.noisy = True
_NAMED = (euler, heun, dpmpp_2s, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, unipc)
SOLVERS = {solver.__name__: solver for solver in _NAMED}
