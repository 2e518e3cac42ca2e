"""Latent diffusion from texts, from pictures and into holes of pictures, as pure functions to be jitted."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from contextdiff_jax.diffusion import Denoised, NoiseSchedule, ddim_sample, predict_x0, q_sample
from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.vae import VAE


class StableDiffusion(nnx.Module):
    """The three networks, to be handed to a jitted function together."""

    def __init__(self, unet: UNet, vae: VAE, text: CLIPText):
        self.unet = unet
        self.vae = vae
        self.text = text


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


@functools.partial(nnx.jit, static_argnames=("tile",))
def encode_images(vae: VAE, images: Float[Array, "B H W 3"], *, tile: bool = False) -> Float[Array, "B H2 W2 Z"]:
    """The diffusion model's latents (their mean) of pictures in [-1, 1]."""
    return vae.to_diffusion(vae.encode(images, tile=tile).mean)


@functools.partial(nnx.jit, static_argnames=("prediction_type", "guided", "tile"))
def sample_images(
    model: StableDiffusion,
    schedule: NoiseSchedule,
    timesteps: Int[Array, "S"],
    next_timesteps: Int[Array, "S"],
    token_ids: Int[Array, "B L"],
    negative_ids: Int[Array, "B L"],
    x: Float[Array, "B H W Z"],
    guidance: Float[Array, ""],
    known: Known | None = None,
    *,
    prediction_type: str,
    guided: bool,
    tile: bool = False,
) -> Float[Array, "B H2 W2 3"]:
    """Pictures in [0, 1] of the texts by DDIM from the latents x at timesteps[0]: one compiled program.

    Args:
      next_timesteps: where each step goes. guidance: of the output, u + g (c - u), read only if `guided`.
      known: inpainting. tile: decodes large pictures in tiles.
    """
    text = model.text(token_ids).last  # [B, L, D]
    if guided:
        text = jnp.concatenate([model.text(negative_ids).last, text])  # [2B, L, D]
    reads_known = known is not None and model.unet.config.in_channels != x.shape[-1]

    def denoise(x, t, s):
        h = jnp.concatenate([x, known.mask, known.masked], axis=-1) if reads_known else x  # [B, H, W, Z or 2 Z + 1]
        if guided:
            without, with_text = jnp.split(model.unet(jnp.concatenate([h, h]), jnp.concatenate([t, t]), text), 2)
            output = without + guidance * (with_text - without)
        else:
            output = model.unet(h, t, text)
        x0 = predict_x0(schedule, output, x, t, prediction_type)
        return Denoised(x0, jnp.zeros_like(x0), jnp.zeros_like(x0))

    def keep_known(x, t):
        noised = q_sample(schedule, known.latents, jnp.zeros_like(x), t, known.noise, shift="none")
        return known.mask * x + (1 - known.mask) * noised

    project = keep_known if known is not None and not reads_known else None
    latents = ddim_sample(
        denoise, x, schedule, timesteps, shift="none", next_timesteps=next_timesteps, project=project
    )
    images = model.vae.decode(model.vae.from_diffusion(latents), tile=tile)
    return jnp.clip(0.5 * images + 0.5, 0.0, 1.0)
