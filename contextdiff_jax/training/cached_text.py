"""Training from cached text: captions' states come with a batch, and no text encoder is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Num, PyTree

from contextdiff_jax.data import CacheSource, make_source
from contextdiff_jax.data.latent_shards import Cache, read_texts
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.contextdiff import ContextDiffusion, Frozen
from contextdiff_jax.models.frozen_text import KnownTexts
from contextdiff_jax.runs.frozen import load_frozen, text_key
from contextdiff_jax.settings import Settings

SHOWN = 16  # captions that a run shows samples of, where no prompts are named


def captions_of(model: ContextDiffusion, batch: dict[str, Num[jax.Array, "B ..."]]) -> Captions:
    """A batch's captions: of its cached states, or encoded by the model."""
    if "text_states" not in batch:
        return model.encode(batch["token_ids"], batch["token_mask"])
    return _cached(batch, model.backbone.precision.compute)


def _cached(arrays: Mapping[str, Num[ArrayLike, "B ..."]], dtype: DTypeLike) -> Captions:
    """The captions of `latent_shards.STATES`."""
    pooled = arrays.get("pooled_text")
    return Captions(
        jnp.asarray(arrays["text_states"], dtype),
        jnp.asarray(arrays["text_mask"]),
        None if pooled is None else jnp.asarray(pooled, dtype),
    )


def check_cache(settings: Settings, cache: Cache) -> None:
    """Raises ValueError for a cache of another autoencoder, or of another text encoder."""
    path, vae = settings.data.path, settings.latent.config
    if vae is None and cache.vae:
        raise ValueError(
            f"data.source={settings.data.source!r}: holds latents; latent.vae (or "
            "model.pretrained) must name their autoencoder"
        )
    if cache.vae != json.loads(json.dumps(vae.to_dict() if vae else {})):
        raise ValueError(
            f"latent.vae={settings.latent.vae!r}: the cache in data.path={path!r} is another "
            "autoencoder's"
        )
    if cache.text is None:
        return
    encoder = settings.text.pretrained
    if not encoder or text_key(encoder) != cache.text["key"]:
        raise ValueError(
            f"text.pretrained={encoder!r}: the cache in data.path={path!r} holds the states of "
            "another text encoder"
        )


def frozen_for_training(
    settings: Settings, shardings: Callable[[PyTree], PyTree] | None = None
) -> Frozen:
    """`runs.frozen.load_frozen`, in the place of a text encoder whose states are cached only what
    it gives of the empty caption and of the prompts that the run shows.

    Raises ValueError for prompts that the cache has no states of.
    """
    text = None
    if settings.data.kind.is_cache:
        source = make_source(settings.data, "train")
        if isinstance(source, CacheSource) and source.cache.text is not None:
            text = known_texts(settings, source)
    if text is not None and shardings is not None:
        graph, arrays = nnx.split(text)
        text = nnx.merge(graph, jax.device_put(arrays, shardings(jax.eval_shape(lambda: arrays))))
    return load_frozen(settings, shardings, text)


def known_texts(settings: Settings, source: CacheSource) -> KnownTexts:
    """The cached states of the empty caption, and of a run's prompts."""
    texts, arrays, facts = read_texts(source.path)
    rows: list[dict[str, Any]] = [
        {name: array[i] for name, array in arrays.items()} for i in range(len(texts))
    ]
    prompts = settings.sample.prompts
    if settings.train.sample_every and not prompts:
        rows += [source[i] for i in range(min(SHOWN, len(source)))]
    unknown = [prompt for prompt in prompts if prompt not in texts]
    if settings.train.sample_every and unknown:
        raise ValueError(
            f"sample.prompts: the cache in data.path={settings.data.path!r} has no states of "
            f"{unknown[0]!r}; cache_latents with these prompts adds them, or train.sample_every=0"
        )
    stacked = {name: np.stack([row[name] for row in rows]) for name in arrays}
    captions = _cached(stacked, jnp.dtype(settings.train.precision))
    return KnownTexts(stacked["token_ids"], captions, **facts)
