"""diffusers' `SD3Transformer2DModel` folders <-> `contextdiff_jax.models.mmdit.MMDiT`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from contextdiff_jax.models.mmdit import MMDiT, positions
from contextdiff_jax.models.mmdit_config import MMDiTConfig
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.kinds import Model, Options
from contextdiff_jax.pretrained.names import Rules
from contextdiff_jax.pretrained.unet import WEIGHTS_FILE

CLASS = "SD3Transformer2DModel"
POSITIONS = "pos_embed.pos_embed"


def _rules(config: MMDiTConfig) -> Rules:
    return Rules(
        renames=(
            (r"\.picture\.modulation\.", ".norm1.linear."),
            (r"\.text\.modulation\.", ".norm1_context.linear."),
            (r"\.picture\.attn(2?)\.to_out\.", r".attn\1.to_out.0."),
            (r"\.picture\.attn(2?)\.", r".attn\1."),
            (r"\.text\.attn\.to_out\.", ".attn.to_add_out."),
            (r"\.text\.attn\.to_([qkv])\.", r".attn.add_\1_proj."),
            (r"\.text\.attn\.norm_([qk])\.", r".attn.norm_added_\1."),
            (r"\.picture\.ff\.", ".ff."),
            (r"\.text\.ff\.", ".ff_context."),
            (r"\.proj_in\.", ".net.0.proj."),
            (r"(ff\w*)\.proj_out\.", r"\1.net.2."),
            (r"^patch_in\.", "pos_embed.proj."),
            (r"^time_embedding\.", "time_text_embed.timestep_embedder."),
            (r"^pooled_embedding\.", "time_text_embed.text_embedder."),
            (r"^text_in\.", "context_embedder."),
            (r"^modulation\.", "norm_out.linear."),
        ),
        stacked=tuple(
            (f"stacks.{i}.layers.", "transformer_blocks.", stack.first)
            for i, stack in enumerate(config.stacks())
        ),
        constants={POSITIONS: functools.partial(_positions, config)},
    )


def _positions(config: MMDiTConfig) -> np.ndarray:
    """The table of all positions, [1, N, D], that diffusers keeps beside the weights."""
    side = config.pos_embed_max_size
    rows, columns = positions(config, side, side)
    halves = np.broadcast_arrays(columns[None, :], rows[:, None])
    return np.concatenate(halves, axis=-1).reshape(1, side * side, config.width)


MODEL = Model(
    kind="mmdit",
    weights_file=WEIGHTS_FILE,
    classes=(CLASS,),
    make_config=lambda values, names: MMDiTConfig.from_dict(values),
    restore_config=MMDiTConfig,
    to_json=lambda network: {"_class_name": CLASS, **network.config.to_dict()},
    build=MMDiT,
    rules=_rules,
)


def load_mmdit(folder: str | Path, **options: Any) -> MMDiT:
    """A transformer from a local folder (a pipeline's `transformer/`, or one that `save_mmdit` or
    convert wrote).

    Args:
      folder: config.json and safetensors, or ours.
      options: see `contextdiff_jax.pretrained.kinds.Options`: dtype, param_dtype, shardings,
          progress.

    Raises ValueError, one line with file and field or tensor.
    """
    return folders.load(MODEL, folder, Options(**options))


def save_mmdit(network: MMDiT, folder: str | Path) -> None:
    """Writes `network` as a diffusers folder, in the parameters' own types. ValueError for one with
    a context head, which diffusers doesn't have.
    """
    if network.config.context_head:
        raise ValueError(f"{folder}: diffusers' transformer has no context head")
    folders.save(MODEL, network, folder)
