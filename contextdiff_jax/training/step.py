"""One training step, from a batch of pictures and token ids to the next state.

x0, text -> r = r_phi(x0, c, t) -> x_t = a_t x0 + k_t r + b_t noise -> network -> weighted squared
error
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num, PyTree

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.process import MOTIONS
from contextdiff_jax.models.contextdiff import ContextDiffusion, Frozen
from contextdiff_jax.models.denoising import related
from contextdiff_jax.models.low_resolution import LowResolution, enlarged, shrink
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.parallel.mesh import tracing_for
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import Settings, ShiftConfig
from contextdiff_jax.settings.super_resolution import SuperResolutionConfig
from contextdiff_jax.training.cached_text import captions_of
from contextdiff_jax.training.distillation import distilled_errors
from contextdiff_jax.training.objective import drop, errors
from contextdiff_jax.training.state import TrainState, apply_gradients, take_if
from contextdiff_jax.training.trainable import split_trainable

Batch = dict[str, Num[Array, "B ..."]]
# Appending a name leaves the draws of the others as they are.
RANDOM_USES = ("timestep", "noise", "dropout", "latent", "level", "low_noise")


def _keys(key: Array) -> dict[str, Array]:
    return {name: jax.random.fold_in(key, i) for i, name in enumerate(RANDOM_USES)}


def x0_shape(batch: Batch, settings: Settings) -> tuple[int, int, int, int]:
    """[B, H, W, C] of x0: pictures may have the shape of any of `data.buckets`, a cache's latents
    have one.
    """
    (height, width, channels), size = settings.shape, settings.data.image_size
    if "image" in batch:
        height, width = (
            batch["image"].shape[1] * height // size,
            batch["image"].shape[2] * width // size,
        )
    return batch["token_ids"].shape[0], height, width, channels


def draw(key: Array, batch: Batch, settings: Settings) -> Batch:
    """Adds a step's randomness to a batch: `t`, `noise`, `dropped` (captions hidden from the
    denoiser), for latents `latent_noise` (their place in the autoencoder's Gaussian), and for an
    upsampler `level` and `low_noise`, of its low-resolution pictures.

    Drawn for the whole batch at once, so that accumulation and sharding don't change the step.
    """
    keys, shape = _keys(key), x0_shape(batch, settings)
    config = settings.diffusion
    latent = (
        {"latent_noise": jax.random.normal(keys["latent"], shape)} if settings.latent.vae else {}
    )
    return (
        batch
        | latent
        | _draw_low(keys, shape, settings.super_resolution)
        | {
            "t": config.make_schedule().time_of_share(
                diffusion.sample_shares(
                    keys["timestep"], shape[0], config.timestep_sampling, config.timestep_scale
                )
            ),
            "noise": jax.random.normal(keys["noise"], shape),
            "dropped": jax.random.bernoulli(
                keys["dropout"], settings.train.caption_dropout, shape[:1]
            ),
        }
    )


def _draw_low(
    keys: dict[str, Array], shape: tuple[int, int, int, int], config: SuperResolutionConfig
) -> Batch:
    if not config.is_upsampler:
        return {}
    B, H, W, C = shape
    low = B, H // config.factor, W // config.factor, C
    return {
        "level": config.max_level * jax.random.uniform(keys["level"], (B,)),
        "low_noise": jax.random.normal(keys["low_noise"], low),
    }


def low_resolution(
    model: ContextDiffusion, batch: Batch, config: SuperResolutionConfig
) -> LowResolution | None:
    """What an upsampler is given of a batch's pictures: they shrunk, noised, enlarged again."""
    if not config.is_upsampler:
        return None
    small = model.from_pixels(to_unit(shrink(batch["image"], config.factor)))
    return enlarged(small, config.factor, batch["level"], batch["low_noise"])


def clean(
    model: ContextDiffusion, batch: Batch
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H2 W2 3"] | None]:
    """x0 and its picture in [-1, 1], None from a cache. x0 is the picture, or latents drawn from
    q(z | picture), whose moments the autoencoder or the cache gives.
    """
    pixels = to_unit(batch["image"]) if "image" in batch else None
    if model.vae is None:
        return pixels, pixels
    if pixels is None:
        mean, std = (batch[name].astype(jnp.float32) for name in ("latent_mean", "latent_std"))
    else:
        q = model.vae.encode(pixels)
        mean, std = q.mean, jnp.exp(0.5 * q.logvar)
    return model.vae.to_diffusion(mean + std * batch["latent_noise"]), pixels


def loss_fn(
    model: ContextDiffusion,
    batch: Batch,
    null: Batch,
    process: diffusion.Process,
    settings: Settings,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective on a batch with its randomness (`draw`); `null`: the empty caption's ids and
    mask, [1, L].
    """
    config, context, schedule = settings.diffusion, settings.context, process.schedule
    x0, pixels = clean(model, batch)
    low = low_resolution(model, batch, settings.super_resolution)
    if settings.distill.teacher:
        error, t = distilled_errors(model, batch, null, x0, pixels, low, process, settings)
        return _loss(model, process, settings, error, t)
    t, noise = batch["t"], batch["noise"]
    captions = captions_of(model, batch)
    empty = model.encode_empty(null["token_ids"], null["token_mask"])
    hide = functools.partial(drop, batch["dropped"], empty)
    shifted_by = related(context.caption, captions, hide)._replace(low=low)

    def relate(t, noise):
        return model.relate(x0, shifted_by, schedule.network_time(t), pixels, noise)

    if context.moves and config.prediction_type in MOTIONS:
        r, rate = diffusion.with_rate(lambda t: relate(t, noise), t)
    else:
        r, rate = relate(t, noise), None
    # After r: the order in which gradients are added is a run's digits.
    read = hide(captions)._replace(sizes=batch.get("sizes"), low=low)
    error, context_loss = errors(
        lambda x, time: model.predict(x, time, read),
        process,
        x0,
        r,
        t,
        noise,
        rate,
        context.fixed_target,
    )
    prior = penalty = jnp.zeros(())
    if config.prior_kl:
        r_T = relate(jnp.full_like(t, schedule.t_max), noise)
        prior = diffusion.prior_kl(schedule, x0, r_T, context.shift).mean()
    if context.variance_kl or context.alignment:
        penalty = source_penalty(context, lambda noise: relate(t, noise), x0, noise)
    return _loss(model, process, settings, error, t, context_loss, prior, penalty)


def _loss(
    model: ContextDiffusion,
    process: diffusion.Process,
    settings: Settings,
    error: Float[Array, "B"],
    t: Num[Array, "B"],
    context_loss: Float[Array, ""] | float = 0.0,
    prior: Float[Array, ""] | float = 0.0,
    penalty: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted sum of the parts, and what of it is logged."""
    config, context, schedule = settings.diffusion, settings.context, process.schedule
    weight = diffusion.loss_weight(
        schedule, t, config.prediction_type, config.weighting, config.gamma
    )
    denoise_loss = jnp.mean(weight * error)
    loss = denoise_loss + context.head_loss * context_loss + config.prior_kl * prior + penalty
    quartile = jax.nn.one_hot(jnp.minimum(4 * schedule.share(t), 3).astype(int), 4)  # [B, 4]
    return loss, {
        "count": jnp.ones(()),
        "loss": loss,
        "denoise_loss": denoise_loss,
        "context_loss": jnp.asarray(context_loss, jnp.float32),
        "prior_kl": jnp.asarray(prior, jnp.float32),
        "context_gain": jnp.mean(jnp.asarray(model.context.gain, jnp.float32)),
        "quartile_loss": error @ quartile,
        "quartile_count": quartile.sum(0),
    }


def source_penalty(
    context: ShiftConfig,
    relate: Callable[[Array], Array],
    x0: Float[Array, "B H W C"],
    noise: Float[Array, "B H W C"],
) -> Float[Array, ""]:
    """What keeps a learned source a Gaussian, and near the data (CSFM, Kim et al. 2026):
    `variance_kl` times KL(N(0, sigma^2) || N(0, 1)) a value, which leaves the mean free, and
    `alignment` times 1 - cos(begin of the path, x0).
    """
    # r = mu + (sigma - 1) noise, value by value: its derivative in the noise is sigma - 1.
    r, excess = jax.jvp(relate, (noise,), (jnp.ones_like(noise),))
    variance = (1 + excess) ** 2
    kl = 0.5 * jnp.mean(variance - 1 - jnp.log(variance))
    cosine = jax.vmap(optax.cosine_similarity)(*(a.reshape(len(a), -1) for a in (noise + r, x0)))
    return context.variance_kl * kl + context.alignment * (1 - cosine.mean())


def _accumulated(value_and_grad: Callable, params: PyTree, batch: Batch, parts: int):
    """Mean gradient and metrics over `parts` equal parts of the batch, one after another."""
    if parts == 1:
        (_, metrics), grads = value_and_grad(params, batch)
        return metrics, grads
    # A part takes every parts-th example, so that each device's own examples are spread over all
    # parts.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def add(total, part):
        (_, metrics), grads = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, (metrics, grads)), None

    first = jax.tree.map(lambda a: a[0], split)
    zeros = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(value_and_grad, params, first)
    )
    (metrics, grads), _ = jax.lax.scan(add, (zeros[0][1], zeros[1]), split)
    by_sample = ("quartile_loss", "quartile_count")
    metrics = {
        name: value if name in by_sample else value / parts for name, value in metrics.items()
    }
    return metrics, jax.tree.map(lambda g: g / parts, grads)


def make_train_step(
    settings: Settings, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, Array]]:
    """`step(state, batch, null, frozen) -> (state, nonfinite)`, pure; metrics are summed in the
    state. To be jitted, state donated; `mesh`: the devices that it is compiled for. Gradients,
    moments and averages are those of what `train.trainable` names.

    Where the loss or the gradient is not finite only the step's number and the count `nonfinite` go
    on: a bad step can't spoil a checkpoint. Past `train.max_nonfinite` nothing does, so that what
    went wrong last is there to be looked at.
    """
    graph, config = model_graph(settings), settings.train
    process = settings.process

    def step(
        state: TrainState, batch: Batch, null: Batch, frozen: Frozen = Frozen()
    ) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        trained, rest = split_trainable(state.params, config.trainable)

        def model(trained):
            return build_model(graph, nnx.merge_state(trained, rest), frozen)

        value_and_grad = jax.value_and_grad(
            lambda trained, part: loss_fn(model(trained), part, null, process, settings),
            has_aux=True,
        )
        with tracing_for(mesh, settings.mesh.rules):
            metrics, grads = _accumulated(
                value_and_grad, trained, draw(key, batch, settings), config.accumulation
            )
            metrics["grad_norm"] = optax.global_norm(grads)
            averaged, kept = split_trainable(state.ema, config.trainable)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            nonfinite = state.metric_sums["nonfinite"]
            over = nonfinite > config.max_nonfinite

            def updated() -> TrainState:
                params, ema, opt_state = apply_gradients(
                    config, grads, trained, averaged, state.opt_state, state.step
                )
                params, ema = nnx.merge_state(params, rest), nnx.merge_state(ema, kept)
                added = metrics | {"nonfinite": jnp.zeros(())}
                sums = jax.tree.map(jnp.add, state.metric_sums, added)
                return TrainState(state.step + 1, params, ema, opt_state, state.key, sums)

            one = jnp.where(over, 0, 1)
            skipped = dataclasses.replace(
                state,
                step=state.step + one,
                metric_sums=state.metric_sums | {"nonfinite": nonfinite + one},
            )
            new = take_if(finite & ~over, updated, skipped)
        return new, new.metric_sums["nonfinite"]

    return step
