"""The settings of an autoencoder's training: the config of contextdiff_jax.train_vae, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from contextdiff_jax.data import DataConfig
from contextdiff_jax.models.vae import VAEConfig
from contextdiff_jax.parallel.mesh import MeshConfig
from contextdiff_jax.runtime.fields import check_at_least, check_types, strict
from contextdiff_jax.settings import LogConfig, TrainConfig, check_sections, read_data


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Weights of the terms of an autoencoder's loss (training.autoencoder)."""

    l1: float = 1.0  # weight of the mean absolute error
    l2: float = 0.0  # weight of the mean squared error
    kl: float = 1e-3  # weight of the latents' KL to N(0, 1)

    def __post_init__(self):
        check_at_least(self, "loss", l1=0, l2=0, kl=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """All of an autoencoder's training."""

    seed: int
    train: TrainConfig
    data: DataConfig
    loss: AutoencoderLoss
    vae: VAEConfig
    mesh: MeshConfig
    log: LogConfig


def parse_autoencoder(config: Mapping[str, Any]) -> AutoencoderSettings:
    """Checks a config of contextdiff_jax.train_vae, as `parse` does a run's."""
    config = {"log": {}} | dict(config)  # which runs of before it lack
    check_sections(config, [field.name for field in dataclasses.fields(AutoencoderSettings)])
    check_types(VAEConfig, "vae", config["vae"])
    data, vae = read_data(config["data"]), VAEConfig.from_dict(config["vae"])
    if data.image_size % vae.downscale:
        raise ValueError(
            f"data.image_size={data.image_size}: must be a multiple of {vae.downscale}, vae's "
            "levels"
        )
    train = strict(TrainConfig, "train", config["train"])
    train.refuse_power_ema("an autoencoder")
    return AutoencoderSettings(
        seed=config["seed"],
        train=train,
        data=data,
        loss=strict(AutoencoderLoss, "loss", config["loss"]),
        vae=vae,
        mesh=strict(MeshConfig, "mesh", config["mesh"]),
        log=strict(LogConfig, "log", config["log"]),
    )
