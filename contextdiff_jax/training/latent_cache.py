"""A cache of a frozen autoencoder's latents: from a run's settings to `data.cached`'s shards."""

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
from contextdiff_jax.data.latent_shards import Cache, claim_cache, encode_record, write_shard
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.models.vae import VAE
from contextdiff_jax.parallel.processes import agree
from contextdiff_jax.pretrained import load_vae
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
) -> tuple[Cache, int]:
    """Writes the shards that aren't there, this process's share of them; (the cache, how many it
    wrote).

    Raises ValueError for settings without an autoencoder, or a folder with another cache.
    """
    if not settings.latent.vae:
        raise ValueError(
            "latent.vae='': a cache needs the autoencoder's folder, or model.pretrained"
        )
    tokenizer = open_tokenizer(settings)
    data = settings.data
    source = agree("data", lambda: make_source(data, split), identity)
    cache = Cache(
        num_records=len(source),
        shard_size=shard_size,
        shape=settings.shape,
        dtype=dtype,
        image_size=data.image_size,
        max_length=data.max_length,
        tokenizer=data.tokenizer,
        vae=settings.latent.config.to_dict(),
        source={**dataclasses.asdict(data), "split": split},
        content=content_key(source),
    )
    claim_cache(out, cache)
    vae = load_vae(settings.latent.vae, dtype=jnp.dtype(settings.train.precision))
    mine = range(jax.process_index(), cache.num_shards, jax.process_count())
    cut = CutCaptions(data.max_length)
    missing = [number for number in mine if not (out / cache.shard(number)).exists()]
    for number in tqdm(
        missing, initial=len(mine) - len(missing), total=len(mine), unit="shard", disable=None
    ):
        records = make_records(
            vae, source, tokenizer, cache.rows(number), data.max_length, batch_size, dtype, cut
        )
        write_shard(out / cache.shard(number), records)
    if cut.count:
        LOGGER.warning("%d captions are cut at %d tokens", cut.count, data.max_length)
    return cache, len(missing)


def make_records(
    vae: VAE,
    source: RandomAccessSource,
    tokenizer: AnyTokenizer,
    rows: Sequence[int],
    max_length: int,
    batch_size: int,
    dtype: str,
    cut: CutCaptions,
) -> Iterator[bytes]:
    """The records of those rows of the source, in order, encoded `batch_size` at a time; `cut`
    counts the captions that are too long.
    """
    for start in range(0, len(rows), batch_size):
        part = [source[i] for i in rows[start : start + batch_size]]
        images = np.stack([record["image"] for record in part])
        # One shape, one compilation.
        padding = [(0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)]
        mean, std = (np.asarray(m).astype(dtype) for m in moments(vae, np.pad(images, padding)))
        captions = [record["caption"] for record in part]
        ids, mask, lost = tokenizer.encode_and_cut(captions, max_length)
        cut.add(captions, lost)
        for row, caption in enumerate(captions):
            sizes = part[row].get("sizes")
            yield encode_record(mean[row], std[row], ids[row], mask[row], caption, sizes)


@nnx.jit
def moments(
    vae: VAE, images: UInt8[Array, "B H W C"]
) -> tuple[Float[Array, "B H W Z"], Float[Array, "B H W Z"]]:
    """Mean and standard deviation of q(z | picture)."""
    q = vae.encode(to_unit(images))
    return q.mean, jnp.exp(0.5 * q.logvar)
