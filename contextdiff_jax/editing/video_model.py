"""An edit's model, wherever from: video networks, a process, and ways in and out of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree, UInt8

from contextdiff_jax.data import AnyTokenizer
from contextdiff_jax.data.folder_tokenizer import warn_of_cut
from contextdiff_jax.diffusion.process import MOTIONS, Process
from contextdiff_jax.diffusion.schedule import NoiseSchedule
from contextdiff_jax.editing.settings import EditSettings
from contextdiff_jax.models.backbones import Backbone
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.denoising import estimates_context
from contextdiff_jax.models.frozen_text import FrozenText
from contextdiff_jax.models.pixels import to_uint8, to_unit
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.models.video import VideoDiffusion, inflate
from contextdiff_jax.pretrained.pipeline import StableDiffusion, read_pipeline
from contextdiff_jax.pretrained.pipeline_folder import is_pipeline
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.model import build_model, make_model, model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.runtime.hub import find
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings import Settings, ShiftConfig
from contextdiff_jax.settings.process import check_process

Clip = UInt8[np.ndarray, "F H W 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Editor:
    """A model for clips.

    Attributes:
      model: the inflated networks. process: what they were trained on.
      encode_text: prompts -> states. count_tokens: of a word. text_length: of the encoder, in
          tokens.
      encode, decode: frames <-> what is diffused, [1, F, H, W, C].
      multiple: height and width of a clip must be multiples of it.
      source: a digest of what was read from `video.model`, weights and configs.
    """

    model: VideoDiffusion
    process: Process
    encode_text: Callable[[Sequence[str]], Captions]
    count_tokens: Callable[[str], int]
    text_length: int
    encode: Callable[[Clip], Float[Array, "1 F H W C"]]
    decode: Callable[[Float[Array, "1 F H W C"]], Clip]
    multiple: int
    source: str

    def check_size(self, clip: Clip) -> None:
        """Raises ValueError unless the networks take the clip's height and width."""
        height, width = clip.shape[1:3]
        if height % self.multiple or width % self.multiple:
            nearest = tuple(
                max(self.multiple, round(side / self.multiple) * self.multiple)
                for side in (height, width)
            )
            raise ValueError(
                f"video.size: the frames are {height} x {width}; height and width must be "
                f"multiples of {self.multiple}, as with --config.video.size={nearest}"
            )


def digest(tree: PyTree, *about: Any) -> str:
    """A digest of the arrays' values, in order, wherever they lie, and of `about`'s `repr`."""
    total = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        total.update(f"{leaf.dtype}{leaf.shape}".encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def open_editor(settings: EditSettings) -> Editor:
    """The editor of `video.model`. ValueError for a folder that is neither a run nor a Stable
    Diffusion folder.
    """
    name, base = settings.video.model, settings.base
    if not name:
        tokenizer = open_tokenizer(base)
        frozen = load_frozen(base)
        return _from_model(
            settings, base, make_model(base).attach(frozen), tokenizer, digest(frozen)
        )
    folder = find(name)
    if is_pipeline(folder):
        return _from_pipeline(settings, folder)
    try:
        run = load_run(folder, settings.video.weights)
    except ValueError as error:
        raise ValueError(
            f"video.model={name}: neither a Stable Diffusion folder nor a trained run ({error})"
        ) from None
    frozen = load_frozen(run.settings)
    # as its folder has it: a field that this version adds to configs is no other model
    sections = {name: run.config[name] for name in ("model", "diffusion", "context", "text")}
    source = digest((run.params, frozen), json.dumps(sections, sort_keys=True))
    model = build_model(model_graph(run.settings), run.params, frozen)
    return _from_model(settings, run.settings, model, run.tokenizer, source)


def _context(
    settings: EditSettings, trained: RelationalNetwork | None, channels: int, text_width: int
) -> RelationalNetwork:
    """The trained network, or a new one of the config's kind that fits the model."""
    if trained is not None and settings.video.transfer_context:
        return trained
    config = dataclasses.replace(settings.base.context, in_channels=channels, text_width=text_width)
    names = {field.name for field in dataclasses.fields(ContextConfig)}
    config = ContextConfig(**{name: getattr(config, name) for name in names})
    return RelationalNetwork(config, rngs=nnx.Rngs(make_key(settings.base.seed)))


def _multiple(config: ContextConfig) -> int:
    return 1 if config.network.is_zero else config.patch_size


def _from_model(
    settings: EditSettings,
    trained: Settings,
    model: ContextDiffusion,
    tokenizer: AnyTokenizer,
    source: str,
) -> Editor:
    """The editor of a model of pictures or latents that this package trained, or will.

    Raises ValueError for a context that its process has no use for, or that clips haven't.
    """
    process = trained.process
    length = trained.data.max_length
    if model.vision is not None and settings.video.transfer_context:
        raise ValueError(
            f"video.model={settings.video.model}: its context reads CLIP's tokens of pictures "
            "(context.tokens='clip'), which clips have not; use "
            "--config.video.transfer_context=False"
        )
    network = _context(settings, model.context, trained.model.in_channels, trained.model.text_width)
    if network.config.network.reads_noise:
        raise ValueError(
            f"context.kind={network.config.kind!r}: shapes the noise, and a clip's is that of its "
            "inversion; use --config.video.transfer_context=False and another kind"
        )
    if process.prediction_type in MOTIONS:
        used = _used(settings.base.context, network.config)
        check_process(
            trained.diffusion, dataclasses.replace(used, estimate=trained.context.estimate)
        )
    encode_ids = nnx.jit(lambda text, ids, mask: text(ids, mask))

    def encode_text(prompts: Sequence[str]) -> Captions:
        ids, mask, lost = tokenizer.encode_and_cut(list(prompts), length)
        warn_of_cut(prompts, lost, length)
        return Captions(encode_ids(model.text, ids, mask), jnp.asarray(mask))

    return _make_editor(
        settings,
        model.backbone,
        network,
        model.vae,
        schedule=process.schedule,
        prediction_type=process.prediction_type,
        caption=(trained if settings.video.transfer_context else settings.base).context.caption,
        reads_mask=not model.text.reads_padding,
        encode_text=encode_text,
        count_tokens=lambda word: int(tokenizer.encode([word], 64)[1].sum()) - 2,
        text_length=length,
        source=source,
    )


def _make_editor(
    settings: EditSettings,
    backbone: Backbone,
    network: RelationalNetwork,
    vae: VAE | None,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    caption: str,
    reads_mask: bool,
    **facts: Any,
) -> Editor:
    """The editor of these networks, which are used up; `facts`: the other fields of `Editor`."""
    encode, decode, factor = (_to_pixels, _from_pixels, 1) if vae is None else _through_vae(vae)
    head = backbone.context_head is not None
    return Editor(
        model=inflate(
            backbone,
            network,
            seed=settings.base.seed,
            remat=settings.video.remat,
            reads_mask=reads_mask,
            bound=1.0 if vae is None else None,
        ),
        process=Process(
            schedule=schedule,
            prediction_type=prediction_type,
            shift=_used(settings.base.context, network.config).shift,
            caption=caption,
            estimates_context=estimates_context(network.config, head, prediction_type),
        ),
        encode=encode,
        decode=decode,
        multiple=factor * math.lcm(_multiple(network.config), backbone.config.patch_size),
        **facts,
    )


def _to_pixels(clip: Clip) -> Float[Array, "1 F H W 3"]:
    return to_unit(jnp.asarray(clip))[None]


def _from_pixels(x: Float[Array, "1 F H W 3"]) -> Clip:
    return np.asarray(to_uint8(x[0]))


def _through_vae(vae: VAE) -> tuple[Callable, Callable, int]:
    """(encode, decode, factor) by way of latents, each frame's mean. One frame after another: a
    clip's activations at full resolution would not fit.
    """
    encode_frame = nnx.jit(lambda vae, x: vae.to_diffusion(vae.encode(x).mean))
    decode_frame = nnx.jit(lambda vae, z: vae.decode(vae.from_diffusion(z)))

    def encode(clip: Clip) -> Float[Array, "1 F H W C"]:
        return jnp.stack([encode_frame(vae, frame[None])[0] for frame in _to_pixels(clip)[0]])[None]

    def decode(x: Float[Array, "1 F H W C"]) -> Clip:
        return _from_pixels(jnp.stack([decode_frame(vae, frame[None])[0] for frame in x[0]])[None])

    return encode, decode, vae.config.downscale


def _used(config: ShiftConfig, network: ContextConfig) -> ShiftConfig:
    """The section with another network; raises where that may not be shifted as it says."""
    return dataclasses.replace(config, kind=network.kind, time_dependent=network.time_dependent)


def _from_pipeline(settings: EditSettings, folder: str) -> Editor:
    """The editor of a Stable Diffusion folder, with a new context."""
    stable = read_pipeline(folder)
    if not isinstance(stable, StableDiffusion) or len(stable.texts) > 1:
        kind = "XL" if isinstance(stable, StableDiffusion) else "Stable Diffusion 3"
        raise ValueError(
            f"video.model={folder}: is {kind}; Stable Diffusion 1.x and 2.x can be edited with"
        )
    parts = stable.unet, stable.vae, stable.text
    source = digest(parts, stable.scheduler, *(part.config for part in parts))
    channels, width = stable.vae.config.latent_channels, stable.text.config.hidden_size
    if stable.unet.config.in_channels != channels:
        raise ValueError(
            f"video.model={folder}: is for inpainting; a text-to-image folder is wanted"
        )
    network = _context(settings, None, channels, width)
    tokenizer, text = stable.tokenizers[0], FrozenText(stable.text)
    encode_ids = nnx.jit(lambda text, ids, mask: text(ids, mask))

    def count_tokens(word: str) -> int:
        return len(tokenizer(word, add_special_tokens=False).input_ids)

    def encode_text(prompts: Sequence[str]) -> Captions:
        ids, mask, lost = stable.encode_text(prompts)
        warn_of_cut(prompts, lost, ids.shape[1])
        lengths = [2 + sum(map(count_tokens, prompt.split())) for prompt in prompts]
        read = jnp.arange(ids.shape[1]) < jnp.array(lengths)[:, None]
        return Captions(encode_ids(text, ids, mask), read)

    return _make_editor(
        settings,
        stable.unet,
        network,
        stable.vae,
        schedule=stable.scheduler.schedule(),
        prediction_type=stable.scheduler.prediction,
        caption=settings.base.context.caption,
        reads_mask=False,
        encode_text=encode_text,
        count_tokens=count_tokens,
        text_length=stable.encode_text([""])[0].shape[1],
        source=source,
    )
