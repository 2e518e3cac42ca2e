"""A Stable Diffusion 3 or 3.5 folder (model_index.json and its parts), read and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from contextdiff_jax.data.folder_tokenizer import check_ids
from contextdiff_jax.data.tokenizer import PipelineTokens
from contextdiff_jax.models.frozen_text import FrozenTextTriple
from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.pretrained.mmdit import load_mmdit
from contextdiff_jax.pretrained.pipeline_folder import (
    T5_TOKENS,
    check_channels,
    encoder_names,
    load_texts,
    read_index,
)
from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler
from contextdiff_jax.pretrained.vae import load_vae


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableDiffusion3:
    """The networks, the scheduler, and the tokenizers of the text encoders that are there."""

    transformer: MMDiT
    vae: VAE
    encoder: FrozenTextTriple
    scheduler: Scheduler
    tokens: PipelineTokens

    zeros_for_empty = False
    guidance, steps = 7.0, 28  # where the caller says nothing, as in diffusers
    rounds_strength_up = True

    @property
    def backbone(self) -> MMDiT:
        """The denoising network."""
        return self.transformer

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[H, W, Z] of the transformer's own size."""
        side = self.transformer.config.sample_size
        return side, side, self.vae.config.latent_channels

    @property
    def text_length(self) -> int:
        """The tokens after which a text is cut: T5's, if it is there."""
        last = list(self.tokens.parts)[-1]
        return self.tokens.length_of(last, self.encoder.longest)

    def token_ids(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B _"], ...]:
        """Ids for each text encoder, padded (and cut) to its length."""
        parts = self.tokens.encode_parts(texts, self.encoder.longest)
        return tuple(ids for ids, _, _ in parts.values())

    def encode_text(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "B N"], Bool[np.ndarray, "B N"], list[str]]:
        """Ids of all text encoders, which of them aren't padding, and the words of each text that
        none of them reads.

        Raises ValueError for a token that an encoder's embedding has no row for.
        """
        texts, encoders = list(texts), self.encoder.encoders
        parts = self.tokens.encode_parts(texts, self.encoder.longest)
        for name, (ids, _, _) in parts.items():
            rows = encoders[name.replace("tokenizer", "text_encoder")].config.vocab_size
            check_ids(ids, texts, self.tokens.parts[name].tokenizer, rows, name)
        return self.tokens.join(parts)


def read_sd3(
    folder: Path, max_sequence_length: int = T5_TOKENS, **options: Any
) -> StableDiffusion3:
    """A Stable Diffusion 3 or 3.5 folder, as diffusers wrote it or converted.

    Args:
      max_sequence_length: tokens that T5 reads of a text.
      options: of all networks, see `contextdiff_jax.pretrained.kinds.Options`.

    Raises ValueError, one line, for a part that is missing, damaged or doesn't fit.
    """
    if not 1 <= max_sequence_length <= 512:
        raise ValueError(
            f"max_sequence_length={max_sequence_length}: must lie in 1..512, as in diffusers"
        )
    index = read_index(folder)
    scheduler = load_scheduler(folder / "scheduler", pipeline=index["_class_name"])
    if not scheduler.is_flow:
        raise ValueError(
            f"{folder / 'scheduler'}: _class_name={scheduler.class_name!r}: Stable Diffusion 3 "
            "needs a flow-matching scheduler, as FlowMatchEulerDiscreteScheduler"
        )
    tokens = PipelineTokens(folder)
    _check_tokens(folder, encoder_names(index), tokens)
    encoder = load_texts(folder, tokens.clip_length + max_sequence_length, **options)
    transformer = load_mmdit(folder / "transformer", **options)
    vae = load_vae(folder / "vae", **options)
    _check_fit(folder, transformer, vae, encoder)
    return StableDiffusion3(
        transformer=transformer, vae=vae, encoder=encoder, scheduler=scheduler, tokens=tokens
    )


def _check_tokens(folder: Path, names: Sequence[str], tokens: PipelineTokens) -> None:
    """Raises ValueError for text encoders without tokenizers of their kind."""
    if not names:
        raise ValueError(f"{folder}: text_encoder: all three are null; at least one must be there")
    for name in names:
        part = name.replace("text_encoder", "tokenizer")
        if part not in tokens.parts:
            raise ValueError(f"{folder / part}: null in model_index.json, though {name} is there")
        wanted, found = "t5" if part == "tokenizer_3" else "clip", tokens.parts[part].kind
        if found != wanted:
            raise ValueError(
                f"{folder / part}: the tokenizer is {found.upper()}'s; {name} reads "
                f"{wanted.upper()}'s"
            )


def _check_fit(folder: Path, transformer: MMDiT, vae: VAE, encoder: FrozenTextTriple) -> None:
    config = transformer.config
    check_channels(folder, "transformer", config, vae)
    if config.context_head:
        raise ValueError(f"{folder}: the transformer has a context head: not sampled here")
    for name, found in encoder.encoders.items():
        if name == "text_encoder_3":
            if found.config.d_model != config.joint_attention_dim:
                raise ValueError(
                    f"{folder}: text_encoder_3 has states {found.config.d_model} wide; must be the "
                    f"transformer's joint_attention_dim, {config.joint_attention_dim}"
                )
        elif not found.config.with_projection:
            raise ValueError(
                f"{folder / name}: has no text_projection; must be a CLIPTextModelWithProjection"
            )
    clips = [each for name, each in encoder.encoders.items() if name != "text_encoder_3"]
    wide = sum(clip.config.hidden_size for clip in clips)
    pooled = sum(clip.config.projection_dim for clip in clips)
    fits = pooled == config.pooled_projection_dim or len(clips) < 2
    if wide > config.joint_attention_dim or not fits or pooled > config.pooled_projection_dim:
        raise ValueError(
            f"{folder}: the CLIPs' states are {wide} wide and their projections {pooled}; the "
            f"transformer reads {config.joint_attention_dim} (or fewer, filled with zeros) and "
            f"{config.pooled_projection_dim}"
        )
