"""The image networks inflated to clips [B, F, H, W, C]: Tune-A-Video's UNet (Wu et al., 2023), the
same for the transformer (`video_mmdit`), and r_phi over frames.

`inflate` takes trained image modules apart and puts them together again with layers that see other
frames. In the UNet:

- self-attention reads keys and values of the first and of the previous frame (sparse-causal: F
  attentions of N to 2 N tokens instead of one of F N to F N);
- after each transformer block, attention over the frames at each place; after each resnet, a
  low-rank temporal convolution. Both start at zero, so that an inflated network starts as the image
  network, frame by frame.

A clip of one frame takes exactly the image network's path. The weights stay the image network's own
arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Real, Shaped

from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.context import RelationalNetwork
from contextdiff_jax.models.frames import (
    AnyControl,
    AttentionControl,
    TemporalAttention,
    VideoNetwork,
    by_frame,
    clips_of,
    flat,
    frames_of,
    neighbours,
    of_each_frame,
    seen_frames,
)
from contextdiff_jax.models.layers import GroupNorm, ResnetBlock, linear
from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.remat import recomputed
from contextdiff_jax.models.transformer import Attention, SpatialTransformer
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.video_mmdit import VideoMMDiT
from contextdiff_jax.runtime.keys import make_key

RANK_DIVISOR = 4  # a temporal convolution works on a quarter of the channels


class VideoText(NamedTuple):
    """The text as the image UNet hands it on to the transformers."""

    tokens: Float[ArrayLike, "B L D"]
    control: AttentionControl | None = None


def _attend(
    module: Attention,
    x: Float[ArrayLike, "B N D"],
    context: Float[ArrayLike, "B M E"],
    mask: Bool[ArrayLike, "B M"] | None,
    change: Callable[[Array], Array],
) -> Float[Array, "B N D"]:
    """`module` with its weights [B, H, N, M] replaced by `change(weights)`."""
    q, k, v = (
        rearrange(y, "B N (H D) -> B H N D", H=module.num_heads)
        for y in (module.to_q(x), module.to_k(context), module.to_v(context))
    )
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits * (q.shape[-1] ** -0.5 if module.scale is None else module.scale)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = change(jax.nn.softmax(logits, axis=-1)).astype(v.dtype)
    out = jnp.einsum("bhnm,bhmd->bhnd", weights, v)
    return module.to_out(rearrange(out, "B H N D -> B N (H D)"))


class TemporalConv(nnx.Module):
    """Three frames' low-rank convolution at each place, with a residual; starts as the identity."""

    def __init__(
        self,
        channels: int,
        num_groups: int,
        **policy: Any,
    ):
        rank = max(1, channels // RANK_DIVISOR)
        self.norm = GroupNorm(channels, num_groups, **policy)
        self.conv = linear(3 * channels, rank, **policy)
        self.out = linear(rank, channels, zero_init=True, **policy)

    def __call__(self, x: Float[ArrayLike, "F B H W C"]) -> Float[Array, "F B H W C"]:
        h = jax.nn.silu(self.norm(x, axis=1))  # each clip by itself
        # The clip's ends see themselves twice.
        h = jnp.concatenate([neighbours(h, 1), h, neighbours(h, -1)], axis=-1)  # [F, B, H, W, 3C]
        return x + self.out(self.conv(h))


class VideoResnet(nnx.Module):
    """A resnet block on each frame, then a temporal convolution. One time embedding a clip."""

    def __init__(self, resnet: ResnetBlock, *, remat: bool, **policy):
        self.resnet = resnet
        self.temporal = TemporalConv(resnet.conv2.out_features, resnet.norm2.num_groups, **policy)
        self.remat = remat

    def __call__(
        self, x: Float[ArrayLike, "FB H W C"], temb: Float[ArrayLike, "B E"]
    ) -> Float[Array, "FB H W D"]:
        return recomputed(VideoResnet._run, self, x, temb) if self.remat else self._run(x, temb)

    def _run(self, x, temb):
        batch = temb.shape[0]
        h = self.resnet(x, of_each_frame(temb, x.shape[0] // batch))
        return flat(self.temporal(frames_of(h, batch)))


class VideoTransformer(nnx.Module):
    """A spatial transformer whose self-attention is sparse-causal, with temporal attention after
    each block.
    """

    def __init__(self, spatial: SpatialTransformer, *, remat: bool, **policy):
        self.spatial = spatial
        heads = spatial.transformer_blocks[0].attn1.num_heads
        width = spatial.proj_in.out_features
        self.temporal = nnx.List(
            [TemporalAttention(width, heads, **policy) for _ in spatial.transformer_blocks]
        )
        self.remat = remat

    def __call__(
        self, x: Float[ArrayLike, "FB H W C"], text: VideoText, mask: Bool[ArrayLike, "B L"] | None
    ) -> Float[Array, "FB H W C"]:
        if self.remat and text.control is None:
            return recomputed(VideoTransformer._run, self, x, text, mask)
        return self._run(x, text, mask)

    def _run(self, x, text, mask):
        FB, H, W, _ = x.shape
        B, control = text.tokens.shape[0], text.control
        F = FB // B
        h = self.spatial.proj_in(rearrange(self.spatial.norm(x), "FB H W C -> FB (H W) C"))
        for block, temporal in zip(self.spatial.transformer_blocks, self.temporal, strict=True):
            if block.only_cross_attention:
                h = h + self._cross(block.attn1, block.norm1(h), text, mask, (H, W))
            elif F == 1 and control is None:
                h = h + block.attn1(block.norm1(h))
            else:
                h = h + self._sparse_causal(block.attn1, block.norm1(h), B, control, (H, W))
            h = h + self._cross(block.attn2, block.norm2(h), text, mask, (H, W))
            h = h + block.ff(block.norm3(h))
            h = flat(temporal(frames_of(h, B)))
        return x + rearrange(self.spatial.proj_out(h), "FB (H W) C -> FB H W C", H=H)

    @staticmethod
    def _sparse_causal(
        module: Attention, x: Float[ArrayLike, "FB N D"], batch: int, control, grid
    ) -> Float[Array, "FB N D"]:
        source = seen_frames(x, batch, own=False)
        if control is None or not control.changes_frames(x.shape[1]):
            return module.among(x, source)

        def change(weights):  # [F*B, H, N, 2N]
            return flat(control.sparse_causal(frames_of(weights, batch), grid))

        return _attend(module, x, source, None, change)

    @staticmethod
    def _cross(
        module: Attention, x: Float[ArrayLike, "FB N D"], text: VideoText, mask, grid
    ) -> Float[Array, "FB N D"]:
        B, F = text.tokens.shape[0], x.shape[0] // text.tokens.shape[0]
        x = rearrange(x, "(F B) N D -> B (F N) D", B=B)  # all frames read the clip's one text

        def change(weights):  # [B, H, F*N, L]
            apart = rearrange(weights, "B H (F N) L -> B H F N L", F=F)
            return text.control.cross(apart, grid).reshape(weights.shape)

        if text.control is None:
            out = module(x, text.tokens, mask)
        else:
            out = _attend(module, x, text.tokens, mask, change)
        return by_frame(rearrange(out, "B (F N) D -> B F N D", F=F))


class VideoUNet(VideoNetwork):
    """A UNet for clips. It takes over the image UNet's blocks, which is of no use by itself
    afterwards.

    `remat`: activations of each block are computed anew in the backward pass.
    """

    name = UNet.name

    def __init__(self, unet: UNet, *, rngs: nnx.Rngs, remat: bool = False):
        precision = Precision(compute=unet.precision.compute)
        policy = precision.policy(rngs)
        self.image = unet
        blocks = [
            *unet.down_blocks,
            *([] if unet.mid_block is None else [unet.mid_block]),
            *unet.up_blocks,
        ]
        for block in blocks:
            block.resnets = nnx.List(
                [VideoResnet(resnet, remat=remat, **policy) for resnet in block.resnets]
            )
            block.attentions = nnx.List(
                [VideoTransformer(each, remat=remat, **policy) for each in block.attentions]
            )
        if unet.context_head is not None:
            unet.context_head.resnet = VideoResnet(unet.context_head.resnet, remat=remat, **policy)

    def __call__(
        self,
        x: Float[ArrayLike, "B F H W C"],
        t: Shaped[ArrayLike, "*B"],
        text_tokens: Float[ArrayLike, "B L D"],
        text_mask: Bool[ArrayLike, "B L"] | None = None,
        added: Mapping[str, ArrayLike] | None = None,
        control: AttentionControl | None = None,
    ) -> Float[Array, "B F H W O"] | tuple[Float[Array, "B F H W O"], Float[Array, "B F H W C"]]:
        """The prediction (with a context head: and the context) of every frame; arguments as the
        image UNet's.
        """
        B = x.shape[0]
        out = self.image.forward(
            by_frame(x), self.image.time(t, B, added), VideoText(text_tokens, control), text_mask
        )
        return jax.tree.map(lambda y: clips_of(y, B), out)

    def predict(
        self,
        x: Float[ArrayLike, "B F H W C"],
        t: Real[ArrayLike, "B"],
        captions: Captions,
        seen: Bool[ArrayLike, "B L"] | None,
        control: AttentionControl | None = None,
    ) -> Array | tuple[Array, Array]:
        """The call, of captions, of which the tokens in `seen` count."""
        added = self.image.added(captions, x.shape[2:4])
        return self(x, t, captions.tokens, seen, added, control)


class VideoContext(nnx.Module):
    """r_phi of clips: each frame's tokens query the text, then each other over the frames; a shift
    for each frame. A kind that is `linear_in_x0` leaves the frames apart: attention isn't linear.
    """

    def __init__(self, network: RelationalNetwork, *, rngs: nnx.Rngs):
        self.image = network
        config = network.config
        policy = Precision().policy(rngs)
        mixes = not (config.network.is_zero or config.network.linear_in_x0)
        self.temporal = (
            TemporalAttention(config.width, config.num_heads, **policy) if mixes else None
        )

    @property
    def gain(self) -> Float[Array, ""]:
        """The image network's: the context's root mean square in each frame."""
        return self.image.gain

    def __call__(
        self,
        x0: Float[ArrayLike, "B F H W C"],
        text_tokens: Float[ArrayLike, "B L D"],
        text_mask: Bool[ArrayLike, "B L"],
        t: Real[ArrayLike, "B"] | None = None,
    ) -> Float[Array, "B F H W C"]:
        """r, float32."""
        B, F = x0.shape[:2]
        if self.image.config.network.is_zero:
            return jnp.zeros(x0.shape, jnp.float32)
        text, mask = (of_each_frame(a, F) for a in (text_tokens, text_mask))
        t = None if t is None else of_each_frame(t, F)

        def over_frames(tokens):  # [F*B, N, D]
            return tokens if self.temporal is None else flat(self.temporal(frames_of(tokens, B)))

        return clips_of(self.image(by_frame(x0), text, mask, t, mix=over_frames), B)


# The video form of each kind of backbone: a module `(backbone, rngs=, remat=)` with the backbone's
# `name`, `config` and `context_head`, and `predict` as the two here.
INFLATED = {UNet: VideoUNet, MMDiT: VideoMMDiT}


class VideoDiffusion(nnx.Module):
    """The networks that are tuned on a clip: a backbone's video form under the backbone's name, and
    `context`, for text that is encoded.

    Without `reads_mask` the backbone attends to padding too, as Stable Diffusion's do; the context
    never does. `bound`: of |x0|, 1 for pictures; latents have none.
    """

    def __init__(
        self,
        backbone: VideoUNet | VideoMMDiT,
        context: VideoContext,
        reads_mask: bool = True,
        bound: float | None = None,
    ):
        self.context, self.backbone_name = context, backbone.name
        setattr(self, backbone.name, backbone)
        self.reads_mask, self.bound = reads_mask, bound

    @property
    def backbone(self) -> VideoUNet | VideoMMDiT:
        """The denoising network."""
        return getattr(self, self.backbone_name)

    def predict(
        self,
        x: Float[ArrayLike, "B F H W C"],
        t: Real[ArrayLike, "B"],
        captions: Captions,
        control: AnyControl | None = None,
    ) -> Array | tuple[Array, Array]:
        """The backbone's output for clips, as `ContextDiffusion.predict` for pictures."""
        return self.backbone.predict(
            x, t, captions, captions.mask if self.reads_mask else None, control
        )


def inflate(
    backbone: UNet | MMDiT,
    context: RelationalNetwork,
    *,
    seed: int = 0,
    remat: bool = False,
    reads_mask: bool = True,
    bound: float | None = None,
) -> VideoDiffusion:
    """Video networks that start as the image networks do, frame by frame. The modules that are
    given are used up.
    """
    rngs = nnx.Rngs(make_key(seed))
    video = INFLATED[type(backbone)](backbone, rngs=rngs, remat=remat)
    return VideoDiffusion(video, VideoContext(context, rngs=rngs), reads_mask, bound)
