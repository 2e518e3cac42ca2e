"""What an edit works with, whatever the model came from: video networks, a process, and ways in and out of them."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from contextdiff_jax.data import Tokenizer, load_tokenizer
from contextdiff_jax.editing.denoise import Process, Text
from contextdiff_jax.editing.settings import EditSettings
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.video import VideoDiffusion, inflate
from contextdiff_jax.pretrained.pipeline import INDEX_FILE, load_pipeline
from contextdiff_jax.pretrained.sampling import encode_images
from contextdiff_jax.run import load_run
from contextdiff_jax.settings import Settings, ShiftConfig
from contextdiff_jax.training.state import make_model, model_graph

LOGGER = logging.getLogger(__name__)
Clip = UInt8[np.ndarray, "F H W 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Editor:
    """A model for clips.

    Attributes:
      model: the inflated networks. process: what they were trained on.
      encode_text: prompts -> states. count_tokens: of a word. text_length: of the encoder, in tokens.
      encode, decode: frames <-> what is diffused, [1, F, H, W, C].
      multiple: height and width of a clip must be multiples of it.
    """

    model: VideoDiffusion
    process: Process
    encode_text: Callable[[Sequence[str]], Text]
    count_tokens: Callable[[str], int]
    text_length: int
    encode: Callable[[Clip], Float[Array, "1 F H W C"]]
    decode: Callable[[Float[Array, "1 F H W C"]], Clip]
    multiple: int

    def check_size(self, clip: Clip) -> None:
        """Raises ValueError unless the networks take the clip's height and width."""
        height, width = clip.shape[1:3]
        if height % self.multiple or width % self.multiple:
            nearest = tuple(max(self.multiple, round(side / self.multiple) * self.multiple) for side in (height, width))
            raise ValueError(
                f"video.size: the frames are {height} x {width}; height and width must be multiples of "
                f"{self.multiple}, as with --config.video.size={nearest}".replace(" ", " ")
            )


def open_editor(settings: EditSettings) -> Editor:
    """The editor of `video.model`. ValueError for a folder that is neither a run nor a Stable Diffusion folder."""
    name = settings.video.model
    if not name:
        return _from_image_model(settings, settings.base, make_model(settings.base), load_tokenizer(
            settings.base.data.tokenizer or None))
    if (pathlib.Path(name) / INDEX_FILE).is_file():
        return _from_pipeline(settings, name)
    try:
        run = load_run(name, settings.video.weights)
    except ValueError as error:
        raise ValueError(f"video.model={name}: neither a Stable Diffusion folder nor a trained run ({error})") from None
    return _from_image_model(settings, run.settings, nnx.merge(model_graph(run.settings), run.params), run.tokenizer)


def _context(settings: EditSettings, trained: RelationalNetwork | None, channels: int, text_width: int) -> RelationalNetwork:
    """The trained network, or a new one of the config's kind that fits the model."""
    if trained is not None and settings.video.transfer_context:
        return trained
    config = dataclasses.replace(settings.base.context, in_channels=channels, text_width=text_width)
    names = {field.name for field in dataclasses.fields(ContextConfig)}
    config = ContextConfig(**{name: getattr(config, name) for name in names})
    return RelationalNetwork(config, rngs=nnx.Rngs(settings.base.seed))


def _multiple(config: ContextConfig) -> int:
    return 1 if config.kind == "none" else config.patch_size


def _from_image_model(
    settings: EditSettings, trained: Settings, model: ContextDiffusion, tokenizer: Tokenizer
) -> Editor:
    """The editor of a model of pictures with the embedded text encoder."""
    length, channels = trained.data.max_length, trained.model.in_channels
    if channels != 3:
        raise ValueError(f"video.model={settings.video.model}: denoises {channels} channels; pictures have 3")
    network = _context(settings, model.context, channels, trained.text.width)
    process = Process(
        schedule=trained.diffusion.make_schedule(), prediction_type=trained.diffusion.prediction_type,
        shift=_shift(settings.base.context, network.config), bound=1.0,
    )
    encode = jax.jit(lambda state, ids, mask: nnx.merge(text_graph, state)(ids, mask))
    text_graph, text_state = nnx.split(model.text)

    def encode_text(prompts: Sequence[str]) -> Text:
        ids, mask = tokenizer.encode(list(prompts), length)
        return Text(encode(text_state, ids, mask), jnp.asarray(mask))

    return Editor(
        model=inflate(model.unet, network, seed=settings.base.seed, remat=settings.video.remat), process=process,
        encode_text=encode_text,
        count_tokens=lambda word: int(tokenizer.encode([word], 64)[1].sum()) - 2, text_length=length,
        encode=lambda clip: jnp.asarray(clip, jnp.float32)[None] / 127.5 - 1,
        decode=lambda x: np.asarray(jnp.round((jnp.clip(x[0], -1, 1) + 1) * 127.5)).astype(np.uint8),
        multiple=_multiple(network.config),
    )


def _shift(config: ShiftConfig, network: ContextConfig) -> str:
    """`context.shift`, once it is known that the network may be shifted by it."""
    dataclasses.replace(config, kind=network.kind, time_dependent=network.time_dependent)
    return config.shift


def _from_pipeline(settings: EditSettings, folder: str) -> Editor:
    """The editor of a Stable Diffusion folder: clips are diffused as latents, each frame's mean."""
    pipeline = load_pipeline(folder)
    stable = pipeline.model
    channels, width = stable.vae.config.latent_channels, stable.text.config.hidden_size
    if stable.unet.config.in_channels != channels:
        raise ValueError(f"video.model={folder}: is for inpainting; a text-to-image folder is wanted")
    network = _context(settings, None, channels, width)
    process = Process(
        schedule=pipeline.scheduler.schedule(), prediction_type=pipeline.scheduler.prediction,
        shift=_shift(settings.base.context, network.config), bound=None,
    )
    tokenizer, encode_ids = pipeline.tokenizer, nnx.jit(lambda text, ids: text(ids).last)
    decode_frame = nnx.jit(lambda vae, z: vae.decode(vae.from_diffusion(z)))

    def encode(clip: Clip) -> Float[Array, "1 F H W C"]:
        pixels = np.asarray(clip, np.float32) / 127.5 - 1
        # One frame after another: a clip's activations at full resolution would not fit.
        return jnp.stack([encode_images(stable.vae, frame[None])[0] for frame in pixels])[None]

    def decode(x: Float[Array, "1 F H W C"]) -> Clip:
        frames = np.stack([np.asarray(decode_frame(stable.vae, frame[None])[0]) for frame in x[0]])
        return np.round(255 * np.clip(0.5 * frames + 0.5, 0, 1)).astype(np.uint8)

    return Editor(
        model=inflate(stable.unet, network, seed=settings.base.seed, remat=settings.video.remat), process=process,
        encode_text=lambda prompts: Text(encode_ids(stable.text, pipeline.token_ids(prompts)), None),
        count_tokens=lambda word: len(tokenizer(word, add_special_tokens=False).input_ids),
        text_length=pipeline.token_ids([""]).shape[1], encode=encode, decode=decode,
        multiple=stable.vae.config.downscale * _multiple(network.config),
    )
