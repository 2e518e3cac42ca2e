"""The files that the page keeps while it runs, and removes when it stops."""

from __future__ import annotations

import pathlib
import threading
import uuid

from contextdiff_jax.demo_page.limits import MAX_KEPT


class Album:
    """A folder of pictures under names that can't be guessed, the oldest of which go first."""

    def __init__(self, folder: pathlib.Path, most: int = 500):
        self.folder, self._most = folder, most
        self._names: list[pathlib.Path] = []
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, png: bytes) -> str:
        """Writes the picture and returns its path."""
        path = self.folder / f"{uuid.uuid4().hex}.png"
        path.write_bytes(png)
        with self._lock:
            self._names.append(path)
            old = self._names[: -self._most]
            del self._names[: -self._most]
        for gone in old:
            gone.unlink(missing_ok=True)
        return str(path)


def is_full(folder: pathlib.Path, most: int = MAX_KEPT) -> bool:
    """Whether the files below the folder are too many bytes for another upload."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # removed meanwhile
            continue
    return total > most
