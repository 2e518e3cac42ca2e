"""One file of safetensors, read one tensor at a time; what is damaged or refused is named."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from contextdiff_jax.runtime.files import replacing
from contextdiff_jax.runtime.texts import pointer_problem

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
# Types that numpy lacks and safetensors can't give it.
_EIGHT_BITS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}


class LazyTensor:
    """A stored tensor: its file and shape at once, its values by `np.asarray`. Numbers of 8 bits
    become float32, which holds them exactly.
    """

    def __init__(self, file: safetensors.safe_open, name: str, path: Path):
        self._file, self._name, self.path = file, name, path
        part = file.get_slice(name)
        self.shape, self._dtype = tuple(part.get_shape()), part.get_dtype()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        try:
            if self._dtype in _EIGHT_BITS:
                array = _raw(self.path, self._name, _EIGHT_BITS[self._dtype]).astype(np.float32)
                array = array.reshape(self.shape)
            else:
                array = self._file.get_tensor(self._name)
        except (safetensors.SafetensorError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path}: {self._name}: {self._dtype} can't be read ({error})"
            ) from None
        return array if dtype is None else array.astype(dtype)


class ChangedTensor:
    """A tensor that is a part of a stored one, or another arrangement of it."""

    def __init__(self, tensor: LazyTensor, change: Callable[[np.ndarray], np.ndarray]):
        self._tensor, self._change, self.path = tensor, change, tensor.path
        # A view of one number in the stored shape: the change's shape without reading.
        self.shape = change(np.broadcast_to(np.zeros((), np.int8), tensor.shape)).shape

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._change(np.asarray(self._tensor, dtype))


def open_tensors(path: Path) -> safetensors.safe_open:
    """A file to be read one tensor at a time; ValueError says what is wrong with a damaged one."""
    try:
        return safetensors.safe_open(path, framework="np", backend="pread")
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror or error})") from None
    except safetensors.SafetensorError as error:
        problem = _damage(path) or f"not a safetensors file ({error})"
        raise ValueError(f"{path}: {problem}") from None


def save_tensors(
    tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file; a file that is there is replaced only when the new one is complete.

    Raises OSError, one line with the file, where it can't be written, as on a full disk.
    """
    try:
        with replacing(path) as file:
            safetensors.numpy.save_file(
                dict(tensors), file, metadata={"format": "pt", **(metadata or {})}
            )
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: can't be written ({error})") from None


def refuse_pointers(folder: Path) -> None:
    """Raises ValueError for a file in `folder` that Git LFS has not brought."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 1024:
            if problem := pointer_problem(path.read_bytes()):
                raise ValueError(f"{path}: {problem}")


@functools.lru_cache(maxsize=4)
def _offsets(path: Path, changed: int) -> tuple[int, dict[str, Any]]:
    """The values' beginning, and the header. `changed`: the file's time, for the cache."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


def _raw(path: Path, name: str, dtype: np.dtype) -> np.ndarray:
    """The flat values of a tensor of one byte each."""
    start, header = _offsets(path, path.stat().st_mtime_ns)
    first, last = header[name]["data_offsets"]
    return np.fromfile(path, dtype, count=last - first, offset=start + first)


def _damage(path: Path) -> str | None:
    """A Git LFS pointer, or the first thing that a truncated file lacks; None for neither."""
    size = path.stat().st_size
    with path.open("rb") as data:
        if problem := pointer_problem(data.read(1024)):
            return problem
        data.seek(0)
        head = data.read(8)
        if len(head) < 8:
            return f"truncated: {size} bytes, less than a header"
        (length,) = struct.unpack("<Q", head)
        if length > 100_000_000 or data.read(1) not in (b"", b"{"):  # the format's limit
            return None
        data.seek(8)
        if size < 8 + length:
            return f"truncated within its header: {size} bytes of at least {8 + length}"
        try:
            header = json.loads(data.read(length))
            ends = {
                name: int(value["data_offsets"][1])
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
    lacking = sorted((end, name) for name, end in ends.items() if 8 + length + end > size)
    if not lacking:
        return None
    end = 8 + length + max(ends.values())
    return (
        f"truncated: {size} bytes of {end}, {len(lacking)} tensors are incomplete, the first is "
        f"{lacking[0][1]}"
    )
