"""A cache of latents, token ids and captions in ArrayRecord shards; `contextdiff_jax.cache_latents`
writes it.

    path/cache.json                             what it was made of (`Cache`), written first
    path/texts.safetensors                      with states: those of texts that aren't records'
    path/latents-00000-of-00008.array_record    records of `encode_record`; so named when complete

A record holds the mean and the standard deviation of q(z | picture), before the scaling factor, so
that each epoch draws its own latents; of a run in pixels, the picture. A cache with states also
holds what a frozen text encoder gives of the caption, and of the empty one and `sample.prompts`:
training from it reads no encoder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float32, Int32, Shaped

from contextdiff_jax.runtime.errors import one_line
from contextdiff_jax.runtime.files import replacing, write_json
from contextdiff_jax.runtime.texts import parse_json

LOGGER = logging.getLogger(__name__)
CACHE_FILE, TEXTS_FILE = "cache.json", "texts.safetensors"
STATES = ("text_states", "text_mask", "pooled_text")  # a batch's; the last not of every encoder
_OPTIONS = "group_size:1"  # records are read one by one, in random order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """A description of what a cache was made of.

    Attributes:
        num_records, shard_size: shard k holds records k * shard_size and on.
        shape: [H, W, Z] of the latents, or pictures. dtype: of the moments, or uint8.
        image_size, max_length, tokenizer: as in the config's data section.
        vae: the autoencoder's config, which a run's must equal; empty: of pictures as they are.
        source: the data section of the config.
        text: of states: `key` of the text encoder that they are of, `dtype`; None: there are none.
        content: a fingerprint of the records. Empty: the cache is of a version that kept none, so
            that records which changed while it was written may be mixed in it.
    """

    num_records: int
    shard_size: int
    shape: tuple[int, int, int]
    dtype: str
    image_size: int
    max_length: int
    tokenizer: str
    vae: dict[str, Any]
    source: dict[str, Any]
    content: str = ""
    text: dict[str, Any] | None = None

    @property
    def num_shards(self) -> int:
        return -(-self.num_records // self.shard_size)

    def shard(self, number: int) -> str:
        """A shard's file name."""
        return f"latents-{number:05d}-of-{self.num_shards:05d}.array_record"

    def rows(self, number: int) -> range:
        """The records of a shard."""
        return range(
            number * self.shard_size, min((number + 1) * self.shard_size, self.num_records)
        )


def read_cache(path: str | pathlib.Path) -> Cache:
    """ValueError for a folder without a cache.json that fits."""
    file = pathlib.Path(path, CACHE_FILE)
    try:
        values = parse_json(file.read_bytes())
        return Cache(**{**values, "shape": tuple(values["shape"])})
    except OSError:
        raise ValueError(
            f"data.path={str(path)!r}: holds no cache (no {CACHE_FILE}); make one with "
            "contextdiff_jax.cache_latents"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: is not a cache's ({error})") from None


def claim_cache(path: pathlib.Path, cache: Cache) -> None:
    """Writes cache.json, or checks that the one there is the same. ValueError with the first field
    that differs.
    """
    path.mkdir(parents=True, exist_ok=True)
    new = json.loads(json.dumps(dataclasses.asdict(cache)))
    if not (path / CACHE_FILE).exists():
        write_json(path / CACHE_FILE, new)
        return
    old = json.loads(json.dumps(dataclasses.asdict(read_cache(path))))
    for name in new:
        if old[name] == new[name]:
            continue
        if name == "content":
            raise ValueError(
                f"--out={path}: was begun with other captions or pictures; new ones would mix with "
                "old: remove it, or name another folder"
            )
        raise ValueError(
            f"--out={path}: holds another cache, {name} is {old[name]!r} there and "
            f"{new[name]!r} here"
        )


def encode_record(
    picture: Mapping[str, Shaped[np.ndarray, "H W Z"]],
    token_ids: Int32[np.ndarray, "*E N"],
    token_mask: np.ndarray,
    caption: str,
    sizes: Float32[np.ndarray, "6"] | None = None,
    states: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """One record: safetensors, `mean` and `std` or the `image` of a picture, the caption as UTF-8
    bytes, the picture's sizes and the caption's states (`STATES`) where it has some.
    """
    text = np.frombuffer(caption.encode() or b"\0", np.uint8)
    mask = token_mask.astype(np.uint8)
    values = {**picture, "ids": token_ids, "mask": mask, "caption": text}
    more = {} if sizes is None else {"sizes": sizes}
    return safetensors.numpy.save(values | more | _packed(states or {}))


def _packed(states: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without types that safetensors lacks."""
    return {
        name: array.astype(np.uint8) if array.dtype == bool else np.ascontiguousarray(array)
        for name, array in states.items()
    }


def _unpacked(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: values[name] for name in STATES if name in values}
    return found | {"text_mask": found["text_mask"].astype(bool)} if found else {}


def write_texts(
    path: pathlib.Path,
    texts: Sequence[str],
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> None:
    """Writes texts.safetensors: `token_ids` and `STATES` of the texts, a row each, and `facts` of
    their encoder.
    """
    with replacing(path / TEXTS_FILE) as file:
        told = {"texts": json.dumps(list(texts)), "facts": json.dumps(dict(facts))}
        safetensors.numpy.save_file(_packed(arrays), file, metadata=told)


def read_texts(
    path: str | pathlib.Path,
) -> tuple[list[str], dict[str, np.ndarray], dict[str, Any]]:
    """What `write_texts` wrote. ValueError where there is none."""
    file = pathlib.Path(path, TEXTS_FILE)
    try:
        with safetensors.safe_open(file, "np") as opened:
            texts, facts = (json.loads(opened.metadata()[name]) for name in ("texts", "facts"))
            values = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: can't be read ({one_line(error)}); the same command of "
            "contextdiff_jax.cache_latents writes it anew"
        ) from None
    return texts, {"token_ids": values["token_ids"]} | _unpacked(values), facts


def decode_record(record: bytes) -> dict[str, Any]:
    """The inverse, with the names of a batch."""
    values = safetensors.numpy.load(record)
    sizes = {"sizes": values["sizes"]} if "sizes" in values else {}
    names = {"image": "image", "latent_mean": "mean", "latent_std": "std"}
    picture = {name: values[stored] for name, stored in names.items() if stored in values}
    text = {
        "token_ids": values["ids"],
        "token_mask": values["mask"].astype(bool),
        "caption": values["caption"].tobytes().decode().removesuffix("\0"),
    }
    return sizes | picture | text | _unpacked(values)


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """A shard, visible under its name only when it is complete."""
    with (
        replacing(path) as file,
        contextlib.closing(ArrayRecordWriter(str(file), _OPTIONS)) as writer,
    ):
        for record in records:
            writer.write(record)


class CacheSource:
    """Random access to a complete cache.

    Records: `latent_mean`, `latent_std` [H, W, Z] in the cache's type (or `image`, uint8),
        `token_ids`, `token_mask`
        [L], `caption`, `sizes` [6] if the pictures' source had them, and `STATES` if the cache has
        those.
    """

    def __init__(self, path: str):
        """ValueError for a folder without a cache, or with one that isn't finished."""
        self.cache = read_cache(path)
        files = [pathlib.Path(path, self.cache.shard(k)) for k in range(self.cache.num_shards)]
        there = sum(file.is_file() for file in files)
        if there < len(files):
            raise ValueError(
                f"data.path={path!r}: {there} of {len(files)} shards are there; the same command "
                "as before goes on"
            )
        self.path = path
        if not self.cache.content:
            LOGGER.warning(
                "%s: is of a version that did not notice records that change while it is written",
                path,
            )
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(file) for file in files])
            count = len(self._records)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"data.path={path!r}: a shard cannot be read ({error})") from None
        if count != self.cache.num_records:
            raise ValueError(
                f"data.path={path!r}: {count} records; {CACHE_FILE} says {self.cache.num_records}"
            )

    def __len__(self) -> int:
        return self.cache.num_records

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return decode_record(self._records[index])
        except (RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
            shard = self.cache.shard(index // self.cache.shard_size)
            raise ValueError(
                f"data.path={self.path!r}: record {index}, in {shard}, is damaged ({error}); "
                "remove the shard and make it again with contextdiff_jax.cache_latents"
            ) from None
