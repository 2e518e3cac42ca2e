"""Frames of clips beside each other: what the video forms of the networks share.

An image network sees the frames of all clips as one batch [F*B, ...], the clips of the first frame
first: where devices share the frames, each then has its frames of every clip, and an edit's frames
lie beside those of its source.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from contextdiff_jax.models.layers import timestep_embedding
from contextdiff_jax.models.mmdit_config import MMDiTConfig
from contextdiff_jax.models.transformer import Attention
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.parallel.mesh import current_target, laid


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
        self, weights: Float[ArrayLike, "F B H N M"], grid: tuple[int, int]
    ) -> Float[Array, "F B H N M"]:
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
        self, weights: Float[ArrayLike, "F B H N M"], grid: tuple[int, int]
    ) -> Float[Array, "F B H N M"]:
        """As `AttentionControl.sparse_causal`."""

    def collect(self, looks: Float[Array, "P F N"], grid: tuple[int, int]) -> None:
        """Takes the mean of all layers' looks."""


AnyControl = AttentionControl | ScannedControl


def by_frame(clips: Shaped[ArrayLike, "B F *D"]) -> Shaped[Array, "FB *D"]:
    """The frames of all clips as one batch, which devices share as they share frames."""
    return flat(rearrange(clips, "B F ... -> F B ..."))


def clips_of(x: Shaped[ArrayLike, "FB *D"], batch: int) -> Shaped[Array, "B F *D"]:
    """Whose frames these are: the inverse of `by_frame`."""
    return rearrange(x, "(F B) ... -> B F ...", B=batch)


def flat(frames: Shaped[ArrayLike, "F B *D"]) -> Shaped[Array, "FB *D"]:
    """Both axes as one, the inverse of `frames_of`."""
    return _shared(rearrange(frames, "F B ... -> (F B) ..."))


def frames_of(x: Shaped[ArrayLike, "FB *D"], batch: int) -> Shaped[Array, "F B *D"]:
    """The axis of frames apart from that of clips."""
    return _shared(rearrange(x, "(F B) ... -> F B ...", B=batch))


def _shared(x: Shaped[Array, "F *D"]) -> Shaped[Array, "F *D"]:
    return laid(x, ("batch", *[None] * (x.ndim - 1)))


def of_each_frame(x: Shaped[ArrayLike, "B *D"], frames: int) -> Shaped[Array, "FB *D"]:
    """What is a clip's for each of its frames."""
    return repeat(jnp.asarray(x), "B ... -> (F B) ...", F=frames)


def neighbours(x: Float[ArrayLike, "F B *D"], step: int) -> Float[Array, "F B *D"]:
    """Each frame's previous (`step` 1) or next one (-1): itself at the clip's end."""
    F = len(x)
    if not current_target().splits("batch"):
        around = jnp.concatenate([x[:1], x, x[-1:]])
        return around[1 - step : F + 1 - step]
    # A roll, of which devices send each other one frame; of the above they send four times as much.
    end = jnp.arange(F) == (0 if step > 0 else F - 1)
    return jnp.where(end.reshape(F, *[1] * (x.ndim - 1)), x, jnp.roll(x, step, axis=0))


def seen_frames(
    x: Float[ArrayLike, "FB N *D"], batch: int, *, own: bool
) -> Float[Array, "FB M *D"]:
    """The tokens that each frame sees: with `own` its own, then the first and the previous one's
    (of the first frame itself, where there is no other).
    """
    frames = frames_of(x, batch)
    first = jnp.broadcast_to(frames[:1], frames.shape)
    parts = [frames] * own + [first, neighbours(frames, 1)]
    return flat(jnp.concatenate(parts, axis=2))


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

    def __call__(self, x: Float[ArrayLike, "F B N D"]) -> Float[Array, "F B N D"]:
        F, B, _, D = x.shape
        number = timestep_embedding(jnp.arange(F), D)[:, None, None].astype(x.dtype)
        # Devices that share frames each take all frames of some places: less is sent so than if
        # each gathered the keys and values of all.
        h = _shared(self.norm(x) + number)
        h = _shared(rearrange(h, "F B N D -> (N B) F D"))
        h = _shared(self.attention(h))
        return x + _shared(rearrange(h, "(N B) F D -> F B N D", B=B))
