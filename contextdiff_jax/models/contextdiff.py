"""The whole model: text encoder, UNet, relational network, and how a denoise function is made of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.samplers import DenoiseFn, KeepFn
from contextdiff_jax.models.clip import PIXEL_MEAN, PIXEL_STD, CLIPText, CLIPVision
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork, pool
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.t5 import T5Encoder
from contextdiff_jax.models.text import TextConfig, TextEncoder
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.models.vae import VAE


class Captions(NamedTuple):
    """Encoded captions: token states, which of them count, and the pooled text of an encoder that
    gives one (None: the mean of the tokens that count is read where one is wanted).
    """

    tokens: Float[ArrayLike, "B L D"]
    mask: Bool[ArrayLike, "B L"]
    pooled: Float[Array, "B P"] | None = None


class FrozenText(nnx.Module):
    """A pretrained CLIP text encoder in the place of ours. It reads no mask, unless its config says
    so: Stable Diffusion's networks were trained on the states of all tokens, padding included.
    """

    reads_padding = True

    def __init__(self, clip: CLIPText):
        self.clip = clip

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

    def __init__(self, clip: CLIPText, clip_2: CLIPText):
        self.clip, self.clip_2 = clip, clip_2

    def __call__(
        self, token_ids: Int[ArrayLike, "B 2 L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B P"]]:
        """States of all tokens, and the pooled text. The ids are those of both tokenizers."""
        first, second = self.clip(token_ids[:, 0]), self.clip_2(token_ids[:, 1])
        states = first.hidden_states[-2], second.hidden_states[-2]
        return jnp.concatenate(states, axis=-1), second.projected


class FrozenT5(nnx.Module):
    """A pretrained T5 encoder in the place of ours, as in Imagen: padding is read by nobody."""

    reads_padding = False

    def __init__(self, t5: T5Encoder):
        self.t5 = t5

    def __call__(
        self, token_ids: Int[ArrayLike, "B L"], token_mask: Bool[ArrayLike, "B L"]
    ) -> Float[Array, "B L D"]:
        """States of all tokens."""
        return self.t5(token_ids, token_mask)


class FrozenVision(nnx.Module):
    """The patch tokens of a pretrained CLIP image encoder: the paper's visual tokens of x0."""

    def __init__(self, clip: CLIPVision):
        self.clip = clip

    def __call__(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B N V"]:
        """The tokens of pictures in [-1, 1].

        They are brought to CLIP's size and scale first (bicubic; its own mean and deviation).
        """
        side = self.clip.config.image_size
        pixels = jax.image.resize(pixels, (pixels.shape[0], side, side, 3), "bicubic")
        pixels = (0.5 * jnp.clip(pixels, -1, 1) + 0.5 - jnp.array(PIXEL_MEAN)) / jnp.array(
            PIXEL_STD
        )
        return self.clip(pixels).last[:, 1:]


class Frozen(NamedTuple):
    """The networks that a run reads and doesn't train: a pytree, handed to the compiled step beside
    its state.
    """

    vae: VAE | None = None
    text: FrozenText | FrozenTextPair | FrozenT5 | None = None
    vision: FrozenVision | None = None


class ContextDiffusion(nnx.Module):
    """A text-to-image model with context: `text`, `unet`, `context`.

    `attach` adds the frozen networks: `vae`, without which the data are pixels, a pretrained
    `text`, and the `vision` that `relate` needs for context.tokens='clip'. Stable Diffusion is such
    a model whose context is of the kind `none`.
    """

    def __init__(self, text: TextEncoder | None, unet: UNet, context: RelationalNetwork):
        self.text, self.unet, self.context = text, unet, context
        self.vae, self.vision = None, None

    @classmethod
    def create(
        cls,
        text: TextConfig,
        unet: UNetConfig,
        context: ContextConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ) -> ContextDiffusion:
        """A newly initialised model of these sizes; without a text encoder where it is frozen."""
        policy = dict(rngs=rngs, precision=precision)
        encoder = None if text.pretrained else TextEncoder(text, **policy)
        return cls(encoder, UNet(unet, **policy), RelationalNetwork(context, **policy))

    def attach(self, frozen: Frozen) -> ContextDiffusion:
        """This model, with the frozen networks."""
        for name, network in frozen._asdict().items():
            if network is not None:
                setattr(self, name, nnx.data(network))
        return self

    def encode(self, ids: Int[ArrayLike, "B *E L"], mask: Bool[ArrayLike, "B L"]) -> Captions:
        """Captions of token ids (of each text encoder, where there are two) and of their mask."""
        states = self.text(ids, mask)
        tokens, pooled = states if isinstance(states, tuple) else (states, None)
        return Captions(tokens, mask, pooled)

    def relate(
        self,
        x0: Float[ArrayLike, "B H W C"],
        captions: Captions,
        t: Int[ArrayLike, "B"],
        pixels: Float[ArrayLike, "B H2 W2 3"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """r_phi(x0, c, t). With CLIP's tokens the picture of x0 is needed: `pixels`, or else x0
        decoded, which in the plugin estimate is a pass of the autoencoder's decoder and of CLIP's
        encoder in every sampling step.
        """
        if self.vision is None:
            return self.context(x0, captions.tokens, captions.mask, t)
        if pixels is None:
            pixels = x0 if self.vae is None else self.vae.decode(self.vae.from_diffusion(x0))
        return self.context(x0, captions.tokens, captions.mask, t, self.vision(pixels))

    def predict(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Int[ArrayLike, "B"],
        captions: Captions,
        deep: Float[ArrayLike, "B H2 W2 E"] | None = None,
    ) -> Array | tuple[Array, Array]:
        """The UNet's output (`deep`: its coarser levels' part, from an earlier step)."""
        return self.unet(x, t, *self._conditions(x, captions), deep)

    def deep_features(
        self, x: Float[ArrayLike, "B H W C"], t: Int[ArrayLike, "B"], captions: Captions
    ) -> Float[Array, "B H2 W2 E"]:
        """The UNet's coarser levels' part."""
        return self.unet.deep_features(x, t, *self._conditions(x, captions))

    def to_pixels(self, x0: Float[ArrayLike, "B H W C"], tile: bool = False) -> Array:
        """Pictures, about [-1, 1], of what is diffused."""
        return x0 if self.vae is None else self.vae.decode(self.vae.from_diffusion(x0), tile=tile)

    def from_pixels(self, pixels: Float[ArrayLike, "B H W 3"], tile: bool = False) -> Array:
        """The x0 of pictures in [-1, 1]: these, or their latents' means."""
        if self.vae is None:
            return pixels
        return self.vae.to_diffusion(self.vae.encode(pixels, tile=tile).mean)

    def _conditions(
        self, x: ArrayLike, captions: Captions
    ) -> tuple[ArrayLike, ArrayLike | None, dict[str, ArrayLike] | None]:
        """Tokens, which of them count, and what a UNet of the XL kind also reads: the pooled text
        and the picture's size (SDXL, 2.2).
        """
        seen = None if self.text.reads_padding else captions.mask
        if self.unet.config.addition_embed_type != "text_time":
            return captions.tokens, seen, None
        factor = 1 if self.vae is None or captions.pooled is None else self.vae.config.downscale
        added = text_and_size(captions, factor * x.shape[1], factor * x.shape[2])
        return captions.tokens, seen, added


def text_and_size(captions: Captions, height: int, width: int) -> dict[str, Array]:
    """What a UNet of the XL kind reads beside the tokens: the pooled text, and the picture's size
    without a crop (SDXL, 2.2).
    """
    tokens, mask, pooled = captions
    sizes = jnp.array([height, width, 0, 0, height, width], jnp.float32)
    return {
        "text_embeds": pool(tokens, mask)[:, 0] if pooled is None else pooled,
        "time_ids": jnp.broadcast_to(sizes, (tokens.shape[0], 6)),
    }


def related(caption: str, true: Captions, hide: Callable[[Captions], Captions]) -> Captions:
    """The captions that r reads: the true ones, or with `dropped` (`diffusion.Process.caption`)
    those that the denoiser reads, `hide(true)`.
    """
    return hide(true) if caption == "dropped" else true


def empty_like(captions: Captions, null: Captions) -> Captions:
    """`null`, of one caption, once for each row of `captions`."""
    return jax.tree.map(lambda one, all: jnp.broadcast_to(one, all.shape), null, captions)


class Rows(NamedTuple):
    """The inputs of a batch's rows.

    They are the denoiser's captions, the relational network's, and the channels beside x. With
    guidance a batch holds all branches, side by side (`diffusion.interleave`).
    """

    text: Captions
    related: Captions
    beside: Float[ArrayLike, "B H W E"] | None

    @classmethod
    def of(
        cls,
        texts: Sequence[Captions],
        beside: Float[ArrayLike, "B H W E"] | None = None,
        caption: str = "true",
    ) -> Rows:
        """The rows of a branch for each of `texts`, the first of which is the true captions;
        `caption`: what r reads (`related`).
        """
        true, count = texts[0], len(texts)
        if count == 1:
            return cls(true, true, beside)
        text = jax.tree.map(diffusion.interleave, *texts)
        true, beside = jax.tree.map(lambda a: diffusion.interleave(*[a] * count), (true, beside))
        return cls(text, related(caption, true, lambda true: text), beside)

    def widen(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C2"]:
        """The denoiser's input."""
        return x if self.beside is None else jnp.concatenate([x, self.beside], axis=-1)


def is_guided(guidance: float | Float[Array, ""]) -> bool:
    """Whether guidance needs other branches: a scale of 1 doesn't; a traced one may be any."""
    return isinstance(guidance, jax.Array) or guidance != 1.0


def branch_texts(
    captions: Captions,
    null: Captions | None,
    negative: Captions | None,
    guidance: float | Float[ArrayLike, ""],
    by_weaker: bool,
) -> tuple[Captions, ...]:
    """The text of each branch that runs in one batch; `by_weaker`: a weaker model has the other."""
    if by_weaker or not is_guided(guidance):
        return (captions,)
    return (captions, null) if negative is None else (captions, null, negative)


def make_estimate(
    model: ContextDiffusion, schedule: diffusion.NoiseSchedule, rows: Rows, prediction_type: str
) -> DenoiseFn:
    """The denoise function of rows, without guidance or bounds; `model` carries its estimate of r
    (a context head or not). It takes as a fourth argument what `make_keep`'s gave earlier.
    """
    pixels = model.vae is None

    def estimate(x, t, s, deep=None):
        def predict(x, t):
            return model.predict(rows.widen(x), t, rows.text, deep)

        if model.unet.context_head is not None:
            return diffusion.posterior_mean_denoise(predict, schedule, prediction_type)(x, t, s)
        return diffusion.plugin_denoise(
            predict,
            lambda x0, t: model.relate(x0, rows.related, t),
            schedule,
            prediction_type,
            clip=1.0 if pixels else None,
        )(x, t, s)

    return estimate


def make_denoise(
    model: ContextDiffusion,
    schedule: diffusion.NoiseSchedule,
    captions: Captions,
    null: Captions | None = None,
    *,
    prediction_type: str,
    guidance: float | Float[ArrayLike, ""] = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] = diffusion.ALWAYS,
    negative: Captions | None = None,
    perpendicular: float = 1.0,
    weaker: DenoiseFn | None = None,
    context_scale: float = 1.0,
    dynamic_threshold: float = 0.0,
    beside: Float[ArrayLike, "B H W E"] | None = None,
    caption: str = "true",
) -> DenoiseFn:
    """The reverse process's denoise function for captions, with guidance (`diffusion.guidance`).

    Guidance leads away from `null`; with `negative` also, perpendicularly, from that; or from the
    estimate of a `weaker` model instead. Texts have a row for each caption, and their branches run
    as one batch. r reads the true caption in all, as in the forward process, or with `caption`
    `dropped` what the denoiser reads. x0 is bounded to the pictures' range; latents (a model with a
    `vae`) have none. `beside`: channels that a network made for inpainting reads after x's.
    The function takes as a fourth argument what `make_keep`'s gave in an earlier step.
    """
    by_weaker = weaker is not None
    texts = branch_texts(captions, null, negative, guidance, by_weaker)

    def estimate(*texts):
        return make_estimate(model, schedule, Rows.of(texts, beside, caption), prediction_type)

    def alone(x, t, s, *kept):  # the branch of the captions, with its own part of what was kept
        own = [k[0] if by_weaker else diffusion.separate(k, len(texts))[0] for k in kept]
        return estimate(captions)(x, t, s, *own)

    denoise, scale = estimate(*texts), (guidance, guidance_rescale)
    if is_guided(guidance):
        if by_weaker:
            denoise = diffusion.autoguided(denoise, weaker, *scale)
        elif negative is not None:
            denoise = diffusion.perpendicular_negative(denoise, *scale, weight=perpendicular)
        else:
            denoise = diffusion.classifier_free(denoise, *scale)
        denoise = diffusion.within(denoise, alone, schedule, guidance_interval)
    if context_scale != 1:
        denoise = diffusion.scale_context(denoise, context_scale)
    return diffusion.bounded(denoise, dynamic_threshold) if model.vae is None else denoise


def make_keep(
    model: ContextDiffusion,
    texts: Sequence[Captions],
    beside: Float[ArrayLike, "B H W E"] | None = None,
) -> KeepFn:
    """`keep(x, t)`: the coarser levels' part of the UNet, of a branch for each of `texts`."""
    rows = Rows.of(texts, beside)

    def keep(x, t):
        if len(texts) > 1:
            x, t = (diffusion.interleave(*[a] * len(texts)) for a in (x, t))
        return model.deep_features(rows.widen(x), t, rows.text)

    return keep
