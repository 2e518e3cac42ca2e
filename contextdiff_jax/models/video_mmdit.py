"""The multimodal transformer inflated to clips [B, F, H, W, C], as `video` does it to the UNet.

The frames are a batch of pictures, each beside a text stream of its own, and the layers see other
frames in two places:

- a picture's queries find the tokens of the first and of the previous frame beside those of their
  own and the text's. The keys of the three frames count for a third each,

      softmax([q k_own - log 3, q k_first - log 3, q k_previous - log 3, q k_text]),            (1)

  so that pictures and text share the attention as in the image network: frames that are equal are
  denoised as the picture is, and nothing is added that would have to be learned first;
- after each layer, attention over the frames at each place, which starts at zero.

A clip of one frame takes exactly the image network's path. The weights stay the image network's own
arrays, and layers that are alike run as one scan, with their temporal attention.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real, Shaped

from contextdiff_jax.models.attention import HIDDEN, self_attention, with_bias
from contextdiff_jax.models.captions import Captions, pooled_text
from contextdiff_jax.models.frames import (
    ScannedControl,
    TemporalAttention,
    VideoNetwork,
    by_frame,
    clips_of,
    flat,
    frames_of,
    of_each_frame,
    seen_frames,
)
from contextdiff_jax.models.joint import JointBlock
from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.stacked import Stacked

Heads = tuple[Array, Array, Array]  # q (scaled), k, v, each [FB, H, N, D]


class Clip(NamedTuple):
    """What a layer is told of the clips: how many they are, their grid of patches, the editor."""

    batch: int
    grid: tuple[int, int]
    control: ScannedControl | None


@dataclasses.dataclass
class FrameAttention:
    """The attentions of one layer over frames; `looks`: what the control collects in it."""

    clip: Clip
    mask: Bool[ArrayLike, "FB L"] | None
    choice: str
    looks: Float[Array, "P F N"] | None = None

    def joint(
        self, picture: Heads, text: Heads, *, both: bool
    ) -> tuple[Float[Array, "FB H N D"], Float[Array, "FB H L D"] | None]:
        """(1) of the picture's queries; the text's find the tokens of their own frame and text."""
        (q, *own), (q_text, *of_text) = (map(_turned, heads) for heads in (picture, text))
        seen = [seen_frames(y, self.clip.batch, own=True) for y in own]  # [FB, M, H, D]
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(seen, of_text, strict=True))
        bias = self._bias(seen[0], q, q_text)
        if self.clip.control is None:
            found = _biased(q, k, v, bias, self.choice)
        else:
            found = self._controlled(q, k, v, bias, seen[0].shape[1])
        if not both:
            return _turned(found), None
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, of_text, strict=True))
        mask = self.mask
        if mask is not None:
            mask = jnp.concatenate([jnp.ones(q.shape[:2], bool), mask], axis=1)
        read = self_attention(q_text, k, v, 1.0, mask, choice=self.choice)
        return _turned(found), _turned(read)

    def alone(self, q: Array, k: Array, v: Array) -> Float[Array, "FB H N D"]:
        """A second attention's, of the pictures alone: all frames' keys count alike."""
        q, k, v = map(_turned, (q, k, v))
        k, v = (seen_frames(y, self.clip.batch, own=True) for y in (k, v))
        control = self.clip.control
        if control is None or not control.changes_frames(q.shape[1]):
            return _turned(self_attention(q, k, v, 1.0, choice=self.choice))
        weights = self._sparse_causal(jax.nn.softmax(_logits(q, k), axis=-1))
        return _turned(_weighed(weights, v))

    def _bias(self, seen: Array, q: Array, q_text: Array) -> Float[Array, "FB M"]:
        """What is added to the logits of the keys of the frames that are `seen` and of the text."""
        mask = jnp.ones(q_text.shape[:2], bool) if self.mask is None else self.mask
        pictures = jnp.full(seen.shape[:2], -math.log(seen.shape[1] // q.shape[1]))
        return jnp.concatenate([pictures, jnp.where(mask, 0.0, HIDDEN)], axis=1)

    def _controlled(
        self, q: Array, k: Array, v: Array, bias: Array, pictures: int
    ) -> Float[Array, "FB N H D"]:
        """What the control makes of the weights on the pictures' keys, which are the first, and on
        the text's. Together they sum to 1 again.
        """
        B, logits = self.clip.batch, _logits(q, k) + bias[:, None, None]
        seen, text = jnp.split(jax.nn.softmax(logits, axis=-1), [pictures], axis=-1)
        text, self.looks = self.clip.control.changed(
            rearrange(text, "(F B) H N L -> B H F N L", B=B)
        )
        text = by_frame(rearrange(text, "B H F N L -> B F H N L"))
        weights = jnp.concatenate([self._sparse_causal(seen), text], axis=-1)
        return _weighed(weights / weights.sum(-1, keepdims=True), v)

    def _sparse_causal(self, weights: Float[Array, "FB H N M"]) -> Float[Array, "FB H N M"]:
        weights = frames_of(weights, self.clip.batch)
        return flat(self.clip.control.sparse_causal(weights, self.clip.grid))


def _turned(y: Float[Array, "FB A B D"]) -> Float[Array, "FB B A D"]:
    """Heads and tokens in each other's place: frames are gathered along tokens that come first."""
    return jnp.swapaxes(y, 1, 2)


def _biased(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    bias: Float[Array, "B M"],
    choice: str,
) -> Float[Array, "B N H D"]:
    """Attention of scaled queries whose logits have a bias for each key."""
    q, k = with_bias(q, k, bias)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)))  # as wide as they are
    return self_attention(q, k, v, 1.0, choice=choice)[..., :-1]


def _logits(q: Float[Array, "B N H D"], k: Float[Array, "B M H D"]) -> Float[Array, "B H N M"]:
    return jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)


def _weighed(
    weights: Float[Array, "B H N M"], v: Float[Array, "B M H D"]
) -> Float[Array, "B N H D"]:
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v.dtype), v)


class VideoBlock(nnx.Module):
    """A joint block that sees other frames, then attention over the frames. With a control, what
    that collects is added up from layer to layer.
    """

    def __init__(self, block: JointBlock, temporal: TemporalAttention):
        self.block, self.temporal = block, temporal

    def __call__(
        self,
        x: Float[ArrayLike, "FB N D"],
        text: Float[ArrayLike, "FB L D"],
        looks: Float[Array, "P F N"] | None,
        time: Float[ArrayLike, "FB D"],
        mask: Bool[ArrayLike, "FB L"] | None,
        clip: Clip,
    ) -> tuple[Array, Array, Array | None]:
        if len(x) == clip.batch and clip.control is None:
            x, text = self.block(x, text, time, mask)
        else:
            by = FrameAttention(clip, mask, self.block.self_attention)
            x, text = self.block.through(x, text, time, by.joint, by.alone)
            looks = None if looks is None else looks + by.looks
        return flat(self.temporal(frames_of(x, clip.batch))), text, looks


class VideoMMDiT(VideoNetwork):
    """A transformer for clips. It takes over the image transformer's layers, which is of no use by
    itself afterwards.

    `remat`: activations of each layer are computed anew in the backward pass.
    """

    name = MMDiT.name

    def __init__(self, transformer: MMDiT, *, rngs: nnx.Rngs, remat: bool = False):
        precision = Precision(compute=transformer.precision.compute)
        policy, config = precision.policy(rngs), transformer.config
        self.image = transformer

        def temporal(rngs: nnx.Rngs) -> TemporalAttention:
            given = policy | {"rngs": rngs}
            return TemporalAttention(config.width, config.num_attention_heads, **given)

        for stack, kind in zip(transformer.stacks, config.stacks(), strict=True):
            new = Stacked(temporal, kind.count, rngs=rngs, dtype=precision.compute)
            stack.layers = VideoBlock(stack.layers, new.layers)
            stack.remat = "blocks" if remat else stack.remat

    def __call__(
        self,
        x: Float[ArrayLike, "B F H W C"],
        t: Shaped[ArrayLike, "*B"],
        text_tokens: Float[ArrayLike, "B L E"],
        pooled: Float[ArrayLike, "B P"],
        text_mask: Bool[ArrayLike, "B L"] | None = None,
        control: ScannedControl | None = None,
    ) -> Float[Array, "B F H W O"] | tuple[Float[Array, "B F H W O"], Float[Array, "B F H W C"]]:
        """The prediction (with a context head: and the context) of every frame; arguments as the
        image transformer's.
        """
        (B, F, height, width), p = x.shape[:4], self.config.patch_size
        pictures = by_frame(x)
        t = jnp.broadcast_to(jnp.asarray(t), (B,))
        t, text_tokens, pooled = (of_each_frame(a, F) for a in (t, text_tokens, pooled))
        mask = None if text_mask is None else of_each_frame(text_mask, F)
        h, text, time = self.image.enter(pictures, t, text_tokens, pooled)
        clip, looks = Clip(B, (height // p, width // p), control), None
        if control is not None:
            weights = (B, self.config.num_attention_heads, F, h.shape[1], text.shape[1])
            empty = jax.ShapeDtypeStruct(weights, jnp.float32)
            looks = jnp.zeros(jax.eval_shape(control.changed, empty)[1].shape)
        for stack in self.image.stacks:
            h, text, looks = stack((h, text, looks), time, mask, clip)
        if control is not None:
            control.collect(looks / self.config.num_layers, clip.grid)
        return jax.tree.map(lambda y: clips_of(y, B), self.image.leave(h, time, pictures.shape))

    def predict(
        self,
        x: Float[ArrayLike, "B F H W C"],
        t: Real[ArrayLike, "B"],
        captions: Captions,
        seen: Bool[ArrayLike, "B L"] | None,
        control: ScannedControl | None = None,
    ) -> Array | tuple[Array, Array]:
        """The call, of captions, of which the tokens in `seen` count."""
        return self(x, t, captions.tokens, pooled_text(captions), seen, control)
