"""Configs whose `model.pretrained` names a diffusers folder, or a single-file checkpoint.

What the folder or file says takes its place in the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contextdiff_jax.data.folder_tokenizer import max_length
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.folder_files import read_json, tokenizer_folder
from contextdiff_jax.pretrained.pipeline_folder import encoder_names, read_index
from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler
from contextdiff_jax.pretrained.unet import MODEL as UNET


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `model.*` (the UNet's config), `diffusion.*` (schedule and prediction type),
    the steps of `sample.*`, for XL `data.sizes`, and, where they are empty, `latent.vae`,
    `text.pretrained` and `data.tokenizer` as the folder has them.

    `diffusion.zero_terminal_snr=True` stays: fine-tuning to a rescaled schedule is a choice of the
    run. Without `model.pretrained` the config as it is. Idempotent, so that config.json says all
    and the same command resumes.

    Raises ValueError, one line with file and field, for a folder of another pipeline or one that is
    not supported.
    """
    source = config.get("model", {}).get("pretrained", "")
    if not source:
        return dict(config)
    folder = Path(source)
    index = read_index(folder)
    unet = _read_unet(folder / "unet")
    scheduler = load_scheduler(folder / "scheduler", pipeline=index["_class_name"])
    diffusion, steps = _process(scheduler, config)
    text = read_json(folder / "text_encoder" / "config.json", "a text encoder's folder")
    words = tokenizer_folder(folder / "tokenizer")
    length = max_length(words, text.get("max_position_embeddings", 77))
    # Of several encoders the pipeline is named, and of their tokenizers the folder of them all.
    several = len(encoder_names(index)) > 1
    encoder, words = (folder, words.parent) if several else (folder / "text_encoder", words)
    # Lists, as in a config.json: what is compared on resuming.
    model = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in unet.to_dict().items()
    }

    sizes = {"sizes": True} if unet.pooled_features is not None else {}

    def section(name: str, default: str, value: Path, **fields: Any) -> dict[str, Any]:
        """The config's section with `fields`, and `value` where its field `default` is empty."""
        values = config[name]
        return {**values, **fields, default: values.get(default) or str(value)}

    return {
        **config,
        "model": {**model, "pretrained": source},
        "diffusion": {**config["diffusion"], **diffusion},
        "sample": {**config["sample"], **steps},
        "latent": section("latent", "vae", folder / "vae"),
        "text": section(
            "text",
            "pretrained",
            encoder,
            max_length=length,
            width=unet.cross_attention_dim,
        ),
        "data": section("data", "tokenizer", words, max_length=length, **sizes),
    }


def _read_unet(folder: Path) -> UNetConfig:
    """The UNet's config. ValueError for one that is not fine-tuned."""
    unet = read_config(UNET, folder)
    if isinstance(unet.cross_attention_dim, tuple) or unet.context_head:
        raise ValueError(
            f"{folder}: a UNet with a context head or several text widths is not fine-tuned"
        )
    return unet


def _process(
    scheduler: Scheduler, config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scheduler's fields of the sections `diffusion` and `sample`."""
    diffusion = {
        "schedule": scheduler.schedule_name,
        "num_timesteps": scheduler.num_train_timesteps,
        "beta_start": scheduler.beta_start,
        "beta_end": scheduler.beta_end,
        "prediction_type": scheduler.prediction,
        "zero_terminal_snr": scheduler.rescale_betas_zero_snr
        or config["diffusion"]["zero_terminal_snr"],
    }
    steps = {
        "spacing": scheduler.timestep_spacing,
        "steps_offset": scheduler.steps_offset,
        "set_alpha_to_one": scheduler.set_alpha_to_one,
    }
    if diffusion["zero_terminal_snr"] and not scheduler.rescale_betas_zero_snr:
        # The only spacing that starts where the signal is 0.
        steps = {"spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
    return diffusion, steps
