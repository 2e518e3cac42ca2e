"""Tar shards in WebDataset's layout, as LAION's are: read at random through an index of the
members' places.

    path/00000.tar: 000000000.jpg  000000000.txt  000000000.json  000000001.jpg ...      one record a key

The members of a record are neighbours and share the name up to the first dot of its last part. The
picture is one of `PICTURES`; the caption is `caption_field` of the `.json` (a string or a list of
them), else the `.txt`, else `caption` of the `.json`; the other fields of the `.json` are kept as
attributes.

The index is made once from the tar headers, and kept (see `kept`): afterwards a source opens in the
time that it takes to map one file into memory. No shard is ever extracted; a record is one `pread`
a member.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import tarfile
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from contextdiff_jax.data.kept import fingerprint, kept_array
from contextdiff_jax.data.records import (
    BrokenRecords,
    Encoded,
    PictureConfig,
    PictureSource,
    captions_of,
    find_files,
)

PICTURES = ("jpg", "jpeg", "png", "webp")
_KINDS = {**dict.fromkeys(PICTURES, "image"), "txt": "text", "json": "json"}
_ENTRY = np.dtype(
    [
        ("shard", "<i4"),
        *((kind, [("offset", "<i8"), ("size", "<i4")]) for kind in ("image", "text", "json")),
    ]
)
_MAX_OPEN = 256  # shards; a process may have 1024 files open by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebDatasetConfig(PictureConfig):
    """Which shards to read. `shards`: a glob of their names in `path`."""

    shards: str = "*.tar"


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo | str]:
    """The members of a tar file; a str for a header that is broken, after which the next good one
    is looked for.
    """
    size = os.fstat(file.fileno()).st_size
    with tarfile.TarFile(
        fileobj=file, ignore_zeros=True
    ) as tar:  # ignore_zeros: a broken first header is no error
        tar.offset, broken = 0, False
        while tar.offset < size:
            start = tar.offset
            file.seek(start)
            try:
                member = tarfile.TarInfo.fromtarfile(tar)
            except (
                tarfile.EOFHeaderError
            ):  # a block of zeros: the end, or what `cat a.tar b.tar` leaves in between
                tar.offset = start + tarfile.BLOCKSIZE
                continue
            except (tarfile.TarError, ValueError, OverflowError) as error:
                if not broken:  # the blocks up to the next header are one broken member
                    yield f"byte {start}: bad tar header ({error})"
                broken, tar.offset = True, start + tarfile.BLOCKSIZE
                continue
            broken = False
            if tar.offset <= start:  # a damaged size would lead back
                yield f"byte {start}: bad tar header (size {member.size})"
                return
            yield member


def _index_shard(path: pathlib.Path, number: int) -> tuple[list[tuple], list[str]]:
    """(entries of the whole records, reasons of the broken ones)."""
    entries, broken = [], []
    key, record, at = None, {}, 0

    def close():
        if not record:
            return
        if "image" in record and ("text" in record or "json" in record):
            absent = (0, 0)
            entries.append(
                (number, record["image"], record.get("text", absent), record.get("json", absent))
            )
        else:
            name, lacks = "/".join(filter(None, key)), "caption" if "image" in record else "picture"
            broken.append(f"{path.name}: byte {at}: {name} has no {lacks}")

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for member in _members(file):
            if isinstance(member, str):
                broken.append(f"{path.name}: {member}")
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            kind = _KINDS.get(extension.lower())
            if not member.isreg() or kind is None or not stem:
                continue
            if (folder, stem) != key:
                close()
                key, record, at = (folder, stem), {}, member.offset
            if member.size and member.offset_data + member.size <= size and member.size < 2**31:
                record.setdefault(kind, (member.offset_data, member.size))
            else:
                record.setdefault("cut", (0, 0))  # seen, so counted, but without its content
        close()
    return entries, broken


def _index(root: pathlib.Path, shards: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """The index of all shards, and what is broken in them."""
    logging.warning("Indexing %d tar shards in %s, once", len(shards), root)
    start, parts, broken = time.perf_counter(), [], []
    for number, name in enumerate(shards):
        entries, reasons = _index_shard(root / name, number)
        parts.append(np.array(entries, _ENTRY))
        broken += reasons
    index = np.concatenate(parts)
    logging.warning("Indexed %d records in %.1f s", len(index), time.perf_counter() - start)
    return index, {"num_broken": len(broken), "reasons": broken[:20]}


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


class WebDatasetSource(PictureSource):
    """Random access to the records of tar shards, in the order of the shards' names."""

    def __init__(self, config: WebDatasetConfig):
        """Makes or maps the index.

        Raises:
            ValueError: if there is no such folder, shard or good record, or too many broken ones.
        """
        self.config = config
        files = find_files(config.path, config.shards, "tar shard")
        self._shards = [str(file.relative_to(config.path)) for file in files]
        self._key = fingerprint(files)
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

    def cache_key(self) -> str:
        return f"webdataset {self._key}"

    def where(self, index: int) -> str:
        entry = self._entries[index]
        return f"{self._shards[entry['shard']]}: byte {entry['image']['offset']}"

    def read(self, index: int) -> Encoded:
        shard, *members = self._entries[index].item()
        file = _open(os.path.join(self.config.path, self._shards[shard]), self._key)
        image, text, fields = (_pread(file, offset, size) for offset, size in members)
        attributes = json.loads(fields) if fields else {}
        if not isinstance(attributes, dict):
            raise ValueError("the .json is not an object")
        name = self.config.caption_field
        if name in attributes:
            captions = captions_of(attributes, name)
        elif text:
            captions = [text.decode("utf-8", errors="replace").strip()]
        else:
            name = "caption"
            captions = captions_of(attributes, name)
        attributes.pop(name, None)
        return Encoded(image, captions, attributes)
