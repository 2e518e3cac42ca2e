"""The files of a folder: JSON, and safetensors read one tensor at a time; what is damaged or
refused is named.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from contextdiff_jax.files import replacing

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")


class LazyTensor:
    """A stored tensor: its file and shape at once, its values by `np.asarray`."""

    def __init__(self, file: safetensors.safe_open, name: str, path: Path):
        self._file, self._name, self.path = file, name, path
        self.shape = tuple(file.get_slice(name).get_shape())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        try:
            array = self._file.get_tensor(self._name)
        except (safetensors.SafetensorError, TypeError) as error:
            raise ValueError(f"{self.path}: {self._name}: can't be read ({error})") from None
        return array if dtype is None else array.astype(dtype)


class FolderTensors(Mapping):
    """torch name -> `LazyTensor`, from a folder's single file or its shards.

    `source` is the file, or the folder of the shards. Raises ValueError for a folder without
    weights (with the reason, if only pickles are there), a missing shard, and a truncated file,
    with the first tensor that it lacks.
    """

    def __init__(self, folder: Path, file_name: str):
        self._tensors = {}
        shards = _shards(folder, file_name)
        self.source = shards[0][0] if len(shards) == 1 else folder
        for path, names in shards:
            # Reads, not a mapping: a mapped file's pages stay resident while it is open, and peak
            # memory was the parameters' size plus the file's.
            file = open_tensors(path)
            stored = set(file.keys())
            lacking = sorted(set(names or ()) - stored)
            if lacking:
                raise ValueError(f"{path}: lacks {', '.join(lacking)}, which the index promises")
            self._tensors |= {name: LazyTensor(file, name, path) for name in sorted(stored)}

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_tensors(path: Path) -> safetensors.safe_open:
    """A file to be read one tensor at a time; ValueError says what is wrong with a damaged one."""
    try:
        return safetensors.safe_open(path, framework="np", backend="pread")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: {_damage(path) or f'not a safetensors file ({error})'}"
        ) from None


def save_tensors(
    tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file; a file that is there is replaced only when the new one is complete."""
    with replacing(path) as file:
        safetensors.numpy.save_file(
            dict(tensors), file, metadata={"format": "pt", **(metadata or {})}
        )


def read_json(path: Path, expected: str) -> dict:
    """A JSON object; ValueError, with what was `expected`, if there is none."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected {expected}") from None
    except (ValueError, RecursionError) as error:  # a deeply nested file is the latter
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object; expected {expected}")
    return values


def _shards(folder: Path, file_name: str) -> list[tuple[Path, list[str] | None]]:
    """The files to read and, from an index, the names each must hold. The plain name first, then
    its half variants.
    """
    stem = file_name.removesuffix(".safetensors")
    for variant in ("", ".fp16", ".bf16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [(single, None)]
        index = _index(folder, stem, variant)
        if index is not None:
            return _indexed(folder, index)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: refused, a pickle can run any code when it is read; convert it to "
            f"{file_name} with the safetensors package"
        )
    raise ValueError(f"{folder / file_name}: no such file; expected weights in safetensors format")


def _index(folder: Path, stem: str, variant: str) -> Path | None:
    # Today's writers put the variant before .json; older diffusers put it after the stem.
    for name in (
        f"{stem}.safetensors.index{variant}.json",
        f"{stem}{variant}.safetensors.index.json",
    ):
        if (folder / name).is_file():
            return folder / name
    return None


def _indexed(folder: Path, index: Path) -> list[tuple[Path, list[str]]]:
    weight_map = read_json(index, "a safetensors index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise ValueError(
                f"{index}: {name}: lies in {file!r}; must be a safetensors file of the same folder"
            )
        shards.setdefault(file, []).append(name)
    for file, names in sorted(shards.items()):
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder / file}: missing shard, named by {index.name}; it holds {names[0]}"
            )
    return [(folder / file, names) for file, names in sorted(shards.items())]


def _damage(path: Path) -> str | None:
    """What a truncated file lacks first, or None if it is no such file."""
    data, size = path.open("rb"), path.stat().st_size
    with data:
        head = data.read(8)
        if len(head) < 8:
            return f"truncated: {size} bytes, less than a header"
        (length,) = struct.unpack("<Q", head)
        if length > 100_000_000:  # the format's limit
            return None
        if size < 8 + length:
            return f"truncated within its header: {size} bytes of at least {8 + length}"
        try:
            header = json.loads(data.read(length))
            ends = {
                name: int(value["data_offsets"][1])
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, LookupError, AttributeError):
            return None
    lacking = sorted((end, name) for name, end in ends.items() if 8 + length + end > size)
    if not lacking:
        return None
    end = 8 + length + max(ends.values())
    return f"truncated: {size} bytes of {end}, {len(lacking)} tensors are incomplete, the first is {lacking[0][1]}"
