"""Tar shards in WebDataset's layout, as LAION's are: read at random through an index of the
members' places.

    path/00000.tar: 000000000.jpg  000000000.txt  000000000.json  000000001.jpg ...

There is one record a key. Which members make a record, and what counts as lost in a damaged shard:
see `shards`. The caption is `caption_field` of the `.json` (a string or a list of them), else the
`.txt`, else `caption` of the `.json`: the first of them that has words. The other fields of the
`.json` are kept as attributes.

The index is made once from the tar headers, and kept (see `kept`): afterwards a source opens in the
time that it takes to map one file into memory. No shard is ever extracted; a record is one `pread`
a member.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import logging
import os
import pathlib
import tarfile
import time
import zlib
from typing import Any, BinaryIO

import numpy as np

from contextdiff_jax.data.kept_arrays import digest, fingerprint, kept_array
from contextdiff_jax.data.records import (
    BrokenRecords,
    Encoded,
    PictureConfig,
    PictureSource,
    captions_of,
    find_files,
)
from contextdiff_jax.data.shards import lost_records, read_sparse
from contextdiff_jax.data.shards import read_shard as _index_shard
from contextdiff_jax.runtime.texts import decode_text, parse_json

_ENTRY = np.dtype(
    [
        ("shard", "<i4"),
        *((kind, [("offset", "<i8"), ("size", "<i4")]) for kind in ("image", "text", "json")),
    ]
)
LOGGER = logging.getLogger(__name__)
_MAX_OPEN = 256  # shards; a process may have 1024 files open by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebDatasetConfig(PictureConfig):
    """A choice of the shards to read. `shards`: a glob of their names in `path`."""

    shards: str = "*.tar"


def _index(root: pathlib.Path, shards: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """The index of all shards, and what is broken in them."""
    LOGGER.warning("Indexing %d tar shards in %s, once", len(shards), root)
    start, parts, found = time.perf_counter(), [], []
    for number, name in enumerate(shards):
        shard = _index_shard(root / name)
        parts.append(np.array([(number, *record) for record in shard.records], _ENTRY))
        found.append(dataclasses.replace(shard, records=[]))  # millions of them take their room
    index = np.concatenate(parts)
    reasons = [reason for shard in found for reason in (*shard.damage, *shard.broken)]
    LOGGER.warning("Indexed %d records in %.1f s", len(index), time.perf_counter() - start)
    return index, {"num_broken": sum(lost_records(found)), "reasons": reasons[:20]}


@functools.lru_cache(_MAX_OPEN)
def _open(path: str, key: str) -> BinaryIO:
    """A shard to `pread` from, shared by all threads; closed when it is neither among the latest
    nor in use.
    """
    return open(path, "rb", buffering=0)


def _pread(file: BinaryIO, offset: int, size: int) -> bytes:
    data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise ValueError(f"cut off: {len(data)} of {size} bytes")
    return data


def _captions(fields: dict[str, Any], text: bytes | None, name: str) -> tuple[list[str], str]:
    """(the first captions with words in them: of field `name`, of the `.txt`, of `caption`; the
    field). ValueError with the reason if none can be read.
    """
    blank, reasons = None, []
    for field in (name, ".txt", "caption"):
        try:
            if field != ".txt":
                captions = captions_of(fields, field)
            elif text is None:
                continue
            else:
                captions = [decode_text(text).strip()]
        except ValueError as error:
            if field == ".txt":
                reasons.insert(0, f"the .txt: {error}")
            else:  # one that is there says more than one that is missing
                reasons.insert(0 if field in fields and not reasons else len(reasons), str(error))
            continue
        if any(map(str.strip, captions)):
            return captions, field
        blank = blank or (captions, field)
    if blank:
        return blank
    raise ValueError(reasons[0])


def _check_compressed(path: str) -> None:
    """ValueError if there are compressed shards, which the glob *.tar would leave out unsaid."""
    for ending in ("tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst"):
        for file in sorted(glob.glob(os.path.join(glob.escape(path), f"*.{ending}"))):
            raise ValueError(
                f"data.path={path!r}: {os.path.basename(file)} is compressed; shards are read at "
                "random places: decompress it, or name the shards to read in data.metadata"
            )


class WebDatasetSource(PictureSource):
    """Random access to the records of tar shards, in the order of the shards' names."""

    def __init__(self, config: WebDatasetConfig):
        """Makes or maps the index.

        Raises:
            ValueError: if there is no such folder, shard or good record, or too many broken ones.
        """
        self.config = config
        if config.shards == WebDatasetConfig.shards:
            _check_compressed(config.path)
        self._files = find_files(config.path, config.shards, "tar shard")
        self._shards = [os.path.relpath(file, config.path) for file in self._files]
        self._key = fingerprint(self._files, config.path)
        self._load_index()
        num_broken = self._facts["num_broken"]
        total = len(self) + num_broken
        self.broken = BrokenRecords(
            config.path, total, config.max_broken_fraction, num_broken, self._facts["reasons"]
        )
        if not len(self):
            raise ValueError(
                f"data.path={config.path!r}: the shards {config.shards} hold no records"
            )

    def _load_index(self) -> None:
        self._entries, self._facts = kept_array(
            self.config.path,
            self.config.index_folder,
            "index",
            self.cache_key(),
            lambda: _index(pathlib.Path(self.config.path), self._shards),
        )

    def __getstate__(self):
        # Workers map the index for themselves: pickling a memory map copies it.
        return {name: value for name, value in vars(self).items() if name != "_entries"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._load_index()

    def __len__(self) -> int:
        return len(self._entries)

    def cache_key(self, here: bool = True) -> str:
        key = self._key if here else fingerprint(self._files, self.config.path, here)
        return f"webdataset {key}"

    def names_key(self) -> str:
        return f"webdataset {digest(self._shards)} {zlib.crc32(self._entries)}"

    def where(self, index: int) -> str:
        shard, (offset, size), *_ = self._entries[index].item()
        header = offset if size < 0 else offset - tarfile.BLOCKSIZE
        try:
            name = os.pread(self._open(shard).fileno(), 100, header).split(b"\0")[0]
        except OSError:  # this text is wanted because something is wrong
            name = b"?"
        return f"{self._shards[shard]}: byte {offset} ({name.decode(errors='backslashreplace')})"

    def read(self, index: int) -> Encoded:
        shard, *members = self._entries[index].item()
        image, text, fields = (self._content(shard, *span) for span in members)
        attributes = parse_json(fields) if fields else {}
        if not isinstance(attributes, dict):
            raise ValueError("the .json is not an object")
        captions, field = _captions(attributes, text, self.config.caption_field)
        for name in {field, self.config.caption_field}:
            attributes.pop(name, None)
        return Encoded(image, captions, attributes)

    def _open(self, shard: int) -> BinaryIO:
        return _open(os.path.join(self.config.path, self._shards[shard]), self._key)

    def _content(self, shard: int, offset: int, size: int) -> bytes | None:
        """A member's content; None for one that there isn't."""
        if size < 0:
            with open(os.path.join(self.config.path, self._shards[shard]), "rb") as file:
                return read_sparse(file, offset)
        return _pread(self._open(shard), offset, size) if offset else None
