"""Pretrained text encoders in the place of ours: what a run or a folder reads and doesn't train.

Each maps token ids and their mask to states of the tokens, or to those and a pooled text.
`reads_padding`: whether the denoiser reads the states of padding. `zeros_for_empty`: whether zeros,
and not the empty caption's states, stand for no caption. `width` and `pooled_width` are those of
what is given, `longest` the most tokens.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

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

    def __call__(
        self, token_ids: Int[ArrayLike, "B 2 L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B P"]]:
        """States of all tokens, and the pooled text. The ids are those of both tokenizers."""
        first, second = self.clip(token_ids[:, 0]), self.clip_2(token_ids[:, 1])
        states = first.hidden_states[-2], second.hidden_states[-2]
        return jnp.concatenate(states, axis=-1), second.projected


class FrozenT5(nnx.Module):
    """A pretrained T5 encoder, as in Imagen: padding is read by nobody."""

    reads_padding, zeros_for_empty = False, False

    def __init__(self, t5: T5Encoder):
        self.t5 = t5
        self.width = self.pooled_width = t5.config.d_model
        self.longest = math.inf  # its positions are relative

    def __call__(
        self, token_ids: Int[ArrayLike, "B L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> Float[Array, "B L D"]:
        """States of all tokens."""
        return self.t5(token_ids, token_mask)


AnyFrozenText = FrozenText | FrozenTextPair | FrozenT5
