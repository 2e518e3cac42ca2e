"""A cache of a frozen autoencoder's latents, and of a frozen text encoder's states: from a run's
settings to `data.latent_shards`.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from contextdiff_jax.data import AnyTokenizer, RandomAccessSource, make_source
from contextdiff_jax.data.folder_tokenizer import CutCaptions
from contextdiff_jax.data.identity import content_key, identity
from contextdiff_jax.data.latent_shards import (
    Cache,
    claim_cache,
    encode_record,
    write_shard,
    write_texts,
)
from contextdiff_jax.models.frozen_text import AnyFrozenText, encoded
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.parallel.processes import agree
from contextdiff_jax.pretrained import load_vae
from contextdiff_jax.runs.frozen import load_text, text_key
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.settings import Settings

LOGGER = logging.getLogger(__name__)


def write_cache(
    settings: Settings,
    out: pathlib.Path,
    *,
    split: str = "train",
    shard_size: int = 1024,
    batch_size: int = 16,
    dtype: str = "float16",
    text_dtype: str = "",
) -> tuple[Cache, int]:
    """Writes the shards that aren't there, this process's share of them; (the cache, how many it
    wrote). `text_dtype`: with the captions' states in it, of `text.pretrained`.

    Without an autoencoder the records are pictures, if they have states.

    Raises ValueError for settings with neither an autoencoder nor states to keep, for states
    without a frozen text encoder, and for a folder with another cache.
    """
    if not settings.latent.vae and not text_dtype:
        raise ValueError(
            "latent.vae='': a cache needs the autoencoder's folder, or model.pretrained"
        )
    if text_dtype and not settings.text.pretrained:
        raise ValueError(
            f"--text_dtype={text_dtype}: keeps a frozen encoder's states; this config trains its "
            "own (text.pretrained='')"
        )
    tokenizer, data, of_text = open_tokenizer(settings), settings.data, None
    if text_dtype:
        of_text = {"key": text_key(settings.text.pretrained), "dtype": text_dtype}
    source = agree("data", lambda: make_source(data, split), identity)
    cache = Cache(
        num_records=len(source),
        shard_size=shard_size,
        shape=settings.shape,
        dtype=dtype if settings.latent.vae else "uint8",
        image_size=data.image_size,
        max_length=data.max_length,
        tokenizer=data.tokenizer,
        vae=settings.latent.config.to_dict() if settings.latent.vae else {},
        source={**dataclasses.asdict(data), "split": split},
        content=content_key(source),
        text=of_text,
    )
    claim_cache(out, cache)
    encoders = Encoders.of(settings, tokenizer, dtype, text_dtype)
    if text_dtype and jax.process_index() == 0:
        encoders.write_texts(out, ["", *settings.sample.prompts], data.max_length)
    mine = range(jax.process_index(), cache.num_shards, jax.process_count())
    cut = CutCaptions(data.max_length)
    missing = [number for number in mine if not (out / cache.shard(number)).exists()]
    for number in tqdm(
        missing, initial=len(mine) - len(missing), total=len(mine), unit="shard", disable=None
    ):
        records = encoders.records(source, cache.rows(number), data.max_length, batch_size, cut)
        write_shard(out / cache.shard(number), records)
    if cut.count:
        LOGGER.warning("%d captions are cut at %d tokens", cut.count, data.max_length)
    return cache, len(missing)


@dataclasses.dataclass(frozen=True)
class Encoders:
    """What makes a cache's records. `dtype`: of the moments, if there is a `vae`; `text_dtype`: of
    the states, if there is a `text`.
    """

    vae: VAE | None
    tokenizer: AnyTokenizer
    dtype: str
    text: AnyFrozenText | None = None
    text_dtype: str = ""

    @classmethod
    def of(
        cls, settings: Settings, tokenizer: AnyTokenizer, dtype: str, text_dtype: str
    ) -> Encoders:
        """Those that the settings name; a text encoder if there is a `text_dtype`."""
        precision = jnp.dtype(settings.train.precision)
        vae = load_vae(settings.latent.vae, dtype=precision) if settings.latent.vae else None
        text = load_text(settings, dtype=precision) if text_dtype else None
        return cls(vae, tokenizer, dtype, text, text_dtype)

    def records(
        self,
        source: RandomAccessSource,
        rows: Sequence[int],
        max_length: int,
        batch_size: int,
        cut: CutCaptions,
    ) -> Iterator[bytes]:
        """The records of those rows of the source, in order, encoded `batch_size` at a time; `cut`
        counts the captions that are too long.
        """
        for start in range(0, len(rows), batch_size):
            part = [source[i] for i in rows[start : start + batch_size]]
            images = np.stack([record["image"] for record in part])
            pictures = self.pictures(images, batch_size)
            captions = [record["caption"] for record in part]
            ids, mask, lost = self.tokenizer.encode_and_cut(captions, max_length)
            cut.add(captions, lost)
            states = self.states(ids, mask, batch_size)
            for row, caption in enumerate(captions):
                sizes = part[row].get("sizes")
                picture, own = (
                    {name: array[row] for name, array in arrays.items()}
                    for arrays in (pictures, states)
                )
                yield encode_record(picture, ids[row], mask[row], caption, sizes, own)

    def pictures(
        self, images: UInt8[np.ndarray, "B H W 3"], batch_size: int
    ) -> dict[str, np.ndarray]:
        """What is kept of up to `batch_size` pictures: their latents' moments, or themselves."""
        if self.vae is None:
            return {"image": images}
        # One shape, one compilation.
        padding = [(0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)]
        found = zip(("mean", "std"), moments(self.vae, np.pad(images, padding)), strict=True)
        return {name: np.asarray(value).astype(self.dtype) for name, value in found}

    def states(self, ids: np.ndarray, mask: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """`STATES` of up to `batch_size` texts; none without a text encoder.

        Raises ValueError for states that `text_dtype` doesn't hold.
        """
        if self.text is None:
            return {}
        count = len(mask)
        ids, mask = (
            np.concatenate([a, np.repeat(a[:1], batch_size - len(a), axis=0)]) for a in (ids, mask)
        )
        captions = encoded(self.text, jnp.asarray(ids), jnp.asarray(mask))
        found = {
            "text_states": np.asarray(captions.tokens.astype(jnp.float32)).astype(self.text_dtype),
            "text_mask": np.asarray(captions.mask),
        }
        if captions.pooled is not None:
            pooled = np.asarray(captions.pooled.astype(jnp.float32))
            found["pooled_text"] = pooled.astype(self.text_dtype)
        for name in found.keys() - {"text_mask"}:
            if not np.isfinite(found[name]).all():
                raise ValueError(
                    f"--text_dtype={self.text_dtype}: {name} aren't finite in it; float32 holds "
                    "what the encoder gives"
                )
        return {name: array[:count] for name, array in found.items()}

    def write_texts(self, out: pathlib.Path, texts: Sequence[str], max_length: int) -> None:
        """Writes the states of texts that aren't records', and what networks ask of the encoder."""
        ids, mask = self.tokenizer.encode(list(texts), max_length)
        names = ("reads_padding", "zeros_for_empty", "pooled_width")
        arrays = {"token_ids": ids} | self.states(ids, mask, len(texts))
        write_texts(out, texts, arrays, {name: getattr(self.text, name) for name in names})


@nnx.jit
def moments(
    vae: VAE, images: UInt8[Array, "B H W C"]
) -> tuple[Float[Array, "B H W Z"], Float[Array, "B H W Z"]]:
    """Mean and standard deviation of q(z | picture)."""
    q = vae.encode(to_unit(images))
    return q.mean, jnp.exp(0.5 * q.logvar)
