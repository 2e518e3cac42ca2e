"""CLIP's text and vision encoders (Radford et al., 2021), with or without their projections, in
Flax NNX.

Config names and functions are those of `transformers`: ViT-L/14 (Stable Diffusion 1.x), OpenCLIP-H
(2.x) and bigG (XL) are configs of these classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from contextdiff_jax.models.layers import TEXT_ACTIVATIONS, convolve, linear
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.transformer import Attention
from contextdiff_jax.runtime.fields import check_choice, no_type_check

# The channels' mean and deviation over the pictures that CLIP was trained on, in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class _CLIPConfig:
    """The fields of both encoders. Raises ValueError, one line with field, value and what is
    allowed.
    """

    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    # Ours: whether there is a projection, and whether tensors are named as transformers did before
    # version 5 (`text_model.` in front of every name even without a projection). Both are read off
    # the weights.
    with_projection: bool = False
    prefixed_names: bool = False

    def __post_init__(self):
        check_choice("hidden_act", self.hidden_act, TEXT_ACTIVATIONS)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{field.name}={value!r}: must be a whole number")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads}: "
                f"must divide hidden_size={self.hidden_size}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> _CLIPConfig:
        """Reads a transformers config.json, whose other fields (generation, training) don't change
        the function.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in fields})

    def to_dict(self) -> dict[str, Any]:
        """transformers' fields."""
        own = ("with_projection", "prefixed_names")
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in own}
        return {k: v for k, v in values.items() if v or k != "use_attention_mask"}


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(_CLIPConfig):
    """transformers' `CLIPTextConfig`; the first and the padding token's ids are carried for
    tokenizers, `use_attention_mask` for the pipelines that read it.
    """

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int | None = 49406
    pad_token_id: int | None = 1
    eos_token_id: int = 49407
    use_attention_mask: bool = False


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(_CLIPConfig):
    """transformers' `CLIPVisionConfig`: square images and patches."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32


class CLIPOutput(NamedTuple):
    """The output of an encoder.

    Attributes:
      last: [B, L, D] states of the tokens; the text encoder's after the final norm.
      pooled: [B, D] state of the text's end token, or of the image's class token, after the final
          norm.
      projected: [B, P] the projection of `pooled` (transformers' `text_embeds`, `image_embeds`), if
          there is one.
      hidden_states: the embeddings, then the output of each layer, without the final norm: [-2] is
          the penultimate layer that XL reads.
    """

    last: Float[ArrayLike, "B L D"]
    pooled: Float[ArrayLike, "B D"]
    projected: Float[ArrayLike, "B P"] | None
    hidden_states: tuple[Float[Array, "B L D"], ...]


class CLIPLayer(nnx.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, config: _CLIPConfig, **policy):
        self.act = TEXT_ACTIVATIONS[config.hidden_act]
        width = config.hidden_size
        self.norm1 = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, **policy)
        self.self_attn = Attention(width, config.num_attention_heads, qkv_bias=True, **policy)
        self.norm2 = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, **policy)
        self.fc1 = linear(width, config.intermediate_size, **policy)
        self.fc2 = linear(config.intermediate_size, width, **policy)

    def __call__(
        self, x: Float[ArrayLike, "B L D"], mask: Bool[ArrayLike, "#B L L"] | None
    ) -> Float[Array, "B L D"]:
        x = x + self.self_attn(self.norm1(x), mask=mask)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def _layers(config: _CLIPConfig, policy: dict) -> nnx.List:
    return nnx.List(CLIPLayer(config, **policy) for _ in range(config.num_hidden_layers))


def _run(layers: nnx.List, x: ArrayLike, mask: ArrayLike | None) -> tuple[Array, ...]:
    """The embeddings and the output of each layer."""
    states = [x]
    for layer in layers:
        states.append(layer(states[-1], mask))
    return tuple(states)


class CLIPText(nnx.Module):
    """Token ids to token states and a pooled state.

    Args:
      config: sizes.
      precision: of the parameters, the products and what is returned.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        self.config = config
        width = config.hidden_size
        self.token_embedding = nnx.Embed(config.vocab_size, width, **policy)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, width, **policy)
        self.layers = _layers(config, policy)
        self.final_layer_norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, **policy)
        projection = dict(use_bias=False, **policy)
        self.text_projection = (
            linear(width, config.projection_dim, **projection) if config.with_projection else None
        )

    def __call__(
        self, token_ids: Int[ArrayLike, "B L"], token_mask: Shaped[ArrayLike, "B L"] | None = None
    ) -> CLIPOutput:
        """Encodes `token_ids`; each token sees itself and those before it, of which `token_mask` is
        True.

        Stable Diffusion gives no mask: its padding is read, too.
        """
        L = token_ids.shape[1]
        if L > self.config.max_position_embeddings:
            raise ValueError(
                f"token_ids: {L} tokens; "
                f"the model has {self.config.max_position_embeddings} positions"
            )
        x = self.token_embedding(token_ids) + self.position_embedding(jnp.arange(L))  # [B, L, D]
        mask = jnp.tril(jnp.ones((1, L, L), bool))
        if token_mask is not None:
            mask = mask & token_mask.astype(bool)[:, None, :]  # [B, L, L]
        states = _run(self.layers, x, mask)
        last = self.final_layer_norm(states[-1])
        end = self._end(token_ids)[:, None, None]
        pooled = jnp.take_along_axis(last, end, axis=1)[:, 0]  # [B, D]
        projected = None if self.text_projection is None else self.text_projection(pooled)
        return CLIPOutput(last, pooled, projected, states)

    def _end(self, token_ids: Int[ArrayLike, "B L"]) -> Int[Array, "B"]:
        """Place of the end token: configs from before its id was right (2) mean the largest id
        instead.
        """
        eos = self.config.eos_token_id
        return jnp.argmax(token_ids if eos == 2 else token_ids == eos, axis=-1)


class CLIPVision(nnx.Module):
    """Images, normalised as CLIP's preprocessing does, to a class token and patch tokens."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nnx.Param(jnp.zeros((width,), precision.params))
        patches = dict(
            kernel_size=(patch, patch), strides=(patch, patch), padding=0, use_bias=False
        )
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            width,
            **patches,
            conv_general_dilated=convolve,
            **policy,
        )
        self.position_embedding = nnx.Embed((config.image_size // patch) ** 2 + 1, width, **policy)
        norm = dict(epsilon=config.layer_norm_eps, **policy)
        self.pre_layernorm = nnx.LayerNorm(width, **norm)
        self.layers = _layers(config, policy)
        self.post_layernorm = nnx.LayerNorm(width, **norm)
        projection = dict(use_bias=False, **policy)
        self.visual_projection = (
            linear(width, config.projection_dim, **projection) if config.with_projection else None
        )

    def __call__(self, images: Float[ArrayLike, "B H W C"]) -> CLIPOutput:
        """Encodes `images` of the config's size. `last` and `hidden_states` are before the final
        norm, as in transformers: [:, 0] is the class token, [:, 1:] are the patches, row by row.
        """
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            raise ValueError(
                f"images: {images.shape[1]} x {images.shape[2]}; the model reads {size} x {size}"
            )
        x = self.patch_embedding(images)  # [B, H/P, W/P, D]
        B, D = x.shape[0], x.shape[-1]
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (B, 1, D))
        x = rearrange(x, "B H W D -> B (H W) D")
        x = jnp.concatenate([first, x], axis=1)  # [B, 1 + H*W/P^2, D]
        x = self.pre_layernorm(x + self.position_embedding(jnp.arange(x.shape[1])))
        states = _run(self.layers, x, None)
        pooled = self.post_layernorm(states[-1][:, 0])
        projected = None if self.visual_projection is None else self.visual_projection(pooled)
        return CLIPOutput(states[-1], pooled, projected, states)
