"""Training of an AutoencoderKL (Rombach et al., 2022, section 3.1) without its adversarial part.

    loss = l1 |x - x_hat| + l2 (x - x_hat)^2 + kl KL(q(z | x) || N(0, I)),        (1)
    x_hat = decode(z), z ~ q(z | x)

Each term is a mean over its own dimensions (pixels; latents). The KL only keeps latents near a unit
Gaussian, so its weight is small; what is left of their scale is measured afterwards and becomes the
scaling factor 1 / std(z).
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8
from tqdm import tqdm

from contextdiff_jax.data import DataConfig, Loader, RandomAccessSource, make_loader, make_source
from contextdiff_jax.data.identity import identity, shared_settings
from contextdiff_jax.models.pixels import to_uint8, to_unit
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.parallel.mesh import Feed, make_mesh, state_shardings, tracing_for
from contextdiff_jax.parallel.processes import PeerWatch, agree
from contextdiff_jax.pretrained import save_vae
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.resuming import resume
from contextdiff_jax.runtime import pictures
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings.autoencoder import AutoencoderLoss, AutoencoderSettings
from contextdiff_jax.training.loop import to_devices
from contextdiff_jax.training.run_steps import Task, run_steps
from contextdiff_jax.training.state import (
    TrainState,
    apply_gradients,
    make_optimizer,
    with_empty_metrics,
)
from contextdiff_jax.training.weights_and_biases import check_wandb

LOGGER = logging.getLogger(__name__)
METRICS = ("count", "loss", "l1", "l2", "kl", "grad_norm")
_MEASURED = 512  # pictures of which the latents' scale is measured
_HELDOUT = 256  # at most, spread evenly
_SHOWN = 16


def loss_fn(
    vae: VAE, images: UInt8[Array, "B H W C"], key: PRNGKeyArray, weights: AutoencoderLoss
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(1), and its terms without their weights."""
    x = to_unit(images)
    q = vae.encode(x)
    error = vae.decode(q.sample(key)) - x
    terms = {
        "l1": jnp.abs(error).mean(),
        "l2": (error**2).mean(),
        "kl": 0.5 * (q.mean**2 + jnp.exp(q.logvar) - 1 - q.logvar).mean(),
    }
    return sum(getattr(weights, name) * term for name, term in terms.items()), terms


def init_state(settings: AutoencoderSettings) -> TrainState:
    """Step 0. Pure: jit it with output shardings, or `jax.eval_shape` it."""
    params = nnx.state(VAE(settings.vae, rngs=nnx.Rngs(make_key(settings.seed))), nnx.Param)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(settings.train).init(params),
        key=jax.random.key_data(make_key(settings.seed)),
        metric_sums={name: jnp.zeros(()) for name in METRICS},
    )


def make_vae_step(
    settings: AutoencoderSettings, mesh: Mesh
) -> Callable[[TrainState, Mapping[str, Array]], TrainState]:
    """`step(state, batch) -> state`, pure; metrics are summed in the state. To be jitted, state
    donated; `mesh`: the devices that it is compiled for.
    """
    graph = _graph(settings)

    def step(state: TrainState, batch: Mapping[str, Array]) -> TrainState:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        with tracing_for(mesh, settings.mesh.rules):
            (loss, terms), grads = jax.value_and_grad(
                lambda params: loss_fn(
                    nnx.merge(graph, params), batch["image"], key, settings.loss
                ),
                has_aux=True,
            )(state.params)
            params, ema, opt_state = apply_gradients(
                settings.train, grads, state.params, state.ema, state.opt_state, state.step
            )
        metrics = {
            "count": jnp.ones(()),
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
        } | terms
        return TrainState(
            state.step + 1,
            params,
            ema,
            opt_state,
            state.key,
            jax.tree.map(jnp.add, state.metric_sums, metrics),
        )

    return step


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderTraining(Task[TrainState]):
    """The training of an autoencoder, for `run_steps`."""

    batch_size: int
    step: Callable[[TrainState, Mapping[str, Array]], TrainState]
    loader: Loader
    feed: Feed
    shardings: TrainState

    def advance(self, state: TrainState, step: int, watch: PeerWatch) -> TrainState:
        watch(f"reading the batch of step {step}")
        batch = to_devices({"image": next(self.loader)["image"]}, self.feed)
        watch(f"in step {step}")
        return self.step(state, batch)

    def check(self, state: TrainState) -> None:
        # Sums remember any step since the last summary.
        if not np.isfinite(list(jax.device_get(state.metric_sums).values())).all():
            raise RunError(
                f"step {int(state.step)}: the loss is not finite; lower train.learning_rate and "
                "run again"
            )

    def summary(self, state: TrainState, step: int) -> tuple[dict[str, float], TrainState]:
        sums = jax.device_get(state.metric_sums)
        values = {name: float(sums[name] / sums["count"]) for name in METRICS if name != "count"}
        return values, with_empty_metrics(state, self.shardings)

    def data_state(self) -> dict[str, Any]:
        return self.loader.get_state()


def train_autoencoder(
    settings: AutoencoderSettings, config: Mapping[str, Any], workdir: pathlib.Path
) -> dict[str, float]:
    """Trains to `settings.train.steps`, resuming what `workdir` holds, and writes the folder; its
    figures on pictures that it has not seen. RunError for a loss that is not finite: the checkpoint
    before it is kept.
    """
    train = settings.train
    check_wandb(settings.log)
    heldout_records(settings.data)  # refused now, not after the training
    mesh = make_mesh(settings.mesh, train.batch_size)
    feed = Feed(mesh, train.batch_size, settings.mesh.rules)
    loader = _open_loader(settings, feed)
    place = {
        "image": feed.sharding(
            (train.batch_size, settings.data.image_size, settings.data.image_size, 3)
        )
    }
    manager, state, shardings = _open_state(settings, config, workdir, mesh, loader)
    step_fn = jax.jit(
        make_vae_step(settings, mesh),
        donate_argnums=0,
        in_shardings=(shardings, place),
        out_shardings=shardings,
    )
    task = AutoencoderTraining(
        batch_size=train.batch_size, step=step_fn, loader=loader, feed=feed, shardings=shardings
    )
    with closing(loader):
        state = run_steps(task, state, train, workdir, manager, wandb=settings.log.wandb)
    if int(state.step) < train.steps:
        raise RunError(
            f"stopped at step {int(state.step)} of {train.steps}; the same command goes on"
        )
    return finish(nnx.merge(_graph(settings), state.ema), settings.data, workdir, settings.seed)


def finish(vae: VAE, data: DataConfig, workdir: pathlib.Path, seed: int = 0) -> dict[str, float]:
    """Measures the scaling factor on training pictures, writes `workdir`/vae and
    reconstructions.png, and returns what the autoencoder does to held-out pictures.
    """
    source = make_source(data, "train")
    rows = np.random.default_rng(seed).permutation(len(source))[:_MEASURED]
    moments = [
        _encode(vae, source[int(i)]["image"][None])
        for i in tqdm(rows, desc="scale", leave=False, disable=None)
    ]
    means, variances = (
        np.concatenate([np.asarray(m[i], np.float64) for m in moments]) for i in (0, 1)
    )
    scaling_factor = float(1 / np.sqrt(means.var() + variances.mean()))
    vae.config = vae.config.__class__(**{**vars(vae.config), "scaling_factor": scaling_factor})
    with checkpoints.writing(workdir, "vae"):
        save_vae(vae, workdir / "vae")

    records = heldout_records(data)
    images = np.stack([record["image"] for record in records])
    decoded = np.concatenate([np.asarray(_reconstruct(vae, image[None])) for image in images])
    x = to_unit(images)
    mse = ((decoded - x) ** 2).mean(axis=(1, 2, 3)) / 4  # of pictures in [0, 1]
    shown = np.stack([images, np.asarray(to_uint8(decoded))], axis=1)
    every = max(1, len(images) // _SHOWN)
    captions = [text for record in records[::every] for text in (record["caption"], "decoded")]
    grid = pictures.caption_grid(shown[::every].reshape(-1, *images.shape[1:]), captions, columns=8)
    with checkpoints.writing(workdir, "reconstructions.png"):
        grid.save(workdir / "reconstructions.png")
    report = {
        "scaling_factor": scaling_factor,
        "latent_mean": float(means.mean()),
        "psnr": float(-10 * np.log10(mse).mean()),
        "l1": float(np.abs(decoded - x).mean() / 2),
        "heldout": len(images),
    }
    write_json(workdir / "vae.json", report)
    return report


def heldout_records(data: DataConfig) -> list[dict[str, Any]]:
    """The held-out pictures that a finished autoencoder is measured on. ValueError if there are
    none.
    """
    source = make_source(data, "heldout")
    if not len(source):
        raise ValueError(f"data.heldout_metadata={data.heldout_metadata!r}: holds no records")
    count = min(_HELDOUT, len(source))
    records = [source[int(i)] for i in np.linspace(0, len(source) - 1, count)]
    if "image" not in records[0]:
        raise ValueError(f"data.source={data.source!r}: holds no pictures, which train_vae needs")
    return records


@nnx.jit
def _encode(vae: VAE, images: UInt8[Array, "B H W C"]) -> tuple[Array, Array]:
    q = vae.encode(to_unit(images))
    return q.mean, jnp.exp(q.logvar)


@nnx.jit
def _reconstruct(vae: VAE, images: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return jnp.clip(vae.decode(_encode(vae, images)[0]), -1, 1)


def _graph(settings: AutoencoderSettings) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: VAE(settings.vae, rngs=nnx.Rngs(0))))[0]


def _open_loader(settings: AutoencoderSettings, feed: Feed) -> Loader:
    data = settings.data

    def make() -> tuple[RandomAccessSource, Loader]:
        source = make_source(data, "train")
        return source, make_loader(
            source,
            batch_size=settings.train.batch_size,
            seed=data.seed,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
            rows=feed.rows,
        )

    def facts(made: tuple[RandomAccessSource, Loader]) -> dict[str, Any]:
        return shared_settings(data) | made[1].get_state() | identity(made[0])

    return agree("data", make, facts)[1]


def _open_state(
    settings: AutoencoderSettings,
    config: Mapping[str, Any],
    workdir: pathlib.Path,
    mesh: Mesh,
    loader: Loader,
) -> tuple[Any, TrainState, PyTree]:
    """(manager, state, shardings): a new state, or the newest checkpoint of the same run."""
    abstract = jax.eval_shape(lambda: init_state(settings))
    shardings = state_shardings(mesh, abstract, settings.mesh.rules)
    manager, state, data_state = resume(
        workdir, config, abstract, shardings, settings.train.keep_checkpoints
    )
    if state is None:
        return manager, jax.jit(lambda: init_state(settings), out_shardings=shardings)(), shardings
    loader.set_state(data_state)
    return manager, state, shardings
