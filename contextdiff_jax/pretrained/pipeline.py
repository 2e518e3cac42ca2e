"""A Stable Diffusion folder (1.x and 2.x: model_index.json and its parts) as a text-to-image function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from contextdiff_jax.diffusion import Denoised, NoiseSchedule, ddim_sample, predict_x0
from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.pretrained.clip import load_clip_text
from contextdiff_jax.pretrained.files import read_json
from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler
from contextdiff_jax.pretrained.unet import load_unet
from contextdiff_jax.pretrained.vae import load_vae

INDEX_FILE = "model_index.json"
CLASSES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


class StableDiffusion(nnx.Module):
    """The three networks, to be handed to a jitted function together."""

    def __init__(self, unet: UNet, vae: VAE, text: CLIPText):
        self.unet = unet
        self.vae = vae
        self.text = text


@functools.partial(nnx.jit, static_argnames=("prediction_type", "guided", "tile"))
def text_to_image(
    model: StableDiffusion,
    schedule: NoiseSchedule,
    timesteps: Int[Array, "S"],
    next_timesteps: Int[Array, "S"],
    token_ids: Int[Array, "B L"],
    negative_ids: Int[Array, "B L"],
    x_T: Float[Array, "B H W Z"],
    guidance: Float[Array, ""],
    *,
    prediction_type: str,
    guided: bool,
    tile: bool = False,
) -> Float[Array, "B H2 W2 3"]:
    """Pictures in [0, 1] of the texts by DDIM from the latent noise x_T: one compiled program.

    Args:
      next_timesteps: where each step goes. guidance: of the output, u + g (c - u), read only if `guided`.
      tile: decodes large pictures in tiles.
    """
    text = model.text(token_ids).last  # [B, L, D]
    if guided:
        text = jnp.concatenate([model.text(negative_ids).last, text])  # [2B, L, D]

    def denoise(x, t, s):
        if not guided:
            output = model.unet(x, t, text)
        else:
            both = model.unet(jnp.concatenate([x, x]), jnp.concatenate([t, t]), text)
            without, with_text = jnp.split(both, 2)
            output = without + guidance * (with_text - without)
        x0 = predict_x0(schedule, output, x, t, prediction_type)
        return Denoised(x0, jnp.zeros_like(x0), jnp.zeros_like(x0))

    latents = ddim_sample(denoise, x_T, schedule, timesteps, shift="none", next_timesteps=next_timesteps)
    images = model.vae.decode(model.vae.from_diffusion(latents), tile=tile)
    return jnp.clip(0.5 * images + 0.5, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The networks, the scheduler, and transformers' tokenizer."""

    model: StableDiffusion
    scheduler: Scheduler
    tokenizer: Any

    def token_ids(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Ids padded (and cut) to the encoder's length."""
        length = min(self.tokenizer.model_max_length, self.model.text.config.max_position_embeddings)
        return np.array(self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True).input_ids)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """[H, W, Z] of pictures of `size` (height, width), by default the UNet's own.

        Raises ValueError for a size that the autoencoder's factor doesn't divide.
        """
        factor = self.model.vae.config.downscale
        channels = self.model.vae.config.latent_channels
        if size is None:
            side = self.model.unet.config.sample_size
            if side is None:
                raise ValueError("size: missing; the UNet's config has no sample_size")
            return (*(side if isinstance(side, tuple) else (side, side)), channels)
        if any(side < factor or side % factor for side in size):
            raise ValueError(f"size={size}: height and width must be multiples of {factor}")
        return size[0] // factor, size[1] // factor, channels

    def __call__(
        self, prompts: Sequence[str], *, negative: str | Sequence[str] = "", steps: int = 50, guidance: float = 7.5,
        size: tuple[int, int] | None = None, seed: int = 0, latents: Float[Array, "B H W Z"] | None = None,
        tile: bool = False,
    ) -> UInt8[np.ndarray, "B H2 W2 3"]:
        """One picture a prompt.

        Args:
          negative: what guidance leads away from, one text for all or one a prompt.
          guidance: 1 or less is none. size: height and width.
          latents: the noise to start from, instead of a draw by `seed`.
        """
        negative = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if not prompts or len(negative) != len(prompts):
            raise ValueError(f"prompts: {len(prompts)}, negative: {len(negative)}; at least one, and one for each")
        if latents is None:
            latents = jax.random.normal(jax.random.key(seed), (len(prompts), *self.latent_shape(size)))
        timesteps, following = self.scheduler.steps(steps)
        images = text_to_image(
            self.model, self.scheduler.schedule(), timesteps, following, self.token_ids(prompts),
            self.token_ids(negative), jnp.asarray(latents, jnp.float32), jnp.float32(guidance),
            prediction_type=self.scheduler.prediction, guided=guidance > 1, tile=tile,
        )
        return np.asarray(jnp.round(255 * images)).astype(np.uint8)


def load_pipeline(folder: str | Path, **options) -> Pipeline:
    """A Stable Diffusion 1.x or 2.x folder, as diffusers wrote it or converted.

    `options` of all three networks: see `contextdiff_jax.pretrained.model.Options`. The tokenizer is transformers',
    which is imported here and nowhere else.

    Raises ValueError, one line, for a folder of another pipeline, a part that is missing, damaged or doesn't fit.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    name = read_json(path, "a diffusers pipeline folder").get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{path}: _class_name={name!r}: another pipeline; one of {', '.join(CLASSES)}")
    scheduler = load_scheduler(folder / "scheduler")
    unet = load_unet(folder / "unet", **options)
    vae = load_vae(folder / "vae", **options)
    text = load_clip_text(folder / "text_encoder", **options)
    _check_fit(folder, unet, vae, text)
    return Pipeline(model=StableDiffusion(unet, vae, text), scheduler=scheduler, tokenizer=_tokenizer(folder))


def _check_fit(folder: Path, unet: UNet, vae: VAE, text: CLIPText) -> None:
    channels, width = vae.config.latent_channels, text.config.hidden_size
    if (unet.config.in_channels, unet.config.out_channels) != (channels, channels):
        raise ValueError(
            f"{folder}: the UNet has {unet.config.in_channels} channels in and {unet.config.out_channels} out, the "
            f"autoencoder's latents have {channels}: not a text-to-image network"
        )
    if any(level.text_features != width for level in unet.config.levels()):
        raise ValueError(f"{folder}: the UNet's cross_attention_dim differs from the text encoder's width, {width}")
    if unet.config.addition_embed_type is not None or unet.config.context_head:
        raise ValueError(f"{folder}: a UNet with added conditions or a context head is not sampled here")


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer").is_dir():
        raise ValueError(f"{folder / 'tokenizer'}: no such folder")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder / "tokenizer")
