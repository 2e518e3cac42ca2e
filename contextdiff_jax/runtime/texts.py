"""Text as other programs write it: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with
one; JSON in it.

What is no text is told, with its place; nothing is ever replaced by U+FFFD. A file's lines end at
\\n, \\r\\n or \\r only: U+2028 and its like are part of a caption.
"""

from __future__ import annotations

import codecs
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

_MARKS = {  # the marks of UTF-32 begin with those of UTF-16: they are asked for first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_POINTER = b"version https://git-lfs"


def _encoding(start: bytes) -> str:
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


def check_text(text: str) -> str:
    """The text; ValueError with the reason if it holds what no text does: lone surrogates, NUL."""
    place = text.find("\0")
    if place >= 0:
        raise ValueError(f"holds NUL at {place}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that does not decode
            raise ValueError(f"not UTF-8 (byte 0x{code - 0xDC00:02x} at {error.start})") from None
        raise ValueError(f"holds a lone surrogate (\\u{code:04x} at {error.start})") from None
    return text


def decode_text(data: bytes) -> str:
    """The text of some bytes, without its byte order mark; ValueError with the reason if they are
    none.
    """
    encoding = _encoding(data)
    try:
        return check_text(data.decode(encoding))
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"not {name} (byte 0x{data[error.start]:02x} at {error.start})") from None


def open_text(path: str | pathlib.Path, newline: str | None = None) -> TextIO:
    """A text file to read. Bytes that do not decode become surrogates, which `check_text` refuses,
    so that they spoil their own line only. ValueError for a file that can't be read.
    """
    try:
        with open(path, "rb") as file:
            encoding = _encoding(file.read(4))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    # UTF-16 has lone surrogates of its own, which pass and are then refused the same.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    return open(path, encoding=encoding, errors=errors, newline=newline)


def numbered_lines(path: str | pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of the lines that are not blank, unchecked."""
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.removesuffix("\n")
        except UnicodeDecodeError as error:  # UTF-16 that is cut off
            raise ValueError(f"{path}: not {error.encoding} ({error.reason})") from None


def read_lines(path: str | pathlib.Path, name: str) -> list[str]:
    """The lines of a text file that are not blank, without the blanks around them.

    Raises:
        ValueError: for a file that can't be read, or a line that is no text; `name` is the option
            that named the file.
    """
    path, lines = os.path.expanduser(path), []
    try:
        for number, line in numbered_lines(path):
            try:
                lines.append(check_text(line.strip()))
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}; must be UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{name}={error}") from None
    return lines


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError with the reason, in one line, if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (nested too deeply)") from None


def pointer_problem(content: bytes) -> str | None:
    """Says that a file which begins so is what a clone without Git LFS has in place of a large
    one; else None.
    """
    if not content.startswith(_POINTER):
        return None
    return "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"


def read_content(path: pathlib.Path, expected: str) -> bytes:
    """The bytes of a file; ValueError, with what was `expected`, if it isn't there, can't be read,
    is blank or a pointer of Git LFS.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected {expected}") from None
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); expected {expected}") from None
    if not content.strip():
        raise ValueError(f"{path}: is empty (0 bytes)")
    if problem := pointer_problem(content):
        raise ValueError(f"{path}: is {problem}")
    return content


def read_object(path: pathlib.Path, expected: str) -> dict[str, Any]:
    """The JSON object in a UTF-8 file; ValueError, with what was `expected`, if there is none."""
    content = read_content(path, expected)
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object; expected {expected}")
    return values


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """The captions of --prompt and --prompts_file. ValueError if there are none, or one is blank or
    no Unicode.
    """
    prompts = [*given, *(read_lines(file, "--prompts_file") if file else [])]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(
            "--prompt: the list is empty; give at least one, as in --prompt='a large red circle'"
        )
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
            raise ValueError(f"--prompt={prompt!a}: is not UTF-8") from None
    return prompts
