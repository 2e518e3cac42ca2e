"""Whether two processes have the same data: a fingerprint of a source's records that is the same
wherever they lie.

It is of the records' number, names and sizes, and of the contents of a few, spread over the set. To
read them all would take as long as an epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from contextdiff_jax.data import DataConfig
from contextdiff_jax.data.decoding import UNDECODABLE
from contextdiff_jax.data.latent_shards import CacheSource
from contextdiff_jax.data.loader import RandomAccessSource
from contextdiff_jax.data.orders import Size
from contextdiff_jax.data.records import PictureSource

_READ = 16  # records whose contents are compared
# Fields of the config's data section in which processes may differ.
_OWN = ("path", "index_folder", "tokenizer", "num_workers", "prefetch")


def identity(source: RandomAccessSource, buckets: Sequence[Size] = ()) -> dict[str, str | int]:
    """Facts that processes compare, by name.

    They are the number of records, their names and sizes, some contents; with `buckets` also the
    pictures' sizes.
    """
    count = len(source)
    facts: dict[str, str | int] = {"number of records": count}
    if isinstance(source, PictureSource):
        facts["number of broken records"] = source.num_broken
        facts["names or sizes of the records"] = source.names_key()
        if buckets:
            facts["sizes of the pictures"] = _digest(source.picture_sizes().tobytes())
    if isinstance(source, CacheSource):
        facts["cache.json"] = _digest(json.dumps(dataclasses.asdict(source.cache)).encode())
    numbers = np.unique(np.linspace(0, count - 1, min(count, _READ)).astype(int))
    facts["contents of the records"] = _digest(*(_content(source, int(n)) for n in numbers))
    return facts


def shared_settings(data: DataConfig) -> dict[str, Any]:
    """The fields of the data section that all processes must have the same, by their names."""
    return {f"data.{k}": v for k, v in dataclasses.asdict(data).items() if k not in _OWN}


def content_key(source: RandomAccessSource) -> str:
    """A fingerprint that changes when a record does, also by the times of its files."""
    facts: dict[str, Any] = identity(source)
    if isinstance(source, PictureSource):
        facts["files"] = source.cache_key(here=False)
    return _digest(json.dumps(facts).encode())


def _content(source: RandomAccessSource, index: int) -> bytes:
    if isinstance(source, PictureSource):
        try:
            encoded = source.read(index)
        except UNDECODABLE:
            return b"broken"
        return encoded.image + json.dumps(list(encoded.captions)).encode()
    record = source[index]
    arrays = [value.tobytes() for value in record.values() if isinstance(value, np.ndarray)]
    return b"".join(arrays) + json.dumps(record["caption"]).encode()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
