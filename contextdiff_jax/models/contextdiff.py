"""The whole model: text encoder, UNet, relational network. `denoising` makes use of it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from contextdiff_jax.models.backbones import Backbone, BackboneConfig, build_backbone
from contextdiff_jax.models.captions import Captions, encode
from contextdiff_jax.models.clip import PIXEL_MEAN, PIXEL_STD, CLIPVision
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork
from contextdiff_jax.models.frozen_text import AnyFrozenText
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.text import TextConfig, TextEncoder
from contextdiff_jax.models.tiling import blended
from contextdiff_jax.models.vae import VAE


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


class Teacher(nnx.Module):
    """A trained model that another one learns from, and what its network predicts."""

    def __init__(self, model: ContextDiffusion, prediction_type: str):
        self.model, self.prediction_type = model, prediction_type


class Frozen(NamedTuple):
    """The networks that a run reads and doesn't train: a pytree, handed to the compiled step beside
    its state.
    """

    vae: VAE | None = None
    text: AnyFrozenText | None = None
    vision: FrozenVision | None = None
    teacher: Teacher | None = None


class ContextDiffusion(nnx.Module):
    """A text-to-image model with context: `text`, a backbone under its name (`unet` or
    `transformer`), `context`.

    `attach` adds the frozen networks: `vae`, without which the data are pixels, a pretrained
    `text`, and the `vision` that `relate` needs for context.tokens='clip'. Stable Diffusion is such
    a model whose context is of the kind `none`.
    """

    def __init__(self, text: TextEncoder | None, backbone: Backbone, context: RelationalNetwork):
        self.text, self.context = text, context
        self.backbone_name = backbone.name
        setattr(self, backbone.name, backbone)
        self.vae, self.vision, self.teacher = None, None, None

    @property
    def backbone(self) -> Backbone:
        """The denoising network."""
        return getattr(self, self.backbone_name)

    @classmethod
    def create(
        cls,
        text: TextConfig,
        backbone: BackboneConfig,
        context: ContextConfig,
        *,
        rngs: nnx.Rngs,
        precision: Precision = Precision(),
    ) -> ContextDiffusion:
        """A newly initialised model of these sizes; without a text encoder where it is frozen."""
        policy = dict(rngs=rngs, precision=precision)
        encoder = None if text.pretrained else TextEncoder(text, **policy)
        return cls(
            encoder, build_backbone(backbone, **policy), RelationalNetwork(context, **policy)
        )

    def attach(self, frozen: Frozen) -> ContextDiffusion:
        """This model, with the frozen networks."""
        for name, network in frozen._asdict().items():
            if network is not None:
                setattr(self, name, nnx.data(network))
        return self

    def encode(self, ids: Int[ArrayLike, "B *E L"], mask: Bool[ArrayLike, "B L"]) -> Captions:
        """Captions of token ids (of each text encoder, where there are several) and their mask."""
        return encode(self.text, ids, mask)

    def encode_empty(self, ids: Int[ArrayLike, "B *E L"], mask: Bool[ArrayLike, "B L"]) -> Captions:
        """What the denoiser reads in the place of a caption: the empty one, which these ids are of,
        or zeros where the text encoders say so.
        """
        empty = self.encode(ids, mask)
        return empty.hidden() if self.text.zeros_for_empty else empty

    def relate(
        self,
        x0: Float[ArrayLike, "B H W C"],
        captions: Captions,
        t: Real[ArrayLike, "B"],
        pixels: Float[ArrayLike, "B H2 W2 3"] | None = None,
        noise: Float[ArrayLike, "B H W C"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """r_phi(x0, c, t), t as networks read it (`schedule.network_time`); `noise`: of x_t, for a
        kind that reads it. With CLIP's tokens the picture of x0 is needed: `pixels`, or else x0
        decoded, which in the plugin estimate is a pass of the autoencoder's decoder and of CLIP's
        encoder in every sampling step.
        """
        if self.vision is None:
            low = self._low(captions)
            return self.context(x0, captions.tokens, captions.mask, t, noise=noise, low=low)
        if pixels is None:
            pixels = x0 if self.vae is None else self.vae.decode(self.vae.from_diffusion(x0))
        tokens = self.vision(pixels)
        return self.context(x0, captions.tokens, captions.mask, t, tokens, noise=noise)

    def predict(
        self,
        x: Float[ArrayLike, "B H W C"],
        t: Real[ArrayLike, "B"],
        captions: Captions,
        deep: Float[ArrayLike, "B H2 W2 E"] | None = None,
        piece: int = 0,
    ) -> Array | tuple[Array, Array]:
        """The backbone's output, of x and t as networks read them (`schedule.network_input`);
        `deep`: its coarser levels' part, from an earlier step; `piece`: the side of tiles that it
        sees one after another (`tiling.blended`), 0: all of x.
        """
        kept = () if deep is None else (deep,)
        x = self._beside_low(x, captions)

        def see(x):
            return self.backbone.predict(x, t, captions, *self._seen(x, captions), *kept)

        return blended(see, x, piece, self.backbone.config.granularity) if piece else see(x)

    def deep_features(
        self, x: Float[ArrayLike, "B H W C"], t: Real[ArrayLike, "B"], captions: Captions
    ) -> Float[Array, "B H2 W2 E"]:
        """The coarser levels' part of a backbone that `keeps_coarse`."""
        x = self._beside_low(x, captions)
        return self.backbone.deep_features(x, t, captions, *self._seen(x, captions))

    def to_pixels(self, x0: Float[ArrayLike, "B H W C"], tile: bool = False) -> Array:
        """Pictures, about [-1, 1], of what is diffused."""
        return x0 if self.vae is None else self.vae.decode(self.vae.from_diffusion(x0), tile=tile)

    def from_pixels(self, pixels: Float[ArrayLike, "B H W 3"], tile: bool = False) -> Array:
        """The x0 of pictures in [-1, 1]: these, or their latents' means."""
        if self.vae is None:
            return pixels
        return self.vae.to_diffusion(self.vae.encode(pixels, tile=tile).mean)

    def _low(self, captions: Captions) -> Float[ArrayLike, "B H W C"] | None:
        """An upsampler's low-resolution picture, enlarged. ValueError where an upsampler has none,
        or another network has one.
        """
        if self.backbone.config.low_resolution != (captions.low is not None):
            raise ValueError(
                "super_resolution: an upsampler reads a low-resolution picture, other networks "
                "read none"
            )
        return None if captions.low is None else captions.low.picture

    def _beside_low(self, x: ArrayLike, captions: Captions) -> Array:
        """x, and after its channels those of an upsampler's low-resolution picture."""
        low = self._low(captions)
        return x if low is None else jnp.concatenate([x, low], axis=-1)

    def _seen(
        self, x: ArrayLike, captions: Captions
    ) -> tuple[Bool[ArrayLike, "B L"] | None, tuple[int, int]]:
        """Which tokens the backbone reads (None: all), and the picture's size in pixels."""
        seen = None if self.text.reads_padding else captions.mask
        factor = 1 if self.vae is None or captions.pooled is None else self.vae.config.downscale
        return seen, (factor * x.shape[1], factor * x.shape[2])
