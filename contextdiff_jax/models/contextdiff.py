"""The whole model: text encoder, UNet, relational network, and how a denoise function is made of
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from contextdiff_jax import diffusion
from contextdiff_jax.diffusion.samplers import Denoised, DenoiseFn
from contextdiff_jax.models.clip import PIXEL_MEAN, PIXEL_STD, CLIPText, CLIPVision
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork, pool
from contextdiff_jax.models.t5 import T5Encoder
from contextdiff_jax.models.text import TextConfig, TextEncoder
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.models.vae import VAE


class FrozenText(nnx.Module):
    """A pretrained CLIP text encoder in the place of ours. It reads no mask, unless its config says
    so: Stable Diffusion's networks were trained on the states of all tokens, padding included.
    """

    def __init__(self, clip: CLIPText):
        self.clip = clip

    def __call__(
        self, token_ids: Int[Array, "B L"], token_mask: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """States of all tokens."""
        mask = token_mask if self.clip.config.use_attention_mask else None
        return self.clip(token_ids, mask).last


class FrozenT5(nnx.Module):
    """A pretrained T5 encoder in the place of ours, as in Imagen: padding is read by nobody."""

    def __init__(self, t5: T5Encoder):
        self.t5 = t5

    def __call__(
        self, token_ids: Int[Array, "B L"], token_mask: Bool[Array, "B L"]
    ) -> Float[Array, "B L D"]:
        """States of all tokens."""
        return self.t5(token_ids, token_mask)


class FrozenVision(nnx.Module):
    """The patch tokens of a pretrained CLIP image encoder: the paper's visual tokens of x0."""

    def __init__(self, clip: CLIPVision):
        self.clip = clip

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B N V"]:
        """Of pictures in [-1, 1], brought to CLIP's size and scale (bicubic; its own mean and
        deviation).
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
    text: FrozenText | FrozenT5 | None = None
    vision: FrozenVision | None = None


class ContextDiffusion(nnx.Module):
    """Parameters of a text-to-image model with context: `text`, `unet`, `context`.

    `attach` adds the frozen networks: `vae`, without which the data are pixels, a pretrained
    `text`, and the `vision` that `relate` needs for context.tokens='clip'.
    """

    def __init__(
        self,
        text: TextConfig,
        unet: UNetConfig,
        context: ContextConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ):
        self.text = None if text.pretrained else TextEncoder(text, rngs=rngs, dtype=dtype)
        self.unet = UNet(unet, rngs=rngs, dtype=dtype)
        self.context = RelationalNetwork(context, rngs=rngs, dtype=dtype)
        self.vae, self.vision = None, None

    def attach(self, frozen: Frozen) -> ContextDiffusion:
        """This model, with the frozen networks."""
        for name, network in frozen._asdict().items():
            if network is not None:
                setattr(self, name, nnx.data(network))
        return self

    def encode(
        self,
        ids: Int[Array, "B L"],
        mask: Bool[Array, "B L"],
        null_ids: Int[Array, "1 L"],
        null_mask: Bool[Array, "1 L"],
    ) -> tuple[
        Float[Array, "B L D"], Bool[Array, "B L"], Float[Array, "B L D"], Bool[Array, "B L"]
    ]:
        """Tokens and mask of captions, and of the empty caption for each of them: what
        `make_denoise` reads.
        """
        tokens, null_tokens = self.text(ids, mask), self.text(null_ids, null_mask)
        return (
            tokens,
            mask,
            jnp.broadcast_to(null_tokens, tokens.shape),
            jnp.broadcast_to(null_mask, mask.shape),
        )

    def relate(
        self,
        x0: Float[Array, "B H W C"],
        tokens: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        t: Int[Array, B],
        pixels: Float[Array, "B H2 W2 3"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """r_phi(x0, c, t). With CLIP's tokens the picture of x0 is needed: `pixels`, or else x0
        decoded, which in the plugin estimate is a pass of the autoencoder's decoder and of CLIP's
        encoder in every sampling step.
        """
        if self.vision is None:
            return self.context(x0, tokens, mask, t)
        if pixels is None:
            pixels = x0 if self.vae is None else self.vae.decode(self.vae.from_diffusion(x0))
        return self.context(x0, tokens, mask, t, self.vision(pixels))

    def predict(
        self,
        x: Float[Array, "B H W C"],
        t: Int[Array, B],
        tokens: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        deep: Float[Array, "B H W E"] | None = None,
    ) -> Array | tuple[Array, Array]:
        """The UNet's output (`deep`: its coarser levels' part, from an earlier step)."""
        return self.unet(x, t, *self._conditions(x, tokens, mask), deep)

    def deep_features(
        self,
        x: Float[Array, "B H W C"],
        t: Int[Array, B],
        tokens: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B H W E"]:
        """The UNet's coarser levels' part."""
        return self.unet.deep_features(x, t, *self._conditions(x, tokens, mask))

    def _conditions(
        self, x: Array, tokens: Array, mask: Array
    ) -> tuple[Array, Array | None, dict[str, Array] | None]:
        """Tokens, which of them count, and what a UNet of the XL kind also reads: the pooled text
        and the picture's size (SDXL, 2.2).
        """
        seen = None if isinstance(self.text, FrozenText) else mask
        if self.unet.config.addition_embed_type != "text_time":
            return tokens, seen, None
        B, H, W, _ = x.shape
        time_ids = jnp.broadcast_to(jnp.array([H, W, 0, 0, H, W], jnp.float32), (B, 6))
        return tokens, seen, {"text_embeds": pool(tokens, mask)[:, 0], "time_ids": time_ids}


def make_denoise(
    model: ContextDiffusion,
    schedule: diffusion.NoiseSchedule,
    tokens: Float[Array, "B L D"],
    mask: Bool[Array, "B L"],
    null_tokens: Float[Array, "B L D"],
    null_mask: Bool[Array, "B L"],
    *,
    prediction_type: str,
    guidance: float = 1.0,
    guidance_rescale: float = 0.0,
    dynamic_threshold: float = 0.0,
) -> DenoiseFn:
    """The reverse process's denoise function for captions; `model` carries its estimate (a context
    head or not).

    With guidance other than 1 both branches run as one batch of 2 B. r always reads the true
    caption, as in the forward process: only the denoiser's text is dropped. x0 is bounded to the
    pictures' range [-1, 1], by clipping, or by dynamic thresholding at that percentile; latents (a
    model with a `vae`) have no such range. The function takes as a fourth argument what
    `make_keep`'s gave in an earlier step.
    """
    guided = guidance != 1.0
    text = diffusion.pair(tokens, null_tokens) if guided else tokens  # [2B, L, D]
    text_mask = diffusion.pair(mask, null_mask) if guided else mask
    r_tokens, r_mask = (diffusion.pair(a, a) if guided else a for a in (tokens, mask))

    def context_fn(x0, t):
        return model.relate(x0, r_tokens, r_mask, t)

    def branches(x, t, s, deep):
        def predict(x, t):
            return model.predict(x, t, text, text_mask, deep)

        if model.unet.context_head is not None:
            return diffusion.posterior_mean_denoise(predict, schedule, prediction_type)(x, t, s)
        clip = 1.0 if model.vae is None else None
        return diffusion.plugin_denoise(predict, context_fn, schedule, prediction_type, clip=clip)(
            x, t, s
        )

    def bound(x0):
        if model.vae is not None:
            return x0
        return (
            diffusion.dynamic_threshold(x0, dynamic_threshold)
            if dynamic_threshold
            else jnp.clip(x0, -1, 1)
        )

    def denoise(x, t, s, deep=None):
        if not guided:
            out = branches(x, t, s, deep)
            return out._replace(x0=bound(out.x0))
        both = branches(*(diffusion.pair(a, a) for a in (x, t, s)), deep)
        conditional, unconditional = (
            Denoised(*part) for part in zip(*map(diffusion.unpair, both), strict=True)
        )
        out = diffusion.guide(conditional, unconditional, guidance, guidance_rescale)
        return out._replace(x0=bound(out.x0))

    return denoise


def make_keep(
    model: ContextDiffusion,
    tokens: Float[Array, "B L D"],
    mask: Bool[Array, "B L"],
    null_tokens: Float[Array, "B L D"],
    null_mask: Bool[Array, "B L"],
    guidance: float,
) -> Callable[[Array, Array], Array]:
    """`keep(x, t)`: the coarser levels' part of the UNet, of all branches that `make_denoise` makes
    for this guidance.
    """
    if guidance == 1.0:
        return lambda x, t: model.deep_features(x, t, tokens, mask)
    text, text_mask = diffusion.pair(tokens, null_tokens), diffusion.pair(mask, null_mask)
    return lambda x, t: model.deep_features(
        diffusion.pair(x, x), diffusion.pair(t, t), text, text_mask
    )


def make_sampler(
    schedule: diffusion.NoiseSchedule,
    *,
    prediction_type: str,
    shift: str,
    sampler: str,
    steps: int,
    eta: float,
    spacing: str,
    guidance: float,
    guidance_rescale: float = 0.0,
    dynamic_threshold: float = 0.0,
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
    reuse: int = 1,
) -> Callable:
    """`sample(model, x_T, key, token_ids, token_mask, null_ids, null_mask) -> pictures [B, H, W,
    C]`, to be jitted: the text is encoded once, the loop is one scan. Null ids are those of the
    empty caption, [1, L]. `steps_offset` and `set_alpha_to_one` are those of diffusers' schedulers:
    timesteps moved up, and an end at index 0 instead of clean data (DDIM only). `reuse`: the UNet's
    coarser levels are computed in every so many steps (DeepCache).
    """
    timesteps = diffusion.spaced_timesteps(schedule.num_timesteps, steps, spacing) + steps_offset
    if timesteps[0] >= schedule.num_timesteps:
        raise ValueError(
            f"sample.steps_offset={steps_offset}: the first of {steps} steps is {timesteps[0]}; must be below "
            f"{schedule.num_timesteps}"
        )
    run, options = diffusion.get_sampler(sampler), {}
    if not set_alpha_to_one and sampler == "ddim":
        options["next_timesteps"] = jnp.append(timesteps[1:], 0)

    def sample(
        model: ContextDiffusion,
        x_T: Float[Array, "B H W C"],
        key: Array,
        token_ids: Int[Array, "B L"],
        token_mask: Bool[Array, "B L"],
        null_ids: Int[Array, "1 L"],
        null_mask: Bool[Array, "1 L"],
    ) -> Float[Array, "B H W C"]:
        texts = model.encode(token_ids, token_mask, null_ids, null_mask)
        keep = None if reuse == 1 else diffusion.Reuse(reuse, make_keep(model, *texts, guidance))
        denoise = make_denoise(
            model,
            schedule,
            *texts,
            prediction_type=prediction_type,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            dynamic_threshold=dynamic_threshold,
        )
        if (
            model.context.config.kind == "text"
        ):  # r(c) is known before x0 is, so x_T ~ N(k_T r, I) can be exact
            t = jnp.full(x_T.shape[:1], timesteps[0])
            r = model.context(x_T, *texts[:2], t)
            x_T = x_T + diffusion.marginal_mean(schedule, jnp.zeros_like(x_T), r, t, shift)
        x0 = run(denoise, x_T, schedule, timesteps, eta, key, shift, reuse=keep, **options)
        return x0 if model.vae is None else model.vae.decode(model.vae.from_diffusion(x0))

    return sample
