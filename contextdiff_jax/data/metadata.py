"""Metadata tables row by row: JSON lines, `.csv` and `.parquet`, as Hugging Face's imagefolder has
them.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from contextdiff_jax.runtime.errors import one_line
from contextdiff_jax.runtime.texts import check_text, numbered_lines, open_text, parse_json


@dataclasses.dataclass(frozen=True)
class Fields:
    """A row of a table.

    Attributes:
        number: its line, or row, from 1.
        fields: by name; or why it can't be read.
        size: characters of the row, where it is a line.
        zeros: those of them that are NUL: a disk that failed leaves runs of them.
        lost: lines that the row has swallowed.
    """

    number: int
    fields: dict[str, Any] | ValueError
    size: int = 0
    zeros: int = 0
    lost: int = 0


def rows_of(path: pathlib.Path) -> Iterator[Fields]:
    """The rows of a metadata file, read by its ending; ValueError for one that can't be read."""
    return {".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower(), _json_rows)(path)


def _json_rows(path: pathlib.Path) -> Iterator[Fields]:
    for number, line in numbered_lines(path):
        try:
            fields = parse_json(check_text(line))
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            fields = error
        yield Fields(number, fields, len(line), line.count("\0"))


def _csv_rows(path: pathlib.Path) -> Iterator[Fields]:
    """Cells are text; an empty one is no value."""
    with open_text(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        header, before = None, 0
        while True:
            try:
                cells = next(reader)
                if not cells:
                    before = reader.line_num
                    continue
                if header is None:
                    header, before = cells, reader.line_num
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{len(cells)} cells; the header has {len(header)}")
                fields = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            except StopIteration:
                return
            except csv.Error as error:
                fields = ValueError(f"not CSV ({error})")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not {error.encoding} ({error.reason})") from None
            except ValueError as error:
                fields = error
            lost = reader.line_num - before if isinstance(fields, ValueError) else 0
            yield Fields(before + 1, fields, lost=lost)
            before = reader.line_num


def _parquet_rows(path: pathlib.Path) -> Iterator[Fields]:
    import pyarrow  # here: it takes a second that other tables need not spend
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Fields(number, {k: v for k, v in row.items() if v is not None})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise ValueError(f"{path}: no Parquet file that can be read ({reason})") from None
