"""A pipeline's folder: its index, and the text encoders as the networks of its kind read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from contextdiff_jax.data.tokenizer import clip_length, is_sd3_class, named_parts
from contextdiff_jax.models.backbones import BackboneConfig
from contextdiff_jax.models.frozen_text import FrozenText, FrozenTextPair, FrozenTextTriple
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.pretrained.clip import load_clip_text
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.folder_files import INDEX_FILE, exists, read_json
from contextdiff_jax.pretrained.mmdit import MODEL as MMDIT
from contextdiff_jax.pretrained.t5 import load_t5

CLASSES = tuple(
    f"StableDiffusion{kind}{way}Pipeline"
    for kind in ("", "XL", "3")
    for way in ("", "Img2Img", "Inpaint")
)
T5_TOKENS = 256  # of a text: diffusers' `max_sequence_length`
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def is_pipeline(folder: str | Path) -> bool:
    """Whether a folder, or a single-file checkpoint, is a whole pipeline."""
    return exists(Path(folder, INDEX_FILE))


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json's values. ValueError for a pipeline that is not supported."""
    path = folder / INDEX_FILE
    index = read_json(path, "a diffusers pipeline folder")
    name = index.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{path}: _class_name={name!r}: another pipeline; one of {', '.join(CLASSES)}"
        )
    if index.get("requires_aesthetics_score") or (
        is_xl(index) and not exists(folder / "text_encoder")
    ):
        raise ValueError(
            f"{path}: XL's refiner is not supported; its base, with two text encoders, is"
        )
    return index


def is_xl(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's index is of Stable Diffusion XL."""
    return "XL" in index["_class_name"]


def is_sd3(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline's index is of Stable Diffusion 3."""
    return is_sd3_class(index["_class_name"])


def encoder_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders of a pipeline's text encoders; of Stable Diffusion 3's those that are there."""
    if is_sd3(index):
        return named_parts(index, _ENCODERS)
    return ("text_encoder", "text_encoder_2") if is_xl(index) else ("text_encoder",)


def check_channels(folder: Path, name: str, config: BackboneConfig, vae: VAE) -> None:
    """Raises ValueError for a network, called `name`, that isn't of the autoencoder's latents."""
    channels, for_inpainting = vae.config.latent_channels, 2 * vae.config.latent_channels + 1
    if config.in_channels not in (channels, for_inpainting) or config.out_channels != channels:
        raise ValueError(
            f"{folder}: the {name} has {config.in_channels} channels in and "
            f"{config.out_channels} out; must be {channels} (or {for_inpainting}, for "
            f"inpainting) and {channels}, as the autoencoder's latents have"
        )


def load_texts(
    folder: Path, length: int = 0, **options: Any
) -> FrozenText | FrozenTextPair | FrozenTextTriple:
    """The text encoders of a pipeline; for `options` see `pretrained.kinds.Options`.

    Args:
      length: of Stable Diffusion 3 the tokens of a text's states, CLIP's and T5's; 0: as many as
        diffusers takes.
    """
    index = read_index(folder)
    if is_sd3(index):
        return _load_triple(folder, index, length, options)
    texts = [load_clip_text(folder / name, **options) for name in encoder_names(index)]
    if len(texts) == 1:
        return FrozenText(*texts)
    return FrozenTextPair(*texts, bool(index.get("force_zeros_for_empty_prompt", True)))


def _load_triple(
    folder: Path, index: Mapping[str, Any], length: int, options: dict[str, Any]
) -> FrozenTextTriple:
    config = read_config(MMDIT, folder / "transformer")
    widths = dict(width=config.joint_attention_dim, pooled_width=config.pooled_projection_dim)
    first = clip_length(folder)
    length = length or first + T5_TOKENS
    if length <= first:
        raise ValueError(
            f"{folder}: {length} tokens of text; CLIP's are {first}, so that it must be at least "
            f"{first + 1}"
        )
    loaders = zip(_ENCODERS, (load_clip_text, load_clip_text, load_t5), strict=True)
    there = encoder_names(index)
    of_t5 = options
    if jnp.dtype(options.get("dtype", jnp.float32)) == jnp.float16:
        of_t5 = options | {"dtype": jnp.float32}  # in float16 its states overflow
    texts = [
        load(folder / name, **(of_t5 if load is load_t5 else options)) if name in there else None
        for name, load in loaders
    ]
    return FrozenTextTriple(*texts, **widths, clip_length=first, length=length)
