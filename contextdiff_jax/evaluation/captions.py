"""Captions of a file, drawn: always the same ones, of as many different pictures.

captions_val2014.json   as COCO publishes it: annotations[] of images[], several a picture
*.jsonl                 an object a line: `caption` (or `text`, `prompt`), perhaps `image_id`
*.txt                   a caption a line
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from contextdiff_jax.data.metadata import rows_of
from contextdiff_jax.runtime.files import replacing
from contextdiff_jax.runtime.texts import check_text, read_lines, read_object

_FIELDS = ("caption", "text", "prompt")


class Caption(NamedTuple):
    """A caption, the id of its picture, and that picture's file where it is known."""

    text: str
    image_id: int | str
    file_name: str = ""


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("has no caption")
    return check_text(value.strip())


def _of_coco(path: pathlib.Path) -> Iterator[Caption]:
    values = read_object(path, "COCO's captions")
    annotations, images = values.get("annotations"), values.get("images")
    if not isinstance(annotations, list) or not isinstance(images, list):
        raise ValueError(f"{path}: has no annotations[] and images[], as COCO's captions have")
    try:
        names = {image["id"]: image.get("file_name", "") for image in images}
        for row in sorted(annotations, key=lambda row: (row["image_id"], row["id"])):
            yield Caption(_text(row.get("caption")), row["image_id"], names[row["image_id"]])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: annotations that aren't COCO's ({error})") from None


def _of_lines(path: pathlib.Path) -> Iterator[Caption]:
    for row in rows_of(path):
        try:
            if isinstance(row.fields, ValueError):
                raise row.fields
            text = _text(next((row.fields[name] for name in _FIELDS if name in row.fields), None))
        except ValueError as error:
            names = ", ".join(_FIELDS)
            raise ValueError(f"{path}: line {row.number}: {error}; of {names}") from None
        image_id = row.fields.get("image_id", row.number - 1)
        yield Caption(text, image_id, str(row.fields.get("file_name", "")))


def _of_text(path: pathlib.Path) -> Iterator[Caption]:
    return (Caption(text, i) for i, text in enumerate(read_lines(path, "--captions")))


READERS = {".json": _of_coco, ".jsonl": _of_lines, ".txt": _of_text}


def draw_captions(path: str, seed: int = 0) -> list[Caption]:
    """One caption of each picture, in an order drawn by the seed: the first n are n draws without
    repeats. They depend on the file's content, not on its order where it has ids.

    Raises ValueError, one line, for a file without captions or of another ending than `READERS`.
    """
    file = pathlib.Path(os.path.expanduser(path))
    if file.suffix.lower() not in READERS:
        raise ValueError(f"--captions={path}: must end in one of {', '.join(READERS)}")
    pictures: dict[int | str, list[Caption]] = {}
    for caption in READERS[file.suffix.lower()](file):
        pictures.setdefault(caption.image_id, []).append(caption)
    if not pictures:
        raise ValueError(f"--captions={path}: holds no captions")
    rng, several = np.random.default_rng(seed), list(pictures.values())
    drawn = (several[i] for i in rng.permutation(len(several)))
    return [captions[rng.integers(len(captions))] for captions in drawn]


def write_captions(path: pathlib.Path, captions: list[Caption]) -> None:
    """The captions, a line each, in the order of the pictures' numbers."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for number, caption in enumerate(captions):
            values: Mapping[str, Any] = {"number": number, "caption": caption.text}
            more = {"image_id": caption.image_id, "file_name": caption.file_name}
            file.write(json.dumps({**values, **more}, ensure_ascii=False) + "\n")
