"""T5's encoder (Raffel et al., 2020), 1.0 (relu) and 1.1 / flan (gated GELU), in Flax NNX.

Config names and the function are those of `transformers`' `T5EncoderModel`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from contextdiff_jax.models.layers import TEXT_ACTIVATIONS, linear
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.transformer import Attention
from contextdiff_jax.runtime.fields import no_type_check

_POSITIVE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
)


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """transformers' `T5Config`, the encoder's part. Raises ValueError with field, value and what is
    allowed.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self):
        for field in _POSITIVE:
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value!r}: must be a whole number of at least 1")
        exact = self.relative_attention_num_buckets // 4  # see relative_buckets
        if not 0 < exact < self.relative_attention_max_distance:
            raise ValueError(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets}: must be at "
                f"least 4, and less than 4 relative_attention_max_distance="
                f"{self.relative_attention_max_distance}"
            )
        if (
            self.activation not in TEXT_ACTIVATIONS
            or self.feed_forward_proj.count("-") > self.gated
        ):
            names = ", ".join(TEXT_ACTIVATIONS)
            raise ValueError(
                f"feed_forward_proj={self.feed_forward_proj!r}: must be ACT or gated-ACT, "
                f"where ACT is one of {names}"
            )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies an activated by a linear branch."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """Name in TEXT_ACTIVATIONS; "gated-gelu" alone means the tanh approximation (T5 1.1)."""
        return (
            "gelu_new"
            if self.feed_forward_proj == "gated-gelu"
            else self.feed_forward_proj.split("-")[-1]
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """Reads a transformers config.json, whose other fields (decoder, generation) the encoder
        doesn't use.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in fields})

    def to_dict(self) -> dict[str, Any]:
        """transformers' fields."""
        return dataclasses.asdict(self)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "N M"]:
    """The bucket of (query n, key m): exact for small distances, logarithmic up to `max_distance`,
    by sign.

    In numpy, while tracing: the logarithm's last bit decides a bucket, so that it must not depend
    on a device.
    """
    half = num_buckets // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # [N, M]: key minus query
    distance = np.abs(offset)
    exact = half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    large = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    large = np.minimum(exact + large.astype(np.int64), half - 1)
    return half * (offset > 0) + np.where(distance < exact, distance, large)


class T5FeedForward(nnx.Module):
    """wo(act(wi x)), or wo(act(wi_0 x) * wi_1 x) if gated."""

    def __init__(self, config: T5Config, **policy):
        options = dict(use_bias=False, **policy)
        self.act = TEXT_ACTIVATIONS[config.activation]
        self.wi_0 = linear(config.d_model, config.d_ff, **options)
        self.wi_1 = linear(config.d_model, config.d_ff, **options) if config.gated else None
        self.wo = linear(config.d_ff, config.d_model, **options)

    def __call__(self, x: Float[ArrayLike, "B L D"]) -> Float[Array, "B L D"]:
        h = self.act(self.wi_0(x))
        return self.wo(h if self.wi_1 is None else h * self.wi_1(x))


class T5Block(nnx.Module):
    """Pre-norm (RMS) self-attention with unscaled logits and the relative bias, feed-forward."""

    def __init__(self, config: T5Config, **policy):
        self.norm1 = nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, **policy)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            head_features=config.d_kv,
            out_bias=False,
            scale=1.0,
            **policy,
        )
        self.norm2 = nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, **policy)
        self.ff = T5FeedForward(config, **policy)

    def __call__(
        self,
        x: Float[ArrayLike, "B L D"],
        mask: Bool[ArrayLike, "B L"] | None,
        bias: Float[ArrayLike, "H L L"],
    ) -> Float[Array, "B L D"]:
        x = x + self.attention(self.norm1(x), mask=mask, bias=bias)
        return x + self.ff(self.norm2(x))


class T5Encoder(nnx.Module):
    """Token ids to token states.

    Args:
      config: sizes.
      precision: of the parameters and the products (bfloat16 or float32: in float16 T5's states
          overflow).
    """

    def __init__(
        self,
        config: T5Config,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        self.config = config
        self.shared = nnx.Embed(config.vocab_size, config.d_model, **policy)
        # The first block's in torch, where the others are handed it.
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets, config.num_heads, **policy
        )
        self.blocks = nnx.List(T5Block(config, **policy) for _ in range(config.num_layers))
        self.final_layer_norm = nnx.RMSNorm(
            config.d_model, epsilon=config.layer_norm_epsilon, **policy
        )

    def __call__(
        self, token_ids: Int[ArrayLike, "B L"], token_mask: Shaped[ArrayLike, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """States of the tokens; those where `token_mask` is False are attended by none."""
        config = self.config
        sizes = config.relative_attention_num_buckets, config.relative_attention_max_distance
        buckets = relative_buckets(token_ids.shape[1], *sizes)
        bias = self.relative_attention_bias(jnp.asarray(buckets))  # [L, L, H]
        bias = jnp.transpose(bias, (2, 0, 1))
        mask = None if token_mask is None else token_mask.astype(bool)
        x = self.shared(token_ids)
        for block in self.blocks:
            x = block(x, mask, bias)
        return self.final_layer_norm(x)
