"""A config whose `model.pretrained` names a diffusers pipeline's folder, or a single-file checkpoint:
what it says takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contextdiff_jax.data.tokens import max_length
from contextdiff_jax.pretrained.files import read_json, tokenizer_folder
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.pipeline import CLASSES, INDEX_FILE
from contextdiff_jax.pretrained.scheduler import load_scheduler
from contextdiff_jax.pretrained.unet import MODEL as UNET


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `model.*` (the UNet's config), `diffusion.*` (schedule and prediction type),
    the steps of `sample.*`, and, where they are empty, `latent.vae`, `text.pretrained` and
    `data.tokenizer` as the folder has them.

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
    name = read_json(folder / INDEX_FILE, "a diffusers pipeline folder").get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{folder / INDEX_FILE}: _class_name={name!r}: another pipeline; one of {', '.join(CLASSES)}"
        )
    unet, scheduler = (
        read_config(UNET, folder / "unet"),
        load_scheduler(folder / "scheduler", pipeline=name),
    )
    if (
        isinstance(unet.cross_attention_dim, tuple)
        or unet.addition_embed_type is not None
        or unet.context_head
    ):
        raise ValueError(
            f"{folder / 'unet'}: a UNet with added conditions, a context head or several text widths is not fine-tuned"
        )
    text = read_json(folder / "text_encoder" / "config.json", "a text encoder's folder")
    words = tokenizer_folder(folder / "tokenizer")
    length = max_length(words, text.get("max_position_embeddings", 77))
    text_width = {"max_length": length, "width": unet.cross_attention_dim}
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
    # Lists, as in a config.json: what is compared on resuming.
    model = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in unet.to_dict().items()
    }

    def filled(section: str, field: str, value: Any) -> dict[str, Any]:
        return {field: config[section].get(field) or value}

    return {
        **config,
        "model": {**model, "pretrained": source},
        "diffusion": {**config["diffusion"], **diffusion},
        "sample": {**config["sample"], **steps},
        "latent": {**config["latent"], **filled("latent", "vae", str(folder / "vae"))},
        "text": {
            **config["text"],
            **text_width,
            **filled("text", "pretrained", str(folder / "text_encoder")),
        },
        "data": {
            **config["data"],
            "max_length": length,
            **filled("data", "tokenizer", str(words)),
        },
    }
