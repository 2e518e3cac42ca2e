"""Latent diffusion from texts, from pictures and into holes of pictures, as pure functions to be
jitted.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from contextdiff_jax.diffusion import (
    Denoised,
    NoiseSchedule,
    Reuse,
    ddim_sample,
    pair,
    predict_x0,
    q_sample,
    unpair,
)
from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.vae import VAE


class Tokens(NamedTuple):
    """Texts as one encoder reads them.

    Attributes:
      ids: padded. mask: of those that aren't padding; None: the encoder reads its padding, as Stable
          Diffusion's do.
    """

    ids: Int[Array, "B L"]
    mask: Bool[Array, "B L"] | None = None


class Conditions(NamedTuple):
    """What the UNet reads of texts: token states [B, L, D] and, of XL, what is added to its time
    embedding.
    """

    tokens: Float[Array, "B L D"]
    added: dict[str, Array] | None


class StableDiffusion(nnx.Module):
    """The networks, to be handed to a jitted function together. `text_2` is XL's second text
    encoder (bigG).
    """

    def __init__(self, unet: UNet, vae: VAE, text: CLIPText, text_2: CLIPText | None = None):
        self.unet = unet
        self.vae = vae
        self.text = text
        self.text_2 = text_2

    def encode(self, tokens: tuple[Tokens, ...], size: tuple[int, int]) -> Conditions:
        """Of texts, by each encoder's tokens. XL reads the penultimate layers of both, the second's
        pooled projection, and the picture's `size` in pixels (Podell et al., 2023, 2.2).
        """
        if self.text_2 is None:
            return Conditions(self.text(*tokens[0]).last, None)
        first, second = self.text(*tokens[0]), self.text_2(*tokens[1])
        states = jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1)
        time_ids = jnp.broadcast_to(jnp.array([*size, 0, 0, *size], jnp.float32), (len(states), 6))
        return Conditions(states, {"text_embeds": second.projected, "time_ids": time_ids})


class Known(NamedTuple):
    """What an inpainted picture keeps.

    Attributes:
      latents: of the picture. noise: with which they are noised to each step's level.
      mask: 1 where the picture is to be painted anew.
      masked: latents of the picture with its hole grey, which networks made for inpainting read.
    """

    latents: Float[Array, "B H W Z"]
    noise: Float[Array, "B H W Z"]
    mask: Float[Array, "B H W 1"]
    masked: Float[Array, "B H W Z"]


def _nothing(text: Conditions) -> Conditions:
    added = text.added and text.added | {"text_embeds": jnp.zeros_like(text.added["text_embeds"])}
    return Conditions(jnp.zeros_like(text.tokens), added)


@functools.partial(nnx.jit, static_argnames=("tile",))
def encode_images(
    vae: VAE, images: Float[Array, "B H W 3"], *, tile: bool = False
) -> Float[Array, "B H2 W2 Z"]:
    """The diffusion model's latents (their mean) of pictures in [-1, 1]."""
    return vae.to_diffusion(vae.encode(images, tile=tile).mean)


@functools.partial(nnx.jit, static_argnames=("prediction_type", "guided", "tile", "reuse"))
def sample_images(
    model: StableDiffusion,
    schedule: NoiseSchedule,
    timesteps: Int[Array, S],
    next_timesteps: Int[Array, S],
    tokens: tuple[Tokens, ...],
    negative: tuple[Tokens, ...] | None,
    x: Float[Array, "B H W Z"],
    guidance: Float[Array, ""],
    known: Known | None = None,
    *,
    prediction_type: str,
    guided: bool,
    tile: bool = False,
    reuse: int = 1,
) -> Float[Array, "B H2 W2 3"]:
    """Pictures in [0, 1] of the texts by DDIM from the latents x at timesteps[0]: one compiled
    program.

    Args:
      tokens: of each text encoder. negative: those that guidance leads away from; None: zeros are in
          the place of their states, as XL was trained.
      next_timesteps: where each step goes. guidance: of the output, u + g (c - u), read only if
          `guided`.
      known: inpainting. tile: decodes large pictures in tiles. reuse: the UNet's coarser levels are
        computed in every so many steps (DeepCache).
    """
    size = tuple(model.vae.config.downscale * side for side in x.shape[1:3])
    text = model.encode(tokens, size)
    if guided:
        without = _nothing(text) if negative is None else model.encode(negative, size)
        text = jax.tree.map(pair, without, text)  # [2B, ...]
    reads_known = known is not None and model.unet.config.in_channels != x.shape[-1]

    def inputs(x, t):
        """What the UNet reads: of both branches, where there is guidance."""
        h = (
            jnp.concatenate([x, known.mask, known.masked], axis=-1) if reads_known else x
        )  # [B, H, W, Z or 2 Z + 1]
        return (pair(h, h), pair(t, t), text.tokens) if guided else (h, t, text.tokens)

    def keep(x, t):
        return model.unet.deep_features(*inputs(x, t), added=text.added)

    def denoise(x, t, s, deep=None):
        output = model.unet(*inputs(x, t), added=text.added, deep=deep)
        if guided:
            without, with_text = unpair(output)
            output = without + guidance * (with_text - without)
        x0 = predict_x0(schedule, output, x, t, prediction_type)
        return Denoised(x0, jnp.zeros_like(x0), jnp.zeros_like(x0))

    def keep_known(x, t):
        noised = q_sample(schedule, known.latents, jnp.zeros_like(x), t, known.noise, shift="none")
        return known.mask * x + (1 - known.mask) * noised

    project = keep_known if known is not None and not reads_known else None
    latents = ddim_sample(
        denoise,
        x,
        schedule,
        timesteps,
        shift="none",
        next_timesteps=next_timesteps,
        project=project,
        reuse=None if reuse == 1 else Reuse(reuse, keep),
    )
    images = model.vae.decode(model.vae.from_diffusion(latents), tile=tile)
    return jnp.clip(0.5 * images + 0.5, 0.0, 1.0)
