"""A set of 25 points in the plane, where everything can be known: the exact Bayes denoiser beside a
small learned one.

The points lie on a jittered grid with unequal weights, five in each of five classes; the class is
the text c. Under a shift with context r(x0, c) the noisy marginal is a mixture of Gaussians,

    q(x_t | c) = sum_i w_i N(a_t x_i + k_t r_i, b_t^2 I)                            (1)

so E[x0 | x_t, c] and E[r | x_t, c] are sums over 25 points. A sampler that is right ends on the
points of the class with their weights; its error is the total variation from them, averaged over
classes. Whatever `plugin` loses there is the estimate's own, no network's.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from contextdiff_jax import diffusion
from contextdiff_jax.experiments.plan import Cell
from contextdiff_jax.experiments.toy_config import ToyConfig
from contextdiff_jax.runtime.fields import check_choice, strict
from contextdiff_jax.runtime.keys import make_key

CLASSES = 5


def points() -> tuple[Float[np.ndarray, "25 2"], Float[np.ndarray, 25], Int[np.ndarray, 25]]:
    """Positions within [-1, 1], weights that sum to 1 in each class, classes."""
    rng = np.random.default_rng(2402)
    grid = np.stack(np.meshgrid(*[np.linspace(-0.9, 0.9, 5)] * 2), axis=-1).reshape(-1, 2)
    weights = rng.dirichlet(np.full(CLASSES, 2.0), CLASSES).reshape(-1)
    return (
        grid + rng.uniform(-0.1, 0.1, grid.shape),
        weights,
        rng.permutation(np.repeat(np.arange(CLASSES), 5)).argsort() % 5,
    )


def fixed_context(kind: str) -> Callable:
    """Return r(x0, c) of the exact study, of size 1 or so.

    `linear` in x0, `sine` (far from linear), or `text` (c alone).
    """
    matrix = jnp.asarray(np.random.default_rng(16627).normal(size=(2, 2)) / 0.7, jnp.float32)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(CLASSES, 2)), jnp.float32)
    kinds = {
        "none": lambda x0, c: jnp.zeros_like(x0),
        "linear": lambda x0, c: x0 @ matrix,
        "sine": lambda x0, c: 3 * jnp.sin(3 * x0 @ matrix) / 0.7,
        "text": lambda x0, c: table[c],
    }
    check_choice("kind", kind, kinds)
    return kinds[kind]


class Network(nnx.Module):
    """Denoiser and context of the learned study: MLPs of (x, time, class)."""

    def __init__(self, config: ToyConfig, rngs: nnx.Rngs):
        kind, width, head_width = config.kind, config.width, config.head_width
        self.kind, self.max_gain = kind, config.max_gain
        self.head = config.estimate == "posterior_mean"
        self.embed = nnx.Linear(2 + 16 + 16 + CLASSES, width, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(width, 4 if self.head else 2, rngs=rngs)
        inputs = {
            "none": 0,
            "text": CLASSES,
            "linear": 2 + CLASSES,
            "affine": 2 + CLASSES,
            "bilinear": 2 * CLASSES,
            "mlp": 2 + CLASSES,
        }
        check_choice("kind", kind, inputs)
        if kind != "none":
            self.gamma = nnx.Param(jnp.zeros(()))
            self.r_in = nnx.Linear(inputs[kind], width if kind == "mlp" else 2, rngs=rngs)
            self.r_out = nnx.Linear(width, 2, rngs=rngs) if kind == "mlp" else None
            timed = config.time_dependent
            self.r_time = (
                nnx.Linear(16, width if kind == "mlp" else 2, rngs=rngs) if timed else None
            )
        self.head_in = nnx.Linear(width, head_width, rngs=rngs) if head_width else None
        self.head_out = nnx.Linear(head_width, 2, rngs=rngs) if head_width else None

    def __call__(
        self, x: Float[Array, "B 2"], t: Int[Array, "B"], c: Int[Array, "B"]
    ) -> Array | tuple[Array, Array]:
        """Estimate x0; with a second head r, too."""
        time = _phases(t)
        # Five points a side need fine features.
        place = (x[..., None] * np.pi * 2 ** np.arange(4)).reshape(len(x), 8)
        phases = jnp.concatenate([time, place], -1)
        h = self.embed(
            jnp.concatenate([x, jnp.sin(phases), jnp.cos(phases), jax.nn.one_hot(c, CLASSES)], -1)
        )
        for layer in self.hidden:
            h = h + layer(jax.nn.silu(h))
        out = self.out(jax.nn.silu(h))
        if not self.head:
            return out
        r_hat = (
            out[:, 2:]
            if self.head_in is None
            else self.head_out(jax.nn.silu(self.head_in(jax.nn.silu(h))))
        )
        return out[:, :2], r_hat

    def context(
        self, x0: Float[Array, "B 2"], c: Int[Array, "B"], t: Int[Array, "B"]
    ) -> Float[Array, "B 2"]:
        """Return r(x0, c[, t]), of root mean square `max_gain tanh(gamma)` in each sample.

        As the pictures' (models.context).
        """
        if self.kind == "none":
            return jnp.zeros_like(x0)
        onehot = jax.nn.one_hot(c, CLASSES)
        h = self.r_in(
            {
                "text": lambda: onehot,
                "linear": lambda: jnp.concatenate([x0, onehot], -1),
                "affine": lambda: jnp.concatenate([x0, onehot], -1),
                "mlp": lambda: jnp.concatenate([x0, onehot], -1),
                "bilinear": lambda: (x0[:, :, None] * onehot[:, None]).reshape(len(x0), -1),
            }[self.kind]()
        )
        if self.r_time is not None:
            h = h + self.r_time(jnp.concatenate([jnp.sin(_phases(t)), jnp.cos(_phases(t))], -1))
        raw = h if self.r_out is None else self.r_out(jax.nn.silu(h))
        sized = raw
        if self.kind == "affine":
            # Divided by the most that raw can be, whatever x0: so it stays linear in x0.
            constant = raw - x0 @ self.r_in.kernel[:2]
            sized = jnp.abs(constant) + jnp.abs(self.r_in.kernel[:2]).sum(0)
        rms = jnp.sqrt(jnp.mean(sized**2, -1, keepdims=True) + 1e-8)
        return self.max_gain * jnp.tanh(self.gamma[...]) * raw / rms


def _phases(t: Int[Array, "B"]) -> Float[Array, "B 8"]:
    return t[:, None] / 1000 * np.pi * 2 ** np.arange(8) / 2


def exact_estimates(schedule: diffusion.NoiseSchedule, context: Callable, shift: str) -> Callable:
    """Make `estimates(x_t, t, c) -> (E[x0 | x_t, c], E[r | x_t, c])` by (1)."""
    positions, weights, classes = points()
    x, log_w = jnp.asarray(positions, jnp.float32), jnp.log(jnp.asarray(weights, jnp.float32))

    def estimates(x_t, t, c):
        r = jax.vmap(lambda one: context(x, jnp.full(len(x), one)))(c)  # [B, 25, 2]
        abar = schedule.alphas_cumprod[t]
        a, k, variance = jnp.sqrt(abar), diffusion.shift_coefficient(schedule, t, shift), 1 - abar
        mean = a[:, None, None] * x + k[:, None, None] * r
        logits = log_w - ((x_t[:, None] - mean) ** 2).sum(-1) / (2 * variance[:, None])
        p = jax.nn.softmax(jnp.where(classes == c[:, None], logits, -jnp.inf))
        return p @ x, (p[..., None] * r).sum(1)

    return estimates


def train_network(
    config: ToyConfig, schedule: diffusion.NoiseSchedule
) -> tuple[Network, dict[str, Any]]:
    """Train denoiser and context together on draws of the set; return also loss and gain by step.

    The loss is the mean squared error of x0. All steps are one scan.
    """
    positions, weights, classes = (jnp.asarray(a) for a in points())
    model = Network(config, rngs=nnx.Rngs(make_key(config.seed)))
    graph, params = nnx.split(model)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    probabilities = weights / weights.sum()

    def loss_fn(params, key):
        model = nnx.merge(graph, params)
        keys = jax.random.split(key, 3)
        i = jax.random.choice(keys[0], len(positions), (config.batch_size,), p=probabilities)
        x0, c = positions[i].astype(jnp.float32), classes[i]
        t = jax.random.randint(keys[1], x0.shape[:1], 0, schedule.num_timesteps)
        r = model.context(x0, c, t)
        x_t = diffusion.q_sample(
            schedule, x0, r, t, jax.random.normal(keys[2], x0.shape), config.shift
        )
        out = model(x_t, t, c)
        head = jnp.zeros(())
        if model.head:
            out, r_hat = out
            head = jnp.mean((r_hat - jax.lax.stop_gradient(r)) ** 2)
        learned = model.kind != "none"
        gain = config.max_gain * jnp.tanh(model.gamma[...]) if learned else jnp.zeros(())
        loss = jnp.mean((out - x0) ** 2)
        return loss + head, (loss, gain)

    def step(carry, key):
        params, opt = carry
        grads, logged = jax.grad(loss_fn, has_aux=True)(params, key)
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), opt), logged

    keys = jax.random.split(make_key(config.seed), config.steps)
    run = jax.jit(lambda params, keys: jax.lax.scan(step, (params, optimizer.init(params)), keys))
    (params, _), (loss, gain) = run(params, keys)
    steps = np.linspace(0, config.steps - 1, 50).astype(int)
    curves = {
        "step": steps.tolist(),
        "loss": np.asarray(loss)[steps].tolist(),
        "context_gain": np.asarray(gain)[steps].tolist(),
    }
    return nnx.merge(graph, params), curves


def toy_cell(cell: Cell, workdir: pathlib.Path) -> dict[str, Any]:
    """Measure the total variation from the true weights, and the bound's KL terms.

    Options: `num` samples and `bound` points (of the bound) a class, `samplers` {name: steps}.
    Nothing is written to `workdir`.
    """
    config = strict(ToyConfig, "config", cell.config)
    schedule = diffusion.make_schedule("cosine")
    curves: dict[str, Any] = {"step": [], "loss": [], "context_gain": []}
    if config.denoiser == "exact":
        graph, params, context = None, None, fixed_context(config.kind)
        exact = exact_estimates(schedule, context, config.shift)
    else:
        model, curves = train_network(config, schedule)
        graph, params = nnx.split(model)

    # Parameters are arguments, so that the seeds of a variant share their compiled programs.
    def functions(params, c):
        """Make denoise and context_fn for classes c."""
        if graph is None:
            both, r = exact, lambda x0, c, t: context(x0, c)
        else:
            model = nnx.merge(graph, params)
            both, r = (
                (model if model.head else lambda x, t, c: (model(x, t, c), None)),
                model.context,
            )

        def denoise(x_t, t, s):
            x0, r_hat = both(x_t, t, c)
            r_hat = r_hat if config.estimate == "posterior_mean" else r(x0, c, t)
            moves = config.denoiser == "learned" and config.time_dependent
            return diffusion.Denoised(x0, r_hat, r(x0, c, jnp.maximum(s, 0)) if moves else r_hat)

        return denoise, lambda x0, t: r(x0, c, t)

    scores = _scores(functions, params, schedule, cell.options, config)
    return {"scores": scores, "marks": {}, "training": curves}


def _scores(
    functions: Callable,
    params: Any,
    schedule: diffusion.NoiseSchedule,
    options: dict[str, Any],
    config: ToyConfig,
) -> dict[str, Any]:
    shift, key = config.shift, make_key(config.seed)
    c = jnp.repeat(jnp.arange(CLASSES), options["num"])
    scores: dict[str, Any] = {"floor": {"tv": total_variation(_draws(key, options["num"]), c)}}
    noise = jax.random.normal(jax.random.fold_in(key, 1), (len(c), 2))
    for sampler, steps in options["samplers"].items():
        out = np.asarray(
            _make_sample(functions, schedule, sampler, steps, shift)(params, noise, key, c)
        )
        scores[sampler] = {"tv": total_variation(out, c), "off": _off_support(out)}

    @jax.jit
    def terms(params, x0, key, c):
        denoise, context_fn = functions(params, c)
        found = diffusion.vlb(denoise, x0, context_fn, schedule, key, shift)
        return found["kl"].sum(0).mean(), found["prior"].mean()

    x0 = jnp.asarray(_draws(jax.random.fold_in(key, 2), options["bound"]), jnp.float32)
    kl, prior = terms(params, x0, key, jnp.repeat(jnp.arange(CLASSES), options["bound"]))
    return scores | {"bits": {"kl": float(kl), "prior": float(prior)}}


def _make_sample(
    functions: Callable, schedule: diffusion.NoiseSchedule, sampler: str, steps: int, shift: str
) -> Callable:
    timesteps, run = (
        diffusion.spaced_timesteps(schedule.num_timesteps, steps),
        diffusion.get_sampler(sampler),
    )

    @jax.jit
    def sample(params, noise, key, c):
        denoise, context_fn = functions(params, c)
        # With the text's prior shift x_T ~ N(k_T r, I); with the quadratic one k_T is 0.
        t = jnp.full(len(c), timesteps[0])
        x_T = noise + diffusion.marginal_mean(
            schedule, jnp.zeros_like(noise), context_fn(noise, t), t, shift
        )
        return run(denoise, x_T, schedule, timesteps, 0.0, key, shift)

    return sample


def _draws(key: Array, num: int) -> Float[np.ndarray, "N 2"]:
    """Draw `num` points of each class by their weights."""
    positions, weights, classes = points()
    drawn = []
    for one in range(CLASSES):
        mine = np.flatnonzero(classes == one)
        i = jax.random.choice(
            jax.random.fold_in(key, one),
            len(mine),
            (num,),
            p=jnp.asarray(weights[mine] / weights[mine].sum()),
        )
        drawn.append(positions[mine][np.asarray(i)])
    return np.concatenate(drawn)


def total_variation(samples: Float[np.ndarray, "N 2"], c: Int[Array, "N"]) -> float:
    """Distance of the shares of the nearest points from the true weights, mean over classes."""
    positions, weights, classes = points()
    nearest = ((samples[:, None] - positions) ** 2).sum(-1).argmin(-1)
    distances = []
    for one in range(CLASSES):
        true = np.where(classes == one, weights, 0)
        shares = (
            np.bincount(nearest[np.asarray(c) == one], minlength=len(weights))
            / (np.asarray(c) == one).sum()
        )
        distances.append(0.5 * np.abs(shares - true / true.sum()).sum())
    return float(np.mean(distances))


def _off_support(samples: Float[np.ndarray, "N 2"]) -> float:
    """Share of samples farther than 0.1 from every point."""
    positions, _, _ = points()
    return float((((samples[:, None] - positions) ** 2).sum(-1).min(-1) > 0.01).mean())
