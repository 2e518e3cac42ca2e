"""Configs whose `model.pretrained` names a diffusers folder, or a single-file checkpoint.

What the folder or file says takes its place in the config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contextdiff_jax.data.folder_tokenizer import max_length
from contextdiff_jax.data.tokenizer import clip_length
from contextdiff_jax.models.backbones import kind_of
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.folder_files import read_json, tokenizer_folder
from contextdiff_jax.pretrained.mmdit import MODEL as MMDIT
from contextdiff_jax.pretrained.pipeline_folder import (
    T5_TOKENS,
    encoder_names,
    is_sd3,
    is_xl,
    read_index,
)
from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler
from contextdiff_jax.pretrained.unet import MODEL as UNET
from contextdiff_jax.runtime.fields import typed
from contextdiff_jax.runtime.hub import find


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `model.*` (the network's config), `diffusion.*` (schedule and prediction type),
    the steps of `sample.*`, for XL `data.sizes`, and, where they are empty, `latent.vae`,
    `text.pretrained` and `data.tokenizer` as the folder has them. For a network that predicts a
    velocity the `context.estimate` `plugin`, which there is none of, becomes `velocity`.

    `diffusion.zero_terminal_snr=True` stays: fine-tuning to a rescaled schedule is a choice of the
    run. Without `model.pretrained` the config as it is. Idempotent, so that config.json says all
    and the same command resumes.

    Raises ValueError, one line with file and field, for a folder of another pipeline or one that is
    not supported.
    """
    source = config.get("model", {}).get("pretrained", "")
    if not source:
        return dict(config)
    folder = Path(find(source))
    index = read_index(folder)
    model = read_config(MMDIT, folder / "transformer") if is_sd3(index) else _read_unet(folder)
    scheduler = load_scheduler(folder / "scheduler", pipeline=index["_class_name"])
    make = _flow_process if scheduler.is_flow else _process
    try:
        process = make(scheduler, config)
    except ValueError as error:
        raise ValueError(f"{folder / 'scheduler'}: {error}") from None
    encoder, words, length = _texts(folder, index, config)
    # Lists, as in a config.json: what is compared on resuming.
    fields = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in model.to_dict().items()
    }

    sizes = {"sizes": True} if is_xl(index) else {}

    def section(name: str, default: str, value: Path, **fields: Any) -> dict[str, Any]:
        """The config's section with `fields`, and `value` where its field `default` is empty."""
        values = config[name]
        return {**values, **fields, default: values.get(default) or _named(value, folder, source)}

    return {
        **config,
        "model": {"kind": kind_of(model), **fields, "pretrained": source},
        **{name: {**config[name], **values} for name, values in process.items()},
        "latent": section("latent", "vae", folder / "vae"),
        "text": section(
            "text",
            "pretrained",
            encoder,
            max_length=length,
            width=model.text_width,
        ),
        "data": section("data", "tokenizer", words, max_length=length, **sizes),
    }


def _named(path: Path, folder: Path, source: str) -> str:
    """A path of the pipeline as the config has it: by the hub's name where `source` is one, so that
    config.json means the same on another machine.
    """
    if str(folder) == str(Path(source)):
        return str(path)
    return os.path.normpath(os.path.join(source, os.path.relpath(path, folder)))


def _texts(
    folder: Path, index: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Path, Path, int]:
    """(`text.pretrained`, `data.tokenizer`, `data.max_length`). Of several encoders the pipeline is
    named, and of their tokenizers the folder of them all.
    """
    if is_sd3(index):
        length = typed("text.t5_length", config["text"].get("t5_length", T5_TOKENS), int)
        return folder, folder, clip_length(folder) + length
    text = read_json(folder / "text_encoder" / "config.json", "a text encoder's folder")
    words = tokenizer_folder(folder / "tokenizer")
    length = max_length(words, text.get("max_position_embeddings", 77))
    if len(encoder_names(index)) > 1:
        return folder, words.parent, length
    return folder / "text_encoder", words, length


def _read_unet(folder: Path) -> UNetConfig:
    """The config of a pipeline's UNet. ValueError for one that is not fine-tuned."""
    unet = read_config(UNET, folder / "unet")
    if isinstance(unet.cross_attention_dim, tuple) or unet.context_head:
        raise ValueError(
            f"{folder / 'unet'}: a UNet with a context head or several text widths is not "
            "fine-tuned"
        )
    return unet


def _flow_process(scheduler: Scheduler, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of `_process` for a scheduler of the path `flow`, and `context.estimate`, which
    can't be `plugin` where the network predicts a velocity.
    """
    if scheduler.num_train_timesteps != 1000:
        raise ValueError(
            f"num_train_timesteps={scheduler.num_train_timesteps}: a run's network reads the time "
            "as a share of 1000; only 1000"
        )
    if scheduler.solver.dynamic:
        raise ValueError(
            "use_dynamic_shifting=True: a run's steps have one shift; set it to false in a copy of "
            "the folder, and `shift` to that of your size"
        )
    diffusion = {
        "schedule": "flow",
        "prediction_type": scheduler.prediction,
        "zero_terminal_snr": False,
    }
    steps = {
        "sampler": scheduler.solver.sampler,
        "spacing": scheduler.spacing_of(scheduler.solver.sampler),
        "spacing_factor": float(scheduler.solver.flow_shift),
        "steps_offset": 0,
        "set_alpha_to_one": True,
    }
    made = {"diffusion": diffusion, "sample": steps}
    if scheduler.prediction == "velocity" and config["context"]["estimate"] == "plugin":
        made["context"] = {"estimate": "velocity"}
    return made


def _process(scheduler: Scheduler, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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
    return {"diffusion": diffusion, "sample": steps}
