"""diffusers' `UNet2DConditionModel` folders <-> `contextdiff_jax.models.unet.UNet`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from contextdiff_jax.models.backbones import BackboneConfig
from contextdiff_jax.models.efficient_unet_config import EfficientUNetConfig
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.models.unet_parts import ContextHead
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.kinds import Model, Options
from contextdiff_jax.pretrained.names import Rules, state_from_torch, state_to_torch

CLASS = "UNet2DConditionModel"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def _rules(config: UNetConfig) -> Rules:
    projections = (
        "" if config.use_linear_projection else r"|attentions\.\d+\.proj_(in|out)\.kernel$"
    )
    return Rules(
        renames=(
            (r"\.to_out\.(\w+)$", r".to_out.0.\1"),
            (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
            (r"\.ff\.proj_out\.", ".ff.net.2."),
        ),
        pointwise=r"conv_shortcut" + projections,
    )


def known_to_diffusers(config: BackboneConfig) -> BackboneConfig:
    """The config. ValueError for a network that diffusers doesn't have."""
    if isinstance(config, EfficientUNetConfig) or config.low_resolution:
        raise ValueError(
            "model: diffusers has no efficient_unet, and no network that reads a low-resolution "
            "picture (super_resolution.factor)"
        )
    own = config.OURS.get("patch_size", config.patch_size)
    if config.patch_size != own:
        raise ValueError(
            f"model.patch_size={config.patch_size}: must be {own}, as in diffusers' networks"
        )
    return config


MODEL = Model(
    kind="unet",
    weights_file=WEIGHTS_FILE,
    classes=(CLASS,),
    make_config=lambda values, names: known_to_diffusers(UNetConfig.from_dict(values)),
    restore_config=UNetConfig,
    to_json=lambda unet: {"_class_name": CLASS, **known_to_diffusers(unet.config).to_dict()},
    build=UNet,
    rules=_rules,
)


def unet_state_from_torch(state_dict: Mapping[str, np.ndarray], unet: UNet) -> nnx.State:
    """The parameters of `unet` from a diffusers state dict, in the types of `unet`; see
    `names.state_from_torch`.
    """
    state = state_from_torch(state_dict, unet, _rules(unet.config), what="UNet weights")
    params = dict(nnx.to_flat_state(nnx.state(unet, nnx.Param)))
    flat = {
        path: leaf.replace(leaf.get_value().astype(params[path].dtype))
        for path, leaf in nnx.to_flat_state(state)
    }
    return nnx.from_flat_state(flat)


def unet_state_to_torch(unet: UNet) -> dict[str, np.ndarray]:
    """The inverse of `unet_state_from_torch`: torch names -> contiguous arrays in torch layout."""
    return state_to_torch(unet, _rules(unet.config))


def load_unet(
    folder: str | Path, *, new_context_head: nnx.Rngs | None = None, **options: Any
) -> UNet:
    """A UNet from a local folder (a pipeline's `unet/`, or one that `save_unet` or convert wrote).

    Args:
      folder: config.json and safetensors, or ours.
      new_context_head: adds a context head, freshly initialised (it outputs 0), to a network
          without one.
      options: see `contextdiff_jax.pretrained.kinds.Options`: dtype, param_dtype, shardings,
          progress.
    """
    read = Options(**options)
    unet = folders.load(MODEL, folder, read)
    if new_context_head is not None:
        if unet.config.context_head:
            raise ValueError(
                f"{folder}: has a context head already; new_context_head is for one without"
            )
        unet.config = dataclasses.replace(unet.config, context_head=True)
        unet.context_head = nnx.data(
            ContextHead(unet.config, **read.precision.policy(new_context_head))
        )
    return unet


def save_unet(unet: UNet, folder: str | Path) -> None:
    """Writes `unet` as a diffusers folder, which `load_unet` reads back exactly (and so does
    diffusers).
    """
    folders.save(MODEL, unet, folder)
