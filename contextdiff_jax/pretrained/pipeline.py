"""A Stable Diffusion folder (1.x, 2.x, XL; model_index.json and its parts), read and checked.

`contextdiff_jax.Pipeline` makes pictures of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from contextdiff_jax.data.folder_tokenizer import check_ids, cut_text, read_folder
from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.frozen_text import FrozenText, FrozenTextPair
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.folder_files import read_json, tokenizer_folder
from contextdiff_jax.pretrained.pipeline_folder import (
    check_channels,
    encoder_names,
    is_sd3,
    is_xl,
    load_texts,
    read_index,
)
from contextdiff_jax.pretrained.pipeline_sd3 import StableDiffusion3, read_sd3
from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler
from contextdiff_jax.pretrained.unet import load_unet
from contextdiff_jax.pretrained.vae import MODEL as VAE_MODEL
from contextdiff_jax.pretrained.vae import load_vae
from contextdiff_jax.runtime.hub import find

if TYPE_CHECKING:
    from contextdiff_jax.inference.opening import FolderPipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusion:
    """The networks, the scheduler, and transformers' tokenizers, one a text encoder."""

    unet: UNet
    vae: VAE
    encoder: FrozenText | FrozenTextPair
    scheduler: Scheduler
    tokenizers: tuple[Any, ...]

    guidance, steps = 7.5, 50  # where the caller says nothing, as in diffusers
    rounds_strength_up = False
    text_length = None  # a text is cut where the ids end

    @property
    def backbone(self) -> UNet:
        """The denoising network."""
        return self.unet

    @property
    def texts(self) -> tuple[CLIPText, ...]:
        """The text encoders."""
        encoder = self.encoder
        return (
            (encoder.clip,) if isinstance(encoder, FrozenText) else (encoder.clip, encoder.clip_2)
        )

    @property
    def zeros_for_empty(self) -> bool:
        """Whether without a negative text guidance leads away from zeros (XL), not from the empty
        text; an explicit "" is the empty text.
        """
        return self.encoder.zeros_for_empty

    @property
    def text(self) -> CLIPText:
        """The first text encoder, the only one but in XL."""
        return self.texts[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[H, W, Z] of the UNet's own size. ValueError if its config doesn't say."""
        side = self.unet.config.sample_size
        if side is None:
            raise ValueError("size: missing; the UNet's config has no sample_size")
        sides = side if isinstance(side, tuple) else (side, side)
        return (*sides, self.vae.config.latent_channels)

    def token_ids(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], ...]:
        """Ids for each text encoder, padded (and cut) to its length."""
        return tuple(np.array(rows.input_ids) for rows in self._tokenized(texts))

    def encode_text(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B *E L"], Bool[np.ndarray, "B L"], list[str]]:
        """Ids (those of XL's two encoders beside each other), which of them aren't padding, and the
        words of each text that are cut off.

        Raises ValueError for a token that an encoder's embedding has no row for.
        """
        texts, made = list(texts), []
        for i, (rows, encoder) in enumerate(zip(self._tokenized(texts), self.texts, strict=True)):
            ids, where = np.array(rows.input_ids), f"tokenizer{'_2' * i}"
            check_ids(ids, texts, self.tokenizers[i], encoder.config.vocab_size, where)
            made.append((ids, np.array(rows.attention_mask, bool)))
            if not i:  # XL's two cut alike
                lost = list(map(cut_text, texts, rows.encodings))
        ids, masks = zip(*made, strict=True)
        return (ids[0] if len(ids) == 1 else np.stack(ids, axis=1)), masks[0], lost

    def _tokenized(self, texts: Sequence[str]) -> Iterator[Any]:
        """transformers' encodings, by each text encoder's tokenizer."""
        for tokenizer, encoder in zip(self.tokenizers, self.texts, strict=True):
            length = int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))
            options = dict(padding="max_length", max_length=length, truncation=True)
            yield tokenizer(list(texts), **options)


def load_pipeline(folder: str | Path, **options) -> FolderPipeline:
    """`contextdiff_jax.Pipeline.open` of such a folder, by its name of the first edition."""
    from contextdiff_jax.inference.opening import open_stable_diffusion

    return open_stable_diffusion(folder, **options)


def read_pipeline(folder: str | Path, **options) -> StableDiffusion | StableDiffusion3:
    """A Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 folder, as diffusers wrote it or converted, or (but
    for 3) a single .safetensors file with the tokenizer's folder beside it.

    What diffusers' pipelines put right in old configs is put right here: the scheduler's
    `steps_offset` and `clip_sample`, the UNet's `sample_size`, the autoencoder's type
    (`force_upcast`).

    `options` of all networks: see `contextdiff_jax.pretrained.kinds.Options`; of Stable Diffusion 3
    also `max_sequence_length`, the tokens that T5 reads of a text.

    Raises ValueError, one line, for a folder of another pipeline, a part that is missing, damaged
    or doesn't fit.
    """
    folder = Path(find(folder))
    index = read_index(folder)
    if is_sd3(index):
        return read_sd3(folder, **options)
    if "max_sequence_length" in options:
        raise ValueError(
            f"max_sequence_length={options['max_sequence_length']}: {folder} has no T5, which "
            "alone reads it"
        )
    scheduler = load_scheduler(folder / "scheduler", pipeline=index["_class_name"])
    names = encoder_names(index)
    words = (folder / part.replace("text_encoder", "tokenizer") for part in names)
    tokenizers = tuple(read_folder(tokenizer_folder(part), "clip") for part in words)
    unet, of_vae = load_unet(folder / "unet", **options), dict(options)
    if not is_xl(index):
        unet.config = _corrected(unet.config, folder / "unet")
    elif jnp.dtype(options.get("dtype", jnp.float32)) == jnp.float16:
        # XL's autoencoder overflows in float16: black pictures.
        if read_config(VAE_MODEL, folder / "vae").force_upcast:
            of_vae["dtype"] = jnp.float32
    vae = load_vae(folder / "vae", **of_vae)
    encoder = load_texts(folder, **options)
    _check_fit(folder, unet, vae, encoder)
    return StableDiffusion(
        unet=unet,
        vae=vae,
        encoder=encoder,
        scheduler=scheduler,
        tokenizers=tokenizers,
    )


def _check_fit(folder: Path, unet: UNet, vae: VAE, encoder: FrozenText | FrozenTextPair) -> None:
    width, several = encoder.width, isinstance(encoder, FrozenTextPair)
    check_channels(folder, "UNet", unet.config, vae)
    if any(level.text_features != width for level in unet.config.levels()):
        raise ValueError(
            f"{folder}: the UNet's cross_attention_dim differs from the text encoders' width, "
            f"{width}"
        )
    if unet.config.context_head or (unet.config.addition_embed_type is not None) != several:
        raise ValueError(
            f"{folder}: the UNet's addition_embed_type={unet.config.addition_embed_type!r} "
            f"doesn't fit {1 + several} text encoders, or it has a context head: not sampled here"
        )
    if several and unet.config.pooled_features != encoder.pooled_width:
        raise ValueError(
            f"{folder}: the UNet reads a pooled text {unet.config.pooled_features} wide; "
            f"text_encoder_2 gives {encoder.pooled_width}"
        )


def _corrected(config: UNetConfig, folder: Path) -> UNetConfig:
    """The config, with latents of 64 if diffusers before 0.9 wrote it.

    It stored its default of 32 whatever the network had been trained on.
    """
    values = read_json(folder / "config.json", "a UNet's folder")
    numbers = re.findall(r"\d+", str(values.get("_diffusers_version", "")))[:2]
    is_old = bool(numbers) and tuple(map(int, numbers)) < (0, 9)
    if is_old and isinstance(config.sample_size, int) and config.sample_size < 64:
        return dataclasses.replace(config, sample_size=64)
    return config
