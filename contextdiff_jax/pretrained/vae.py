"""diffusers' `AutoencoderKL` folders <-> `contextdiff_jax.models.vae.VAE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contextdiff_jax.models.vae import VAE, VAEConfig
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.kinds import Model, Options
from contextdiff_jax.pretrained.names import Rules

CLASS = "AutoencoderKL"


def _rules(config: VAEConfig) -> Rules:
    return Rules(
        renames=((r"\.attention\.to_out\.", ".to_out.0."), (r"\.attention\.", ".")),
        pointwise=r"conv_shortcut|quant_conv",
        # diffusers before 0.17: Stable Diffusion 1.x and 2.x's own files.
        aliases=(
            (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
            (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
            (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
            (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
        ),
    )


MODEL = Model(
    kind="vae",
    weights_file="diffusion_pytorch_model.safetensors",
    classes=(CLASS,),
    make_config=lambda values, names: VAEConfig.from_dict(values),
    restore_config=VAEConfig,
    to_json=lambda vae: {"_class_name": CLASS, **vae.config.to_dict()},
    build=VAE,
    rules=_rules,
)


def load_vae(folder: str | Path, **options: Any) -> VAE:
    """A VAE from a local folder (a pipeline's `vae/`); `options`: see
    `contextdiff_jax.pretrained.kinds.Options`.
    """
    return folders.load(MODEL, folder, Options(**options))


def save_vae(vae: VAE, folder: str | Path) -> None:
    """Writes `vae` as a diffusers folder, which `load_vae` reads back exactly (and so does
    diffusers).
    """
    folders.save(MODEL, vae, folder)
