"""Contents of tar shards: records, grouped as the package `webdataset` groups them, and losses.

A member's key is its name up to the first dot of its last part, its field the rest, in lower case;
neighbours of one key are a sample. A sample is one record, of its fields `jpg`, `txt`, `json`, but
names such as `cat 2.0.jpg`, `cat 2.0.txt` give their sample the fields `0.jpg` and `0.txt`: then
each picture with a caption of the same name is a record.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

PICTURES = ("jpg", "jpeg", "png", "webp")  # of several in one sample, the first
_KINDS = {**dict.fromkeys(PICTURES, "image"), "txt": "text", "json": "json"}
# No records: webdataset's own members, and what macOS and old tars keep about files.
_META = re.compile(r"__[^/]*__($|/)|(.*/)?(__MACOSX|PaxHeaders?(\.\d+)?)/")
_COMPRESSED = {  # by how a file begins; a tar begins with a member's name
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "zip": re.compile(rb"PK\x03\x04"),
}
# Zeros that end a tar: two blocks, and those that fill up a record of 20.
_END = 21 * tarfile.BLOCKSIZE

Span = tuple[int, int]  # offset and size; (0, 0): absent; size -1: sparse, from its header on
Record = tuple[Span, Span, Span]  # picture, text, json
_ABSENT: Span = (0, 0)


class _Gap(NamedTuple):
    """Bytes that belong to no member."""

    start: int
    end: int
    reason: str


@dataclasses.dataclass
class Shard:
    """A shard's contents.

    Attributes:
        records: the whole ones. num_records: how many they are.
        broken: reasons of those that aren't.
        damage: what is wrong with the shard itself.
        used: bytes of its members.
        lost: bytes that should be members' and aren't.
        whole: whether it ends as a tar does.
    """

    records: list[Record] = dataclasses.field(default_factory=list)
    num_records: int = 0
    broken: list[str] = dataclasses.field(default_factory=list)
    damage: list[str] = dataclasses.field(default_factory=list)
    used: int = 0
    lost: int = 0
    whole: bool = False


def _zeros_end(file: BinaryIO, start: int, size: int) -> int:
    """The block in which the zeros from `start` on end, or the end of the file."""
    file.seek(start)
    place = start
    while chunk := file.read(1 << 20):
        rest = chunk.lstrip(b"\0")
        if rest:
            return place + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(chunk)
    return size


def _open_tar(file: BinaryIO) -> tarfile.TarFile:
    """A tar to read members of `file` from, one by one; nothing is read yet."""
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(tarfile.RECORDSIZE)))
    tar.fileobj = file
    return tar


def _members(file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo | _Gap]:
    """The members of a tar file, and the gaps between them: zeros, and broken headers up to the
    next good one.
    """
    tar, bad = _open_tar(file), None
    tar.offset = 0
    while tar.offset < size:
        start = tar.offset
        file.seek(start)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
            if not _is_zero(file, start):  # up to the next good header this is one broken member
                bad = bad or (start, f"bad tar header ({error})")
                tar.offset = start + tarfile.BLOCKSIZE
                continue
            member = _Gap(start, _zeros_end(file, start, size), "zeros")
            tar.offset = member.end
        if tar.offset <= start:  # a damaged size would lead back
            yield _Gap(start, size, f"bad tar header (size {member.size})")
            return
        if bad:
            yield _Gap(bad[0], start, bad[1])
            bad = None
        yield member
    if bad:
        yield _Gap(bad[0], size, bad[1])


def _is_zero(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    return not file.read(tarfile.BLOCKSIZE).strip(b"\0")


def read_sparse(file: BinaryIO, header: int) -> bytes:
    """The content of the sparse member whose header is at `header`, its holes filled."""
    tar = _open_tar(file)
    tar.offset = header
    file.seek(header)
    try:
        return tar.fileobject(tar, tarfile.TarInfo.fromtarfile(tar)).read()
    except tarfile.TarError as error:
        raise ValueError(f"cut off ({error})") from None


class _Sample:
    """The members of one key, by what precedes the last dot of their fields ('' for `jpg`)."""

    def __init__(self, key: tuple[str, str], place: str):
        self.name, self._place = "/".join(filter(None, key)), place
        self._parts: dict[str, dict[str, dict[str, Span]]] = {}
        self._times: dict[str, int] = {}

    def add(self, field: str, span: Span | None) -> None:
        """A member; `span` is None for one without its content."""
        variant, _, extension = field.rpartition(".")
        self._times[field] = self._times.get(field, 0) + 1
        part = self._parts.setdefault(variant, {})
        if span is not None:
            part.setdefault(_KINDS[extension], {}).setdefault(extension, span)

    def records(self) -> tuple[list[Record], list[str]]:
        """(whole records, reasons of the broken ones)."""
        times = max(self._times.values())
        if times > 1:  # which picture belongs to which text is not known
            field = max(self._times, key=self._times.get)
            return [], [f"{self._place}{self.name}.{field} is there {times} times"] * times
        parts = self._parts
        plain = parts.get("", {})
        pairs = [p for p in parts.values() if "image" in p and ("text" in p or "json" in p)]
        if plain in pairs:  # the others are more about it, unless they have texts of their own
            return [_record(p) for p in pairs if p is plain or "text" in p], []
        pictures = [p for p in parts.values() if "image" in p]
        if not pairs and len(pictures) == 1 and ("text" in plain or "json" in plain):
            return [_record({**plain, "image": pictures[0]["image"]})], []
        if not pairs and pictures and ("text" in plain or "json" in plain):
            reason = f"has {len(pictures)} pictures and one caption"
            return [], [f"{self._place}{self.name} {reason}"]
        broken = [
            (variant, part)
            for variant, part in parts.items()
            if part not in pairs and ("image" in part or not part or (variant and "text" in part))
        ]
        if not pairs and not pictures:  # one sample, one broken record
            broken = [("", {})]
        reasons = []
        for variant, part in broken:
            lacks = "caption" if "image" in part else "picture"
            name = f"{self.name}.{variant}" if variant else self.name
            reasons.append(f"{self._place}{name} has no {lacks}")
        return [_record(part) for part in pairs], reasons


def _record(part: dict[str, dict[str, Span]]) -> Record:
    image = next(part["image"][name] for name in PICTURES if name in part["image"])
    text, fields = (next(iter(part.get(kind, {}).values()), _ABSENT) for kind in ("text", "json"))
    return image, text, fields


def _span(member: tarfile.TarInfo, end: int, size: int) -> Span | None:
    """The place of the content that ends before `end`; None if it is cut off, or there is none."""
    if end - member.offset >= 2**31 or member.size < 0:
        return None
    if member.sparse is not None:
        return (member.offset, -1) if end <= size else None
    return (member.offset_data, member.size) if member.offset_data + member.size <= size else None


def _field(name: str) -> tuple[tuple[str, str], str] | None:
    """(key, field) of a member's name; None for one that is of no record."""
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    field = field.lower()
    if not stem or field.rpartition(".")[2] not in _KINDS or _META.match(name):
        return None
    return (folder, stem), field


def read_shard(path: pathlib.Path) -> Shard:
    """A shard's contents; ValueError for one that can't be read at random places."""
    shard, key, sample = Shard(), None, None

    def close():
        if sample is not None:
            records, broken = sample.records()
            shard.records.extend(records)
            shard.broken.extend(broken)

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(16)
        for kind, magic in _COMPRESSED.items():
            if magic.match(start):
                raise ValueError(
                    f"{path}: is compressed ({kind}); shards are read at random places: "
                    "decompress it, or name others in data.metadata"
                )
        tar_end = 0
        for member, end in _with_ends(_members(file, size), size):
            if isinstance(member, _Gap):
                _note(shard, path.name, member)
                continue
            shard.used += end - member.offset
            shard.whole, tar_end = False, end
            named = _field(member.name) if member.isreg() else None
            if named is None:
                continue
            if named[0] != key:
                close()
                key, sample = named[0], _Sample(named[0], f"{path.name}: byte {member.offset}: ")
            span = _span(member, end, size)
            empty = span is not None and span[1] == 0 and not named[1].endswith("txt")
            sample.add(named[1], None if empty else span)
        close()
    shard.num_records = len(shard.records)
    if not shard.whole:
        reason = f"is cut off at byte {size}, without a tar's end" if tar_end else "is no tar file"
        begins = "" if tar_end else f" (begins with {start!r})" if size else " (it is empty)"
        shard.damage.append(f"{path.name}: {reason}{begins}")
    return shard


def _with_ends(
    members: Iterator[tarfile.TarInfo | _Gap], size: int
) -> Iterator[tuple[tarfile.TarInfo | _Gap, int]]:
    """Each with the place at which it ends, which is where the next one begins."""
    before = next(members, None)
    for member in members:
        yield before, member.start if isinstance(member, _Gap) else member.offset
        before = member
    if before is not None:
        yield before, size


def _note(shard: Shard, name: str, gap: _Gap) -> None:
    """Counts a gap: zeros as the end of a tar, as far as a tar ends with so many; else as lost."""
    length = gap.end - gap.start
    shard.whole = gap.reason == "zeros"
    if gap.reason != "zeros":
        shard.lost += length
        shard.broken.append(f"{name}: byte {gap.start}: {gap.reason}")
    elif length > _END:
        shard.lost += length
        shard.damage.append(f"{name}: byte {gap.start}: {length} bytes of zeros")


def lost_records(shards: Sequence[Shard]) -> list[int]:
    """The number of broken or lost records of each shard.

    They are those that are known to be, or as many as would fit into its lost bytes. A shard that
    is cut off has lost what the whole ones have more; where there is none, as much as it holds.
    """
    whole = [shard.used for shard in shards if shard.whole and shard.num_records and not shard.lost]
    usual = sum(whole) / len(whole) if whole else 0
    num_records = sum(shard.num_records for shard in shards)
    mean = max(1.0, sum(shard.used for shard in shards) / max(1, num_records))
    counts = []
    for shard in shards:
        lost = shard.lost
        if not shard.whole:
            lost = max(lost, usual - shard.used if whole else shard.used)
        counts.append(max(len(shard.broken), round(lost / mean), 1 if shard.damage else 0))
    return counts
