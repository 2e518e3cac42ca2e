"""Frames of clips beside each other: what the video forms of the networks share."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from contextdiff_jax.models.layers import timestep_embedding
from contextdiff_jax.models.mmdit_config import MMDiTConfig
from contextdiff_jax.models.transformer import Attention
from contextdiff_jax.models.unet_config import UNetConfig


@runtime_checkable
class AttentionControl(Protocol):
    """An editor's changes to the attention of a network: each method gives the weights that are
    used.
    """

    def cross(
        self, weights: Float[ArrayLike, "B H F N L"], grid: tuple[int, int]
    ) -> Float[Array, "B H F N L"]:
        """Weights of the pixels' tokens (N = rows x columns of `grid`) on the text's."""

    def changes_frames(self, tokens: int) -> bool:
        """Whether `sparse_causal` changes anything where a frame has so many tokens. Where it
        doesn't, no weights need be in memory.
        """

    def sparse_causal(
        self, weights: Float[ArrayLike, "B F H N M"], grid: tuple[int, int]
    ) -> Float[Array, "B F H N M"]:
        """Weights of a frame's tokens on those of the M / N frames that it sees."""


@runtime_checkable
class ScannedControl(Protocol):
    """The same for layers that run as a scan, out of which nothing gets but by `collect`."""

    def changed(
        self, weights: Float[ArrayLike, "B H F N L"]
    ) -> tuple[Float[Array, "B H F N L"], Float[Array, "P F N"]]:
        """As `AttentionControl.cross`, and how much what the editor watches is looked at."""

    def changes_frames(self, tokens: int) -> bool:
        """As `AttentionControl.changes_frames`."""

    def sparse_causal(
        self, weights: Float[ArrayLike, "B F H N M"], grid: tuple[int, int]
    ) -> Float[Array, "B F H N M"]:
        """As `AttentionControl.sparse_causal`."""

    def collect(self, looks: Float[Array, "P F N"], grid: tuple[int, int]) -> None:
        """Takes the mean of all layers' looks."""


AnyControl = AttentionControl | ScannedControl


def frames_of(x: Float[ArrayLike, "BF *D"], batch: int) -> Float[Array, "B F *D"]:
    """The axis of frames apart from that of clips."""
    return rearrange(x, "(B F) ... -> B F ...", B=batch)


def seen_frames(
    x: Float[ArrayLike, "BF N *D"], batch: int, *, own: bool
) -> Float[Array, "BF M *D"]:
    """The tokens that each frame sees: with `own` its own, then the first and the previous one's
    (of the first frame itself, where there is no other).
    """
    frames = frames_of(x, batch)
    first = jnp.broadcast_to(frames[:, :1], frames.shape)
    previous = jnp.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    parts = [frames] * own + [first, previous]
    return rearrange(jnp.concatenate(parts, axis=2), "B F M ... -> (B F) M ...")


class VideoNetwork(nnx.Module):
    """A network for clips, made of an `image` network whose parts it takes over."""

    @property
    def config(self) -> UNetConfig | MMDiTConfig:
        """The image network's."""
        return self.image.config

    @property
    def context_head(self) -> nnx.Module | None:
        """The image network's, which predicts each frame's context."""
        return self.image.context_head


class TemporalAttention(nnx.Module):
    """Attention over the frames at each place, with a residual; starts as the identity.

    Frames are numbered by a sinusoidal embedding, so any number of them will do.
    """

    def __init__(self, features: int, num_heads: int, **policy):
        self.norm = nnx.LayerNorm(features, epsilon=1e-5, **policy)
        self.attention = Attention(features, num_heads, zero_init=True, **policy)

    def __call__(self, x: Float[ArrayLike, "B F N D"]) -> Float[Array, "B F N D"]:
        B, F, _, D = x.shape
        h = self.norm(x) + timestep_embedding(jnp.arange(F), D)[:, None].astype(x.dtype)
        h = self.attention(rearrange(h, "B F N D -> (B N) F D"))
        return x + rearrange(h, "(B N) F D -> B F N D", B=B)
