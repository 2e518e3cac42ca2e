"""Pretrained text encoders in the place of ours: what a run or a folder reads and doesn't train.

Each maps token ids and their mask to states of the tokens, or to these, their mask and a pooled
text.
`reads_padding`: whether the denoiser reads the states of padding. `zeros_for_empty`: whether zeros,
and not the empty caption's states, stand for no caption. `width` and `pooled_width` are those of
what is given, `longest` the most tokens, `shapes(length)` those of a text's ids and mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from contextdiff_jax.models.captions import Captions, encode
from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.t5 import T5Encoder


class FrozenText(nnx.Module):
    """A pretrained CLIP text encoder. It reads no mask, unless its config says so: Stable
    Diffusion's networks were trained on the states of all tokens, padding included.
    """

    reads_padding, zeros_for_empty = True, False

    def __init__(self, clip: CLIPText):
        self.clip = clip
        self.width = self.pooled_width = clip.config.hidden_size
        self.longest = clip.config.max_position_embeddings

    def shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a text's ids and mask."""
        return (length,), (length,)

    def __call__(
        self, token_ids: Int[ArrayLike, "B L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> Float[Array, "B L D"]:
        """States of all tokens."""
        mask = token_mask if self.clip.config.use_attention_mask else None
        return self.clip(token_ids, mask).last


class FrozenTextPair(nnx.Module):
    """Stable Diffusion XL's two CLIP text encoders: the states of both penultimate layers, and the
    second's pooled projection (Podell et al., 2023, 2.1).
    """

    reads_padding = True

    def __init__(self, clip: CLIPText, clip_2: CLIPText, zeros_for_empty: bool = False):
        self.clip, self.clip_2, self.zeros_for_empty = clip, clip_2, zeros_for_empty
        configs = clip.config, clip_2.config
        self.width = sum(config.hidden_size for config in configs)
        self.pooled_width = configs[1].projection_dim if configs[1].with_projection else 0
        self.longest = min(config.max_position_embeddings for config in configs)

    def shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a text's ids and mask."""
        return (2, length), (length,)

    def __call__(
        self, token_ids: Int[ArrayLike, "B 2 L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> tuple[Float[Array, "B L D"], Bool[ArrayLike, "B L"], Float[Array, "B P"]]:
        """States of all tokens, which of them count, and the pooled text. The ids are those of both
        tokenizers.
        """
        first, second = self.clip(token_ids[:, 0]), self.clip_2(token_ids[:, 1])
        states = first.hidden_states[-2], second.hidden_states[-2]
        return jnp.concatenate(states, axis=-1), token_mask, second.projected


class FrozenT5(nnx.Module):
    """A pretrained T5 encoder, as in Imagen: padding is read by nobody."""

    reads_padding, zeros_for_empty = False, False

    def __init__(self, t5: T5Encoder):
        self.t5 = t5
        self.width = self.pooled_width = t5.config.d_model
        self.longest = math.inf  # its positions are relative

    def shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a text's ids and mask."""
        return (length,), (length,)

    def __call__(
        self, token_ids: Int[ArrayLike, "B L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> Float[Array, "B L D"]:
        """States of all tokens."""
        return self.t5(token_ids, token_mask)


class FrozenTextTriple(nnx.Module):
    """Stable Diffusion 3's text encoders, two CLIPs and T5 (Esser et al., 2024, 4.2): the CLIPs'
    penultimate states beside each other, filled with zeros to T5's width, then T5's states, padding
    included; and the projections of both CLIPs. In the place of an encoder that is absent stand
    zeros, as it was trained.

    Ids and mask are those of the encoders that are there, one after the other: `clip_length` of
    each CLIP, then T5's. States have `length` tokens, of which `clip_length` are the CLIPs'.
    """

    reads_padding, zeros_for_empty = True, False

    def __init__(
        self,
        clip: CLIPText | None,
        clip_2: CLIPText | None,
        t5: T5Encoder | None,
        *,
        width: int,
        pooled_width: int,
        clip_length: int,
        length: int,
    ):
        self.clip, self.clip_2, self.t5 = clip, clip_2, t5
        self.width, self.pooled_width = width, pooled_width
        self.clip_length, self.longest = clip_length, length

    @property
    def encoders(self) -> dict[str, CLIPText | T5Encoder]:
        """Those that are there, by their folders' names in a pipeline."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        found = zip(names, (self.clip, self.clip_2, self.t5), strict=True)
        return {name: encoder for name, encoder in found if encoder is not None}

    def shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a text's ids and mask."""
        clips = len(self.encoders.keys() - {"text_encoder_3"})
        rest = 0 if self.t5 is None else length - self.clip_length
        return (clips * self.clip_length + rest,), (clips * self.clip_length + rest,)

    def __call__(
        self, token_ids: Int[ArrayLike, "B N"], token_mask: Bool[ArrayLike, "B N"]
    ) -> tuple[Float[Array, "B L D"], Bool[Array, "B L"], Float[Array, "B P"]]:
        """States of all tokens, which of them count, and the pooled text."""
        clips = [clip for clip in (self.clip, self.clip_2) if clip is not None]
        ends = [self.clip_length * (i + 1) for i in range(len(clips))]
        *ids, t5_ids = jnp.split(token_ids, ends, axis=1)
        *masks, t5_mask = jnp.split(token_mask, ends, axis=1)
        outputs = [clip(part) for clip, part in zip(clips, ids, strict=True)]
        pooled = [output.projected for output in outputs]
        states = [output.hidden_states[-2] for output in outputs]
        missing = self.pooled_width - sum(part.shape[1] for part in pooled)
        if len(clips) < 2:  # a projection of the released CLIPs is as wide as their states
            absent = 0 if self.clip is None else len(clips)
            B, rest = token_ids.shape[0], self.width - sum(part.shape[2] for part in states)
            pooled.insert(absent, jnp.zeros((B, missing)))
            wide = min(missing, rest) if clips else rest
            states.insert(absent, jnp.zeros((B, self.clip_length, wide)))
        return self._filled(states, t5_ids), self._mask(masks, t5_mask), jnp.concatenate(pooled, 1)

    def _filled(
        self, states: Sequence[Float[Array, "B _ _"]], t5_ids: Int[Array, "B M"]
    ) -> Float[Array, "B L D"]:
        clip = jnp.concatenate(states, axis=-1)
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, self.width - clip.shape[-1])))
        if self.t5 is None:
            rest = jnp.zeros((clip.shape[0], self.longest - self.clip_length, self.width))
        else:
            rest = self.t5(t5_ids)
        return jnp.concatenate([clip, rest.astype(clip.dtype)], axis=1)

    def _mask(
        self, masks: Sequence[Bool[Array, "B _"]], t5_mask: Bool[Array, "B M"]
    ) -> Bool[Array, "B L"]:
        B, rest = t5_mask.shape[0], self.longest - self.clip_length
        first = masks[0] if masks else jnp.zeros((B, self.clip_length), bool)
        last = t5_mask if self.t5 is not None else jnp.zeros((B, rest), bool)
        return jnp.concatenate([first, last], axis=1)


class KnownTexts(nnx.Module):
    """What a text encoder gave of some texts, by their ids, in its place: training from cached
    states reads the empty caption and its prompts so, without the encoder in memory. States of any
    other text are nan, which no reader takes for a text.
    """

    def __init__(
        self,
        ids: Int[ArrayLike, "K *E"],
        captions: Captions,
        *,
        reads_padding: bool,
        zeros_for_empty: bool,
        pooled_width: int,
    ):
        self.ids, self.states = nnx.Param(jnp.asarray(ids)), nnx.Param(jnp.asarray(captions.tokens))
        self.masks = nnx.Param(jnp.asarray(captions.mask))
        self.pooled = None if captions.pooled is None else nnx.Param(jnp.asarray(captions.pooled))
        self.reads_padding, self.zeros_for_empty = reads_padding, zeros_for_empty
        self.width, self.pooled_width = self.states.shape[-1], pooled_width
        self.longest = self.states.shape[1]

    def shapes(self, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a text's ids and mask."""
        return self.ids.shape[1:], self.ids.shape[-1:]

    def __call__(
        self, token_ids: Int[ArrayLike, "B *E"], token_mask: Bool[ArrayLike, "B L"]
    ) -> tuple[Float[Array, "B N D"], Bool[Array, "B N"], Float[Array, "B P"] | None]:
        """States of all tokens, which of them count, and the pooled text of an encoder that has
        one.
        """
        same = jnp.asarray(token_ids)[:, None] == self.ids[...]  # [B, K, *E]
        same = same.reshape(*same.shape[:2], -1).all(-1)
        row, known = same.argmax(1), same.any(1)
        states = jnp.where(known[:, None, None], self.states[...][row], jnp.nan)
        pooled = None if self.pooled is None else self.pooled[...][row]
        return states, self.masks[...][row], pooled


AnyFrozenText = FrozenText | FrozenTextPair | FrozenTextTriple | FrozenT5 | KnownTexts


encoded = nnx.jit(encode)
