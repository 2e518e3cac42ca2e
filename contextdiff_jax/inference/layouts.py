"""Folders of samples as benchmarks read them: a file of prompts in, the place of each picture out.

geneval         evaluation_metadata.jsonl -> 00000/metadata.jsonl, 00000/samples/0000.png, ...
                (Ghosh et al. 2023, github.com/djghosh13/geneval)
t2i_compbench   one prompt a line -> samples/PROMPT_000000.png, ...
                (Huang et al. 2023, github.com/Karine-Huang/T2I-CompBench)
numbered        one prompt a line -> 000000.png, ...
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from contextdiff_jax.runtime.texts import check_text, numbered_lines, parse_json, read_lines

_LONGEST = 255 - len("_000000.png.partial")  # bytes of a prompt in a file's name


class Entry(NamedTuple):
    """A prompt, and what the benchmark's file says of it."""

    prompt: str
    metadata: str = ""


class Spot(NamedTuple):
    """A picture of a list: picture `copy` of prompt `index`, number `number` of all of them."""

    prompt: str
    index: int
    copy: int
    number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A benchmark's files.

    Attributes:
      read: its file of prompts, by path; ValueError, one line, for one that isn't of its kind.
      picture: where a picture lies in the folder.
      metadata: where a prompt's metadata lies, by its index; None: nowhere.
    """

    read: Callable[[str], list[Entry]]
    picture: Callable[[Spot], str]
    metadata: Callable[[int], str] | None = None


def _read_prompts(path: str) -> list[Entry]:
    return [Entry(line) for line in read_lines(path, "--prompts_file")]


def _read_geneval(path: str) -> list[Entry]:
    """The objects of evaluation_metadata.jsonl, each as its line."""
    found, path = [], os.path.expanduser(path)
    try:
        for number, line in numbered_lines(path):
            try:
                values = parse_json(check_text(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
                raise ValueError(f"{path}: line {number}: must be an object with a text 'prompt'")
            found.append(Entry(values["prompt"], json.dumps(values)))
    except ValueError as error:
        raise ValueError(f"--prompts_file={error}") from None
    return found


def _read_compbench(path: str) -> list[Entry]:
    """The prompts, which its evaluators read off the files' names, up to the first `_`."""
    entries = [
        Entry(line.partition("\t")[0].strip()) for line in read_lines(path, "--prompts_file")
    ]
    for entry in entries:
        bad = next((sign for sign in "_/" if sign in entry.prompt), None)
        if bad or len(entry.prompt.encode()) > _LONGEST:
            why = f"{bad!r}" if bad else f"more than {_LONGEST} bytes"
            raise ValueError(
                f"--prompts_file={path}: {entry.prompt!r} holds {why}; T2I-CompBench reads prompts "
                "off the names of files"
            )
    return entries


LAYOUTS: dict[str, Layout] = {
    "numbered": Layout(read=_read_prompts, picture=lambda spot: f"{spot.number:06d}.png"),
    "geneval": Layout(
        read=_read_geneval,
        picture=lambda spot: f"{spot.index:05d}/samples/{spot.copy:04d}.png",
        metadata=lambda index: f"{index:05d}/metadata.jsonl",
    ),
    "t2i_compbench": Layout(
        read=_read_compbench,
        picture=lambda spot: f"samples/{spot.prompt}_{spot.number:06d}.png",
    ),
}


def spots(prompts: Sequence[str], num: int = 1) -> list[Spot]:
    """All pictures, `num` a prompt; a prompt's are neighbours."""
    return [
        Spot(prompt, index, copy, index * num + copy)
        for index, prompt in enumerate(prompts)
        for copy in range(num)
    ]


def write_metadata(layout: Layout, folder: pathlib.Path, entries: Sequence[Entry]) -> None:
    """Writes what the benchmark reads beside the pictures."""
    if layout.metadata is None:
        return
    for index, entry in enumerate(entries):
        file = folder / layout.metadata(index)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(entry.metadata + "\n")
