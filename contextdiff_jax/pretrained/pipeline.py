"""A Stable Diffusion folder (1.x, 2.x, XL; model_index.json and its parts), read and checked.

`contextdiff_jax.Pipeline` makes pictures of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.pretrained.clip import load_clip_text
from contextdiff_jax.pretrained.files import read_json
from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler
from contextdiff_jax.pretrained.unet import load_unet
from contextdiff_jax.pretrained.vae import load_vae

INDEX_FILE = "model_index.json"
CLASSES = tuple(
    f"StableDiffusion{kind}{way}Pipeline"
    for kind in ("", "XL")
    for way in ("", "Img2Img", "Inpaint")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """The networks, the scheduler, and transformers' tokenizers, one a text encoder.
    `zeros_for_empty`: without a negative text guidance leads away from zeros (XL), not from the
    empty text.
    """

    unet: UNet
    vae: VAE
    texts: tuple[CLIPText, ...]
    scheduler: Scheduler
    tokenizers: tuple[Any, ...]
    zeros_for_empty: bool = False

    def token_ids(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], ...]:
        """Ids for each text encoder, padded (and cut) to its length."""

        def ids(tokenizer, encoder):
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            return np.array(
                tokenizer(
                    list(texts), padding="max_length", max_length=length, truncation=True
                ).input_ids
            )

        return tuple(map(ids, self.tokenizers, self.texts))

    def encode_text(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B *E L"], Bool[np.ndarray, "B L"]]:
        """`token_ids`, those of two encoders beside each other, and a mask that hides nothing."""
        ids = self.token_ids(texts)
        stacked = ids[0] if len(ids) == 1 else np.stack(ids, axis=1)
        return stacked, np.ones(ids[0].shape, bool)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[H, W, Z] of the UNet's own size. ValueError if its config doesn't say."""
        side = self.unet.config.sample_size
        if side is None:
            raise ValueError("size: missing; the UNet's config has no sample_size")
        sides = side if isinstance(side, tuple) else (side, side)
        return (*sides, self.vae.config.latent_channels)


def read_folder(folder: str | Path, **options) -> Folder:
    """A Stable Diffusion 1.x, 2.x or XL folder, as diffusers wrote it or converted.

    `options` of all three networks: see `contextdiff_jax.pretrained.model.Options`. The tokenizer
    is transformers', which is imported here and nowhere else.

    Raises ValueError, one line, for a folder of another pipeline, a part that is missing, damaged
    or doesn't fit.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    index = read_json(path, "a diffusers pipeline folder")
    name = index.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{path}: _class_name={name!r}: another pipeline; one of {', '.join(CLASSES)}"
        )
    scheduler = load_scheduler(folder / "scheduler")
    unet = load_unet(folder / "unet", **options)
    vae = load_vae(folder / "vae", **options)
    is_xl = "XL" in name
    names = ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",)
    if index.get("requires_aesthetics_score") or (is_xl and not (folder / names[0]).is_dir()):
        raise ValueError(
            f"{path}: XL's refiner is not supported; its base, with two text encoders, is"
        )
    texts = [load_clip_text(folder / part, **options) for part in names]
    _check_fit(folder, unet, vae, texts)
    return Folder(
        unet=unet,
        vae=vae,
        texts=tuple(texts),
        scheduler=scheduler,
        tokenizers=tuple(
            _tokenizer(folder / part.replace("text_encoder", "tokenizer")) for part in names
        ),
        zeros_for_empty=is_xl and index.get("force_zeros_for_empty_prompt", True),
    )


def _check_fit(folder: Path, unet: UNet, vae: VAE, texts: Sequence[CLIPText]) -> None:
    channels, width = vae.config.latent_channels, sum(text.config.hidden_size for text in texts)
    if (
        unet.config.in_channels not in (channels, 2 * channels + 1)
        or unet.config.out_channels != channels
    ):
        raise ValueError(
            f"{folder}: the UNet has {unet.config.in_channels} channels in and {unet.config.out_channels} out; must be "
            f"{channels} (or {2 * channels + 1}, for inpainting) and {channels}, as the autoencoder's latents have"
        )
    if any(level.text_features != width for level in unet.config.levels()):
        raise ValueError(
            f"{folder}: the UNet's cross_attention_dim differs from the text encoders' width, {width}"
        )
    if unet.config.context_head or (unet.config.addition_embed_type is not None) != (
        len(texts) == 2
    ):
        raise ValueError(
            f"{folder}: the UNet's addition_embed_type={unet.config.addition_embed_type!r} doesn't fit {len(texts)} text "
            "encoders, or it has a context head: not sampled here"
        )
    if len(texts) == 2:
        read = (
            unet.config.projection_class_embeddings_input_dim
            - 6 * unet.config.addition_time_embed_dim
        )
        pooled = texts[1].config.projection_dim if texts[1].config.with_projection else 0
        if read != pooled:
            raise ValueError(
                f"{folder}: the UNet reads a pooled text {read} wide; text_encoder_2 gives {pooled}"
            )


def _tokenizer(folder: Path) -> Any:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
