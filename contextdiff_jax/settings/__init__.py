"""Settings: an ml_collections config, checked once, as frozen dataclasses (one a room).

Commands call `parse`; no room below sees a ConfigDict. Every error is one line with field, value
and what is allowed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contextdiff_jax.data import DataConfig
from contextdiff_jax.diffusion import Process
from contextdiff_jax.models.backbones import BACKBONES, BackboneConfig, kind_of
from contextdiff_jax.models.denoising import estimates_context
from contextdiff_jax.models.text import TextConfig
from contextdiff_jax.models.vae import VAEConfig
from contextdiff_jax.parallel.mesh import MeshConfig
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.pretrained.vae import MODEL as VAE_MODEL
from contextdiff_jax.runtime.fields import (
    check_at_least,
    check_choice,
    check_known,
    check_section,
    check_types,
    defaults,
    strict,
    typed,
)
from contextdiff_jax.runtime.hub import find
from contextdiff_jax.runtime.keys import check_seed
from contextdiff_jax.settings.distillation import DistillConfig, check_student
from contextdiff_jax.settings.log import LogConfig
from contextdiff_jax.settings.process import DiffusionConfig, ShiftConfig, check_process
from contextdiff_jax.settings.sampling import SampleConfig, check_sampling
from contextdiff_jax.settings.super_resolution import SuperResolutionConfig, check_upsampler
from contextdiff_jax.settings.train import TrainConfig

# Fields that `parse` fills in from others.
DERIVED = {
    "context": ("in_channels", "text_width", "visual_width"),
    "model": ("context_head", "low_resolution"),
}
# Fields that name what every reader of a run needs; settings have where it is here.
_NAMES = (("latent", "vae"), ("text", "pretrained"), ("context", "clip"), ("data", "tokenizer"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The space of x0: pixels, or the latents of a frozen autoencoder."""

    vae: str = ""  # a diffusers AutoencoderKL folder, such as train_vae's; empty: pixels

    def __post_init__(self):
        _ = self.config  # refuses a folder that can't be read before anything else is done

    @functools.cached_property
    def config(self) -> VAEConfig | None:
        """The autoencoder's."""
        return read_config(VAE_MODEL, self.vae) if self.vae else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All of a run."""

    seed: int
    train: TrainConfig
    data: DataConfig
    diffusion: DiffusionConfig
    context: ShiftConfig
    text: TextConfig
    model: BackboneConfig
    mesh: MeshConfig
    sample: SampleConfig
    latent: LatentConfig
    super_resolution: SuperResolutionConfig
    distill: DistillConfig
    log: LogConfig
    # model.pretrained: the pipeline, a folder or single file, whose network a new run starts from
    pretrained: str = ""

    @property
    def process(self) -> Process:
        """The process that it trains on."""
        return Process(
            schedule=self.diffusion.make_schedule(),
            prediction_type=self.diffusion.prediction_type,
            shift=self.context.shift,
            caption=self.context.caption,
            estimates_context=estimates_context(
                self.context, self.model.context_head, self.diffusion.prediction_type
            ),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """[H, W, C] of x0: a picture, or its latents."""
        factor = self.latent.config.downscale if self.latent.vae else 1
        return (
            self.data.image_size // factor,
            self.data.image_size // factor,
            self.model.in_channels,
        )


def default_config() -> dict[str, Any]:
    """Return every field that a config with a UNet may have, with its default, by section
    (configs/base.py).
    """
    config = defaults(Settings) | {"model": default_model("unet")}
    del config["pretrained"]  # is in `model`
    for field in DERIVED["context"]:
        del config["context"][field]
    return config


def default_model(kind: str) -> dict[str, Any]:
    """Return the section `model` for a kind of backbone, with its defaults."""
    check_choice("model.kind", kind, BACKBONES)
    fields = defaults(BACKBONES[kind].config)
    for field in DERIVED["model"]:
        del fields[field]
    return {"kind": kind, **fields, "pretrained": ""}


def check_sections(config: Mapping[str, Any], sections: typing.Sequence[str]) -> None:
    """Raises ValueError for a section of the config that is unknown, or one that is missing, and
    for a seed that is none.
    """
    for name in config:
        check_known(name, name, sections)
    for name in sections:
        if name not in config:
            raise ValueError(f"{name}: missing; a config has the sections {', '.join(sections)}")
    check_seed(config["seed"])


def read_data(values: Mapping[str, Any]) -> DataConfig:
    """The section `data`, and its seeds and counts checked."""
    data = strict(DataConfig, "data", values)
    check_seed(data.seed, "data.seed")
    check_seed(data.scene_seed, "data.scene_seed")
    check_at_least(
        data,
        "data",
        image_size=1,
        crop_size=0,
        max_length=2,
        num_scenes=1,
        num_workers=0,
        prefetch=0,
        bucket_max_ratio=0,
        bucket_step=1,
    )
    if data.crop_size > data.image_size:
        raise ValueError(
            f"data.crop_size={data.crop_size}: must be at most data.image_size={data.image_size}"
        )
    for field in ("max_broken_fraction", "heldout_fraction", "position_fraction", "reading_order"):
        if not 0 <= getattr(data, field) <= 1:
            raise ValueError(f"data.{field}={getattr(data, field)}: must lie in [0, 1]")
    return data


def parse(config: Mapping[str, Any]) -> Settings:
    """Checks a config (an ml_collections ConfigDict's `to_dict()`, or a run's config.json).

    Raises ValueError, in one line, for an unknown section or field, or a value that is not allowed.
    """
    # sections that runs of before them lack
    config = {"latent": {}, "super_resolution": {}, "distill": {}, "log": {}} | dict(config)
    check_sections(
        config, [field.name for field in dataclasses.fields(Settings) if field.name != "pretrained"]
    )
    config = _located(config)
    context = strict(ShiftConfig, "context", config["context"])
    super_resolution = strict(SuperResolutionConfig, "super_resolution", config["super_resolution"])
    # The second head belongs to the estimate: one decision, made in context.estimate.
    derived = (context.estimate == "posterior_mean", super_resolution.is_upsampler)
    model, pretrained = _read_model(
        config["model"], dict(zip(DERIVED["model"], derived, strict=True))
    )
    settings = Settings(
        seed=config["seed"],
        train=strict(TrainConfig, "train", config["train"]),
        data=read_data(config["data"]),
        diffusion=strict(DiffusionConfig, "diffusion", config["diffusion"]),
        context=dataclasses.replace(
            context,
            in_channels=model.in_channels,
            text_width=model.text_width,
            visual_width=_visual_width(context),
        ),
        text=strict(TextConfig, "text", config["text"]),
        model=model,
        mesh=strict(MeshConfig, "mesh", config["mesh"]),
        sample=strict(SampleConfig, "sample", config["sample"]),
        latent=strict(LatentConfig, "latent", config["latent"]),
        super_resolution=super_resolution,
        distill=strict(DistillConfig, "distill", config["distill"]),
        log=strict(LogConfig, "log", config["log"]),
        pretrained=pretrained,
    )
    check_process(settings.diffusion, settings.context)
    check_sampling(settings.process, settings.sample)  # now, not when the first pictures are due
    if settings.distill.teacher:
        check_student(settings)
    _check_text(settings)
    _check_latents(settings)
    _check_patches(settings)
    check_upsampler(settings)
    return settings


def _located(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config whose names of networks and tokenizers are paths of this machine
    (`runtime.hub.find`).
    """
    found = dict(config)
    for section, field in _NAMES:
        values = found[section]
        name = values.get(field) if isinstance(values, Mapping) else None
        if name and isinstance(name, str):
            found[section] = {**values, field: find(name)}
    return found


def to_config(settings: Settings) -> dict[str, Any]:
    """Return the config, as JSON holds it, that `parse` reads as these settings."""
    config = dataclasses.asdict(settings)
    for field in DERIVED["context"]:
        del config["context"][field]
    model = {k: v for k, v in settings.model.to_dict().items() if k not in DERIVED["model"]}
    kind, pretrained = kind_of(settings.model), config.pop("pretrained")
    config["model"] = {"kind": kind, **model, "pretrained": pretrained}
    return json.loads(json.dumps(config))


def _read_model(
    values: Mapping[str, Any], derived: Mapping[str, bool]
) -> tuple[BackboneConfig, str]:
    """The backbone's config, with `derived` fields, and `model.pretrained`; runs that say no kind
    have a UNet.
    """
    check_section("model", values)
    fields = dict(values)
    kind = typed("model.kind", fields.pop("kind", "unet"), str)
    check_choice("model.kind", kind, BACKBONES)
    pretrained = typed("model.pretrained", fields.pop("pretrained", ""), str)
    _check_kind(kind, fields)
    config = BACKBONES[kind].config
    check_types(config, "model", fields)
    return config.from_dict({**fields, **derived}), pretrained


def _check_kind(kind: str, fields: Mapping[str, Any]) -> None:
    """Raises ValueError for fields that another kind of backbone has and this one doesn't."""
    names = {
        name: {field.name for field in dataclasses.fields(each.config)}
        for name, each in BACKBONES.items()
    }
    for field in fields:
        others = [name for name, known in names.items() if field in known]
        if others and kind not in others:
            raise ValueError(
                f"model.kind={kind!r}: model.{field} is of {others[0]!r}; a config says "
                f'config.model = base.backbone("{kind}", ...), as configs/shapes_mmdit.py does'
            )


def _visual_width(context: ShiftConfig) -> int:
    if context.tokens != "clip":
        return 0
    values = read_json(Path(context.clip, "config.json"), "a CLIP image encoder's folder")
    return {**values, **values.get("vision_config", {})}.get("hidden_size", 768)


def _check_text(settings: Settings) -> None:
    model, text = settings.model, settings.text
    if text.pretrained:
        if not settings.data.tokenizer:
            raise ValueError("data.tokenizer='': text.pretrained needs the folder of its tokenizer")
        return
    for field, (given, wanted) in model.text_fields(text.width).items():
        if given != wanted:
            raise ValueError(f"model.{field}={given}: must be {wanted}, of text.width={text.width}")


def _check_patches(settings: Settings) -> None:
    p, side, data = settings.model.patch_size, settings.shape[0], settings.data
    crop = data.crop_size * side // data.image_size
    if not (data.buckets or data.bucket_max_ratio) and (side % p or crop % p):
        raise ValueError(f"model.patch_size={p}: must divide the side of x0, {crop or side}")


def _check_latents(settings: Settings) -> None:
    vae, train = settings.latent.config, settings.train
    data = settings.data
    if settings.context.tokens == "clip" and data.kind.is_cache and vae is not None:
        raise ValueError(
            f"context.tokens='clip': reads pictures, and data.source={data.source!r} has none; "
            "take the pictures' source"
        )
    if train.trainable == "context" and not (settings.pretrained or train.init_from):
        raise ValueError(
            "train.trainable='context': needs a trained network, by model.pretrained or "
            "train.init_from"
        )
    if train.trainable == "context" and settings.context.network.is_zero:
        raise ValueError(
            f"train.trainable='context': context.kind={settings.context.kind!r} has nothing to "
            "train"
        )
    if vae is None:
        return
    for field in ("in_channels", "out_channels"):
        if getattr(settings.model, field) != vae.latent_channels:
            raise ValueError(
                f"model.{field}={getattr(settings.model, field)}: must be {vae.latent_channels}, "
                f"the channels of latent.vae={settings.latent.vae!r}"
            )
    if settings.data.image_size % vae.downscale:
        raise ValueError(
            f"data.image_size={settings.data.image_size}: must be a multiple of {vae.downscale}, "
            "latent.vae's factor"
        )
    if settings.sample.dynamic_threshold:
        raise ValueError("sample.dynamic_threshold: is for pixels; with latent.vae only 0")
