"""The bound on a run's -log2 p(picture | caption), in bits/dim: exact in t, or at a seeded part of
the timesteps.

    L = L_T + sum_{t=1}^{T-1} KL_t + L_0        (diffusion.losses, (7)-(9))

The sum costs T - 1 network calls a picture. So 1..T-1 is cut into K strata of n_s neighbours, each
picture draws one t_s uniformly in each, and

    L_T + sum_s n_s KL_{t_s} + L_0        (1)

has the same expectation, for every K. Strata grow with the cube of t: measured on `shapes`, KL_t
falls by 10^3 over the first tenth of the timesteps and is flat after. So the first terms are all
there, and the draws add little to what the pictures' totals differ by anyway; their standard error
covers both. K = T - 1 is the whole sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.diffusion.samplers import DenoiseFn
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.denoising import make_denoise


class Bound(NamedTuple):
    """Bits/dim by picture, and the KL a timestep by stratum (mean over pictures)."""

    total: Float[np.ndarray, "N"]
    prior: Float[np.ndarray, "N"]
    kl: Float[np.ndarray, "N"]
    decoder: Float[np.ndarray, "N"]
    edges: Int[np.ndarray, "K1"]  # stratum s is edges[s] .. edges[s + 1] - 1
    kl_by_t: Float[np.ndarray, "K"]

    @property
    def standard_error(self) -> float:
        """The standard error of the mean total."""
        return float(self.total.std(ddof=1) / np.sqrt(len(self.total)))


def make_strata(num_timesteps: int, count: int | None = None) -> Int[np.ndarray, "K1"]:
    """Edges of `count` strata of 1..T-1, narrow at small t; None: one for each t. ValueError
    outside 1..T-1.
    """
    terms = num_timesteps - 1
    count = terms if count is None else count
    if not 1 <= count <= terms:
        raise ValueError(f"--bound_timesteps={count}: must lie in 1..{terms}, or be 0 for all")
    i = np.arange(count + 1)
    edges = np.floor(terms * (i / count) ** 3).astype(int)
    # At least one t each: not below i, and at the end not above what leaves room for the rest.
    return 1 + np.minimum(np.maximum(edges, i), terms - (count - i))


def bound_terms(
    denoise: DenoiseFn,
    x0: Float[Array, "B *D"],
    context_fn: Callable,
    schedule: diffusion.NoiseSchedule,
    key: PRNGKeyArray,
    edges: Int[ArrayLike, "K1"],
    shift: str = "quadratic",
) -> dict[str, Array]:
    """The terms of (1): `prior` [B], `kl` [K, B] (each KL_{t_s}, not yet times n_s), `decoder` [B].

    With every t a stratum these are `diffusion.vlb`'s terms, with its noise.
    """
    starts, sizes = edges[:-1], jnp.diff(edges)
    draw_key = jax.random.fold_in(key, schedule.num_timesteps)

    def row(_, inputs):
        index, start, size = inputs
        u = jax.random.uniform(jax.random.fold_in(draw_key, index), x0.shape[:1])
        t = start + jnp.minimum((u * size).astype(jnp.int32), size - 1)
        kl = diffusion.vlb_kl(
            denoise, x0, context_fn, schedule, jax.random.fold_in(key, start), t, shift
        )
        return None, kl

    _, kl = jax.lax.scan(row, None, (jnp.arange(len(starts)), starts, sizes))
    prior, decoder = diffusion.vlb_ends(
        denoise, x0, context_fn, schedule, jax.random.fold_in(key, 0), shift
    )
    return {"prior": prior, "kl": kl, "decoder": decoder}


def collect(parts: Iterable[Mapping[str, ArrayLike]], edges: Int[np.ndarray, "K1"]) -> Bound:
    """One Bound from the `bound_terms` of all batches."""
    rows = [{name: np.asarray(value, np.float64) for name, value in part.items()} for part in parts]
    prior, kl, decoder = (
        np.concatenate([row[name] for row in rows], axis=-1) for name in ("prior", "kl", "decoder")
    )
    summed = np.diff(edges) @ kl
    return Bound(prior + summed + decoder, prior, summed, decoder, edges, kl.mean(1))


def model_bound(
    model: ContextDiffusion,
    process: Process,
    x0: Float[Array, "B *D"],
    captions: Captions,
    key: PRNGKeyArray,
    edges: Int[ArrayLike, "K1"],
) -> dict[str, Array]:
    """`bound_terms` of the model as it samples at guidance 1."""
    schedule = process.schedule
    denoise = make_denoise(
        model,
        schedule,
        captions,
        prediction_type=process.prediction_type,
        shift=process.shift,
    )

    def context_fn(x, t):
        return model.relate(x, captions, schedule.network_time(t))

    return bound_terms(denoise, x0, context_fn, schedule, key, edges, process.shift)
