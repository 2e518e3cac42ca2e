"""A Stable Diffusion folder (1.x, 2.x, XL; model_index.json and its parts): text to image, image to
image, inpainting.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, UInt8

from contextdiff_jax.diffusion import q_sample
from contextdiff_jax.keys import check_seed, make_key
from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.parallel.mesh import local_mesh, replicated
from contextdiff_jax.pretrained.clip import load_clip_text
from contextdiff_jax.pretrained.files import exists, read_json, tokenizer_folder
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.sampling import (
    Known,
    StableDiffusion,
    Tokens,
    encode_images,
    sample_images,
)
from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler
from contextdiff_jax.pretrained.unet import load_unet
from contextdiff_jax.pretrained.vae import MODEL as VAE_MODEL
from contextdiff_jax.pretrained.vae import load_vae
from contextdiff_jax.tokens import check_ids, cut_text, read_folder, warn_of_cut

INDEX_FILE = "model_index.json"
CLASSES = tuple(
    f"StableDiffusion{kind}{way}Pipeline"
    for kind in ("", "XL")
    for way in ("", "Img2Img", "Inpaint")
)
Latents = Float[Array, "B H W Z"]
Pictures = UInt8[np.ndarray, "B H W 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What every way to sample reads.

    Attributes:
      prompts: one picture each.
      negative: what guidance leads away from, one text for all or one a prompt; None: the empty
          text, or what the folder has in its place (`Pipeline.zeros_for_empty`).
      guidance: its scale; 1 or less is none.
      seed: draws the noise, unless `noise` gives it; 0..2^64 - 1.
      tile: large pictures go through the autoencoder in tiles.
      reuse: steps that share the UNet's coarser levels; must divide their number.
    """

    prompts: Sequence[str]
    negative: str | Sequence[str] | None = None
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    noise: Latents | None = None
    tile: bool = False
    reuse: int = 1

    def __post_init__(self):
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError(f"prompts={self.prompts!r}: must be a list of at least one text")
        check_seed(self.seed)
        if isinstance(self.negative, str) or self.negative is None:
            return
        if len(self.negative) != len(self.prompts):
            count = len(self.prompts)
            raise ValueError(
                f"negative: {len(self.negative)} texts; must be one, or as many as prompts, {count}"
            )

    @property
    def negatives(self) -> list[str]:
        """One a prompt."""
        if isinstance(self.negative, str) or self.negative is None:
            return [self.negative or ""] * len(self.prompts)
        return list(self.negative)

    def draw(self, shape: tuple[int, int, int]) -> Latents:
        """The noise [B, *shape]. Raises ValueError if the one that is given has another shape."""
        shape = (len(self.prompts), *shape)
        if self.noise is None:
            return jax.random.normal(make_key(self.seed), shape)
        if tuple(self.noise.shape) != shape:
            raise ValueError(f"noise: shape {tuple(self.noise.shape)}; must be {shape}")
        return jnp.asarray(self.noise, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The networks, the scheduler, and transformers' tokenizers, one a text encoder. The options of
    all three ways: `Request`. `zeros_for_empty`: without a negative text guidance leads away from
    zeros (XL), not from the empty text; an explicit "" is the empty text.
    """

    model: StableDiffusion
    scheduler: Scheduler
    tokenizers: tuple[Any, ...]
    zeros_for_empty: bool = False

    def text_to_image(
        self, prompts: Sequence[str], *, size: tuple[int, int] | None = None, **options
    ) -> Pictures:
        """Pictures of `size` (height, width), by default the UNet's own, from noise."""
        request = Request(prompts=prompts, **options)
        x, texts = request.draw(self.latent_shape(size)), self._texts(request)
        return self._sample(request, texts, x, self.scheduler.steps(request.steps))

    def image_to_image(
        self, prompts: Sequence[str], images: Pictures, *, strength: float = 0.8, **options
    ) -> Pictures:
        """Pictures from `images`, one a prompt, noised to where the last `strength` of the steps
        begins.
        """
        request = Request(prompts=prompts, **options)
        texts = self._texts(request)
        latents = self._encode(images, request)
        timesteps, following = self._last_steps(request.steps, strength)
        noised = self._noised(latents, request.draw(latents.shape[1:]), timesteps[0])
        return self._sample(request, texts, noised, (timesteps, following))

    def inpaint(
        self,
        prompts: Sequence[str],
        images: Pictures,
        masks: Float[np.ndarray, "B H W"],
        *,
        strength: float = 1.0,
        **options,
    ) -> Pictures:
        """`images` painted anew where `masks` are at least 0.5. At strength 1 the hole begins as
        noise.

        A network made for inpainting reads the mask and the rest of the picture; for another the
        rest is put back, noised, after each step.
        """
        request = Request(prompts=prompts, **options)
        if tuple(masks.shape) != tuple(images.shape[:3]):
            raise ValueError(
                f"masks: shape {tuple(masks.shape)}; must be the images', {tuple(images.shape[:3])}"
            )
        texts = self._texts(request)
        hole = (np.asarray(masks) >= 0.5)[..., None]
        latents = self._encode(images, request)
        noise = request.draw(latents.shape[1:])
        masked = self._encode(images, request, hole)
        factor = self.model.vae.config.downscale
        known = Known(latents, noise, jnp.asarray(hole[:, ::factor, ::factor], jnp.float32), masked)
        timesteps, following = self._last_steps(request.steps, strength)
        x = noise if strength == 1 else self._noised(latents, noise, timesteps[0])
        return self._sample(request, texts, x, (timesteps, following), known)

    def token_ids(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "B L"], ...]:
        """Ids for each text encoder, padded (and cut) to its length."""
        return tuple(np.array(rows.input_ids) for rows, _ in self._tokenized(texts))

    def tokens(self, texts: Sequence[str]) -> tuple[Tokens, ...]:
        """What each text encoder reads; a warning says which words are cut off.

        Raises ValueError for a token that an encoder's embedding has no row for.
        """
        texts, made, cut = list(texts), [], False
        for i, (rows, encoder) in enumerate(self._tokenized(texts)):
            ids, config, where = np.array(rows.input_ids), encoder.config, f"tokenizer{'_2' * i}"
            check_ids(ids, texts, self.tokenizers[i], config.vocab_size, where)
            lost = list(map(cut_text, texts, rows.encodings))
            if any(lost) and not cut:  # XL's two cut alike
                warn_of_cut(texts, lost, ids.shape[1])
                cut = True
            # As in diffusers: XL's encoders read their padding whatever their config says.
            masked = config.use_attention_mask and self.model.text_2 is None
            made.append(Tokens(ids, np.array(rows.attention_mask, bool) if masked else None))
        return tuple(made)

    def _tokenized(self, texts: Sequence[str]) -> Iterator[tuple[Any, CLIPText]]:
        """(transformers' encodings, the encoder) of each text encoder."""
        for tokenizer, encoder in zip(self.tokenizers, (self.model.text, self.model.text_2)):
            length = int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))
            options = dict(padding="max_length", max_length=length, truncation=True)
            yield tokenizer(list(texts), **options), encoder

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """[H, W, Z] of pictures of `size`, by default the UNet's own.

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
            raise ValueError(f"size={tuple(size)}: height and width must be multiples of {factor}")
        return size[0] // factor, size[1] // factor, channels

    def _texts(self, request: Request) -> tuple[tuple[Tokens, ...], tuple[Tokens, ...] | None]:
        """The tokens of the prompts and of what guidance leads away from; None: zeros."""
        leads_from_zeros = self.zeros_for_empty and request.negative is None
        negative = None if leads_from_zeros else self.tokens(request.negatives)
        return self.tokens(request.prompts), negative

    def _encode(
        self, images: Pictures, request: Request, hole: np.ndarray | bool = False
    ) -> Latents:
        if len(images) != len(request.prompts):
            raise ValueError(
                f"images: {len(images)}; one for each of the {len(request.prompts)} prompts"
            )
        self.latent_shape(images.shape[1:3])  # refuses a size that doesn't fit
        pixels = np.where(hole, 0.0, np.asarray(images, np.float32) / 127.5 - 1).astype(np.float32)
        return encode_images(self.model.vae, pixels, tile=request.tile)

    def _last_steps(self, steps: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
        count = min(int(steps * strength), steps)
        if not 0 < strength <= 1 or count < 1:
            raise ValueError(
                f"strength={strength}: must lie in (0, 1] and leave at least one of {steps} steps"
            )
        timesteps, following = self.scheduler.steps(steps)
        return timesteps[-count:], following[-count:]

    def _noised(self, latents: Latents, noise: Latents, t: int) -> Latents:
        return q_sample(
            self.scheduler.schedule(), latents, jnp.zeros_like(latents), t, noise, shift="none"
        )

    def _sample(
        self,
        request: Request,
        texts: tuple[tuple[Tokens, ...], tuple[Tokens, ...] | None],
        x: Latents,
        steps: tuple[np.ndarray, np.ndarray],
        known: Known | None = None,
    ) -> Pictures:
        if known is None and self.model.unet.config.in_channels != x.shape[-1]:
            channels = self.model.unet.config.in_channels
            raise ValueError(f"the UNet has {channels} channels in: it is only for inpainting")
        model, (tokens, negative, x, known) = spread(self.model, (*texts, x, known))
        images = sample_images(
            model,
            self.scheduler.schedule(),
            *steps,
            tokens,
            negative,
            x,
            jnp.float32(request.guidance),
            known,
            prediction_type=self.scheduler.prediction,
            guided=request.guidance > 1,
            tile=request.tile,
            reuse=request.reuse,
        )
        return np.asarray(jnp.round(255 * images)).astype(np.uint8)[: len(request.prompts)]


def spread(model: StableDiffusion, batch: PyTree) -> tuple[StableDiffusion, PyTree]:
    """The model on every device of this process and the batch's rows split over them, filled up
    with copies of the last one where they don't divide. With one device, as they are.
    """
    mesh = local_mesh()
    if mesh.size == 1:
        return model, batch

    def filled(rows):
        lack = -len(rows) % mesh.size
        return jnp.concatenate([rows, jnp.repeat(rows[-1:], lack, axis=0)])

    rows = jax.device_put(jax.tree.map(filled, batch), NamedSharding(mesh, PartitionSpec("data")))
    return jax.device_put(model, replicated(mesh)), rows


def load_pipeline(folder: str | Path, **options) -> Pipeline:
    """A Stable Diffusion 1.x, 2.x or XL folder, as diffusers wrote it or converted, or a single
    .safetensors file with the tokenizer's folder beside it.

    What diffusers' pipelines put right in old configs is put right here: the scheduler's
    `steps_offset` and `clip_sample`, the UNet's `sample_size`, the autoencoder's type
    (`force_upcast`).

    `options` of all three networks: see `contextdiff_jax.pretrained.model.Options`.

    Raises ValueError, one line, for a folder of another pipeline, a part that is missing, damaged
    or doesn't fit.
    """
    folder = Path(folder)
    path = folder / INDEX_FILE
    index = read_json(path, "a diffusers pipeline folder")
    name = index.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{path}: _class_name={name!r}: another pipeline; one of {', '.join(CLASSES)}"
        )
    scheduler = load_scheduler(folder / "scheduler", pipeline=name)
    is_xl = "XL" in name
    names = ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",)
    if index.get("requires_aesthetics_score") or (is_xl and not exists(folder / names[0])):
        raise ValueError(
            f"{path}: XL's refiner is not supported; its base, with two text encoders, is"
        )
    words = (folder / part.replace("text_encoder", "tokenizer") for part in names)
    tokenizers = tuple(read_folder(tokenizer_folder(part), "clip") for part in words)
    unet, of_vae = load_unet(folder / "unet", **options), dict(options)
    if not is_xl:
        unet.config = _corrected(unet.config, folder / "unet")
    elif jnp.dtype(options.get("dtype", jnp.float32)) == jnp.float16:
        # XL's autoencoder overflows in float16: black pictures.
        if read_config(VAE_MODEL, folder / "vae").force_upcast:
            of_vae["dtype"] = jnp.float32
    vae = load_vae(folder / "vae", **of_vae)
    texts = [load_clip_text(folder / part, **options) for part in names]
    _check_fit(folder, unet, vae, texts)
    return Pipeline(
        model=StableDiffusion(unet, vae, *texts),
        scheduler=scheduler,
        tokenizers=tokenizers,
        zeros_for_empty=is_xl and index.get("force_zeros_for_empty_prompt", True),
    )


def _check_fit(folder: Path, unet: UNet, vae: VAE, texts: Sequence[CLIPText]) -> None:
    channels, width = vae.config.latent_channels, sum(text.config.hidden_size for text in texts)
    if (
        unet.config.in_channels not in (channels, 2 * channels + 1)
        or unet.config.out_channels != channels
    ):
        raise ValueError(
            f"{folder}: the UNet has {unet.config.in_channels} channels in and {unet.config.out_channels} out; must be "
            f"{channels} (or {2 * channels + 1}, for inpainting) and {channels}, as the autoencoder's latents have"
        )
    if any(level.text_features != width for level in unet.config.levels()):
        raise ValueError(
            f"{folder}: the UNet's cross_attention_dim differs from the text encoders' width, {width}"
        )
    if unet.config.context_head or (unet.config.addition_embed_type is not None) != (
        len(texts) == 2
    ):
        raise ValueError(
            f"{folder}: the UNet's addition_embed_type={unet.config.addition_embed_type!r} doesn't fit {len(texts)} text "
            "encoders, or it has a context head: not sampled here"
        )
    if len(texts) == 2:
        read = (
            unet.config.projection_class_embeddings_input_dim
            - 6 * unet.config.addition_time_embed_dim
        )
        pooled = texts[1].config.projection_dim if texts[1].config.with_projection else 0
        if read != pooled:
            raise ValueError(
                f"{folder}: the UNet reads a pooled text {read} wide; text_encoder_2 gives {pooled}"
            )


def _corrected(config: UNetConfig, folder: Path) -> UNetConfig:
    """With latents of 64, if diffusers before 0.9 wrote it: it stored its default of 32 whatever the
    network had been trained on.
    """
    values = read_json(folder / "config.json", "a UNet's folder")
    numbers = re.findall(r"\d+", str(values.get("_diffusers_version", "")))[:2]
    is_old = bool(numbers) and tuple(map(int, numbers)) < (0, 9)
    if is_old and isinstance(config.sample_size, int) and config.sample_size < 64:
        return dataclasses.replace(config, sample_size=64)
    return config
