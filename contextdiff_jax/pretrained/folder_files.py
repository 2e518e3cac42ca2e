"""The files of a folder: JSON, and safetensors, one file or shards.

A single-file checkpoint is read as the folder that it would be in diffusers' format, so that
FILE/unet is a path like another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from contextdiff_jax.pretrained import single_file
from contextdiff_jax.pretrained.one_file import (
    PICKLES,
    ChangedTensor,
    LazyTensor,
    open_tensors,
    refuse_pointers,
    save_tensors,
)
from contextdiff_jax.pretrained.single_file import INDEX_FILE
from contextdiff_jax.runtime.texts import read_object

__all__ = (
    "INDEX_FILE",
    "PICKLES",
    "FolderTensors",
    "LazyTensor",
    "exists",
    "open_tensors",
    "read_json",
    "refuse_pointers",
    "save_tensors",
    "tokenizer_folder",
    "weights_key",
)
_PARTS, _PART = 64, 4096  # of a file, and their bytes, that `weights_key` reads


class FolderTensors(Mapping):
    """torch name -> `LazyTensor`, from a folder's single file or its shards.

    `source` is the file, or the folder of the shards. Raises ValueError for a folder without
    weights (with the reason, if only pickles are there), a missing shard, and a truncated file,
    with the first tensor that it lacks.
    """

    def __init__(self, folder: Path, file_name: str):
        self._tensors: Mapping[str, LazyTensor | ChangedTensor] = {}
        found = single_file.split(folder)
        if found is not None:
            self.source, self._tensors = folder, single_file.tensors(*found)
            return
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

    def __getitem__(self, name: str) -> LazyTensor | ChangedTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def weights_key(folder: Path, file_name: str) -> str:
    """Tells a folder's weights from others: the sizes of its files, their headers, and bytes spread
    over them. Of a file of many gigabytes that is read in no time, and no training leaves them.
    """
    digest = hashlib.blake2b(digest_size=8)
    tensors = FolderTensors(folder, file_name)
    for path in sorted({tensor.path for tensor in tensors.values()}):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for number in range(_PARTS):
                file.seek(number * max(size - _PART, 0) // (_PARTS - 1))
                digest.update(file.read(_PART))
    return digest.hexdigest()


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """A JSON object; ValueError, with what was `expected`, if there is none."""
    found = single_file.split(path)
    if found is not None:
        return single_file.values(*found)
    for parent in path.parents:
        if parent.is_file():
            pickle = any(parent.match(pattern) for pattern in PICKLES)
            why = "a pickle can run any code when it is read" if pickle else "not a folder"
            raise ValueError(
                f"{parent}: refused, {why}; of single files only .safetensors are read, convert "
                "it to one"
            )
    return read_object(path, expected)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder, also inside a single-file checkpoint."""
    found = single_file.split(path)
    return path.exists() if found is None else single_file.has(*found)


def tokenizer_folder(folder: Path) -> Path:
    """`folder`, or for the tokenizer of a single-file checkpoint, which holds none, the folder of
    that name beside it. ValueError says so if it isn't there.
    """
    found = single_file.split(folder)
    if found is None:
        return folder
    file, name = found
    beside = file.with_name(name)
    if not beside.is_dir():
        raise ValueError(
            f"{beside}: no such folder; {file.name} is a single file, which holds no tokenizer: "
            f"put the folder {name} of its kind of Stable Diffusion beside it"
        )
    return beside


def _shards(folder: Path, file_name: str) -> list[tuple[Path, list[str] | None]]:
    """The files to read and, from an index, the names each must hold. The plain name first, then
    its half variants.
    """
    stem = file_name.removesuffix(".safetensors")
    for variant in ("", ".fp16", ".bf16"):
        plain = folder / f"{stem}{variant}.safetensors"
        if plain.is_file():
            return [(plain, None)]
        index = _index(folder, stem, variant)
        if index is not None:
            return _indexed(folder, index)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: refused, a pickle can run any code when it is read; convert "
            f"it to {file_name} with the safetensors package"
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
        shards.setdefault(_shard_name(folder, index, name, file), []).append(name)
    for file, names in sorted(shards.items()):
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder / file}: missing shard, named by {index.name}; it holds {names[0]}"
            )
    return [(folder / file, names) for file, names in sorted(shards.items())]


def _shard_name(folder: Path, index: Path, name: str, file: object) -> str:
    """A shard's path inside `folder`, whichever system's separators the index was written with."""
    path = PureWindowsPath(file) if isinstance(file, str) else None
    if path is None or path.anchor or ".." in path.parts or path.suffix != ".safetensors":
        raise ValueError(
            f"{index}: {name}: lies in {file!r}; must be a safetensors file of the same folder"
        )
    inside = PurePosixPath(*path.parts)
    # Some indices begin with the folder's own name, from the pipeline's point of view.
    return str(inside) if (folder / inside).is_file() else path.name
