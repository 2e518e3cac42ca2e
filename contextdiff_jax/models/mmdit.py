"""The multimodal diffusion transformer (MMDiT) of Stable Diffusion 3 and 3.5 (Esser et al., 2024),
NHWC, in Flax NNX.

A picture's patches and the text's tokens are two streams that attend to each other in every layer.
The function and the config's names are those of diffusers' `SD3Transformer2DModel`, whose weights
load one to one (`contextdiff_jax.pretrained.mmdit`). A parameter of layers that are alike is one
array, and they run as one `lax.scan`: a program of one layer, whatever their number.

Ours: an optional context head, which predicts E[r(x0, c) | x_t, c] from the last features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from contextdiff_jax.models.captions import Captions, pooled_text
from contextdiff_jax.models.joint import MLP, JointBlock, modulate
from contextdiff_jax.models.layers import (
    LECUN,
    TimestepEmbedding,
    linear,
    matmul,
    timestep_embedding,
    torch_frequencies,
)
from contextdiff_jax.models.low_resolution import embed_level
from contextdiff_jax.models.mmdit_config import MMDiTConfig, Stack
from contextdiff_jax.models.patches import patches, unpatch
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.stacked import Stacked

_TIME_FEATURES = 256


def positions(
    config: MMDiTConfig, height: int, width: int
) -> tuple[Float[np.ndarray, "H D2"], Float[np.ndarray, "W D2"]]:
    """Sine-cosine embeddings of the rows and of the columns of a grid of patches, which lies in the
    middle of the largest one. ValueError for a larger one.
    """
    largest, frequencies = config.pos_embed_max_size, np.arange(config.width // 4)
    if max(height, width) > largest:
        raise ValueError(
            f"size: {height} x {width} patches; model.pos_embed_max_size={largest} is the most"
        )
    frequencies = 1 / 10000 ** (frequencies / (config.width / 4))
    unit = np.float32(largest / (config.sample_size // config.patch_size))

    def embed(count: int) -> np.ndarray:
        first = (largest - count) // 2
        places = (
            np.arange(first, first + count, dtype=np.float32) / unit
        )  # float32: diffusers' bits
        angles = places[:, None].astype(np.float64) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)

    return embed(height), embed(width)


class PatchEmbedding(nnx.Module):
    """Patches to tokens: a convolution whose stride is its kernel's side, as a matrix product."""

    def __init__(self, in_channels: int, features: int, patch_size: int, *, rngs, **types: Any):
        self.patch_size, self.dtype = patch_size, types["dtype"]
        shape = (patch_size, patch_size, in_channels, features)
        self.kernel = nnx.Param(LECUN(rngs.params(), shape, types["param_dtype"]))
        self.bias = nnx.Param(jnp.zeros((features,), types["param_dtype"]))

    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B N D"]:
        kernel = rearrange(self.kernel[...], "p q C D -> (p q C) D").astype(self.dtype)
        tokens = patches(x, self.patch_size, "model.patch_size").astype(self.dtype)
        return matmul(tokens, kernel) + self.bias[...].astype(self.dtype)


class ContextHead(nnx.Module):
    """Own MLP and zero-initialised projection to patches of r: the context estimate starts at 0.

    As the UNet's, it reads the trunk's features and doesn't train them.
    """

    def __init__(self, config: MMDiTConfig, **policy: Any):
        width, patch = config.width, config.patch_size**2
        self.modulation = linear(width, 2 * width, zero_init=True, **policy)
        self.ff = MLP(width, **policy)
        self.proj_out = linear(width, patch * config.in_channels, zero_init=True, **policy)

    def __call__(
        self, x: Float[ArrayLike, "B N D"], time: Float[ArrayLike, "B D"]
    ) -> Float[Array, "B N P"]:
        scale, shift = jnp.split(self.modulation(time), 2, axis=-1)
        return self.proj_out(x + self.ff(modulate(x, shift, scale)))


class MMDiT(nnx.Module):
    """Denoiser of x_t given t, text tokens and the pooled text; see the module docstring.

    Args:
      config: sizes and options.
      rngs: initialisation; the blocks start as the identity and the outputs at zero.
      precision: of the parameters, the products and what is returned.
    """

    name = "transformer"  # of its parameters, and of its folder in a pipeline's
    keeps_coarse = False  # whether a step can reuse another's coarser levels

    def __init__(
        self,
        config: MMDiTConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ):
        policy = precision.policy(rngs)
        self.config, self.precision = config, precision
        width, patch = config.width, config.patch_size**2
        channels = config.in_channels * (1 + config.low_resolution)
        self.patch_in = PatchEmbedding(channels, width, config.patch_size, **policy)
        self.time_embedding = TimestepEmbedding(_TIME_FEATURES, width, **policy)
        self.pooled_embedding = TimestepEmbedding(config.pooled_projection_dim, width, **policy)
        self.level_embedding = (
            TimestepEmbedding(_TIME_FEATURES, width, **policy) if config.low_resolution else None
        )
        self.text_in = linear(config.joint_attention_dim, width, **policy)
        self.stacks = nnx.List(_stack(config, stack, policy) for stack in config.stacks())
        self.modulation = linear(width, 2 * width, zero_init=True, **policy)
        self.proj_out = linear(width, patch * config.out_channels, zero_init=True, **policy)
        self.context_head = ContextHead(config, **policy) if config.context_head else None

    def __call__(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Shaped[ArrayLike, "*B"],
        text_tokens: Float[ArrayLike, "B L E"],
        pooled: Float[ArrayLike, "B P"],
        text_mask: Bool[ArrayLike, "B L"] | None = None,
        level: Float[ArrayLike, "B"] | None = None,
    ) -> Float[Array, "B H W O"] | tuple[Float[Array, "B H W O"], Float[Array, "B H W R"]]:
        """The network's prediction, float32; with a context head the pair (prediction, context).

        Args:
          x: noisy image or latent; height and width multiples of `patch_size`.
          t: timestep, 0..1000, one a sample or one for all; integer or fractional.
          text_tokens: the text encoders' states. pooled: their pooled text. text_mask: True where a
              token counts; None: all count.
          level: of an upsampler, the noise's in the low-resolution picture, whose channels follow
              x's.
        """
        h, text, time = self.enter(x, t, text_tokens, pooled, level)
        for stack in self.stacks:
            h, text = stack((h, text), time, text_mask)
        return self.leave(h, time, jnp.shape(x))

    def enter(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Shaped[ArrayLike, "*B"],
        text_tokens: Float[ArrayLike, "B L E"],
        pooled: Float[ArrayLike, "B P"],
        level: Float[ArrayLike, "B"] | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B L D"], Float[Array, "B D"]]:
        """Both streams' tokens and the time's embedding, as the layers read them."""
        config, dtype = self.config, self.precision.compute
        p, shape = config.patch_size, jnp.shape(x)
        h = self.patch_in(x)  # [B, N, D]
        rows, columns = positions(config, shape[1] // p, shape[2] // p)
        # a patch's first half says which column it is in, as in the weights of diffusers
        place = jnp.concatenate(
            jnp.broadcast_arrays(columns[None, :], rows[:, None]), axis=-1
        )  # [H / p, W / p, D]
        h = h + rearrange(place, "H W D -> (H W) D").astype(dtype)
        t = jnp.broadcast_to(jnp.asarray(t), shape[:1])
        frequencies = torch_frequencies(_TIME_FEATURES // 2)
        temb = self.time_embedding(timestep_embedding(t, _TIME_FEATURES, frequencies=frequencies))
        if self.level_embedding is not None:
            temb = temb + self.level_embedding(embed_level(level, _TIME_FEATURES))
        time = jax.nn.silu(temb + self.pooled_embedding(pooled))  # [B, D]
        return h, self.text_in(text_tokens), time

    def leave(
        self, h: Float[ArrayLike, "B N D"], time: Float[ArrayLike, "B D"], shape: tuple[int, ...]
    ) -> Float[Array, "B H W O"] | tuple[Float[Array, "B H W O"], Float[Array, "B H W C"]]:
        """What the call returns, of the last layer's tokens, for pictures of `shape`."""
        scale, shift = jnp.split(self.modulation(time), 2, axis=-1)
        out = self._picture(self.proj_out(modulate(h, shift, scale)), shape)
        if self.context_head is None:
            return out
        return out, self._picture(self.context_head(*jax.lax.stop_gradient((h, time))), shape)

    def predict(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Shaped[ArrayLike, "*B"],
        captions: Captions,
        seen: Bool[ArrayLike, "B L"] | None,
        size: tuple[int, int],
    ) -> Array | tuple[Array, Array]:
        """The call, of captions, of which the tokens in `seen` count; the picture's `size` is not
        read.
        """
        level = None if captions.low is None else captions.low.level
        return self(x, t, captions.tokens, pooled_text(captions), seen, level)

    def _picture(self, tokens: Float[ArrayLike, "B N P"], shape: tuple[int, ...]) -> Array:
        return unpatch(tokens, self.config.patch_size, shape).astype(self.precision.output)


def _stack(config: MMDiTConfig, stack: Stack, policy: dict) -> Stacked:
    def block(rngs: nnx.Rngs) -> JointBlock:
        return JointBlock(
            config.width,
            config.num_attention_heads,
            qk_norm=config.qk_norm is not None,
            dual=stack.dual,
            last=stack.last,
            **policy | {"rngs": rngs},
        )

    return Stacked(block, stack.count, rngs=policy["rngs"], dtype=policy["dtype"])
