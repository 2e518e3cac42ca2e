"""Damaged files of every source: counted and skipped up to a share, never a crash or a hang, never
passed on.
"""

from __future__ import annotations

import collections
import itertools
import pathlib

import numpy as np
import pytest

from contextdiff_jax.benchmarks.source_layouts import LAYOUTS, make_pictures
from contextdiff_jax.data import DataConfig, make_loader, make_source

PICTURES = make_pictures(12, 24, 32)
FILES = {
    "folder": "metadata.jsonl",
    "jpeg": "images/*.jpg",
    "webdataset": "*.tar",
    "tfds": "**/*.array_record*",
}
TRIALS = {"folder": 70, "jpeg": 70, "webdataset": 100, "tfds": 40}


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One of: cut off, a few bytes flipped, a run of bytes overwritten, a run of bytes left out."""
    data, kind = bytearray(content), rng.integers(4)
    start = int(rng.integers(len(data)))
    end = start + int(rng.integers(1, max(2, len(data) // 4)))
    if kind == 0:
        del data[start:]
    elif kind == 1:
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] ^= int(rng.integers(1, 256))
    elif kind == 2:
        data[start:end] = rng.bytes(len(data[start:end]))
    else:
        del data[start:end]
    return bytes(data)


def _read_all(source: str, path: str, limit: float) -> tuple[list[dict], int] | str:
    """(one epoch's records, number of broken ones), or the one line of a source that refuses."""
    try:
        data = make_source(
            DataConfig(source=source, path=path, image_size=8, max_broken_fraction=limit)
        )
        return [data[i] for i in range(len(data))], data.num_broken
    except ValueError as error:
        assert "\n" not in str(error) and path in str(error)
        return str(error)


@pytest.mark.parametrize("kind", FILES)
def test_mutated_files_are_counted_and_skipped_or_refused_in_one_line(kind, tmp_path):
    """280 trials over the four kinds of files: what is given out is always a whole record."""
    source = "folder" if kind == "jpeg" else kind
    LAYOUTS[source](tmp_path, PICTURES)
    captions, rng = {caption for _, caption in PICTURES}, np.random.default_rng(5)
    pristine = {
        record["caption"]: record["image"] for record in _read_all(source, str(tmp_path), 0.0)[0]
    }
    outcomes = collections.Counter()
    for _ in range(TRIALS[kind]):
        file = rng.choice(sorted(tmp_path.glob(FILES[kind])))
        content = file.read_bytes()
        file.write_bytes(_mutated(content, rng))
        result = _read_all(source, str(tmp_path), 1.0)
        if isinstance(result, str):
            outcomes["refused"] += 1
        else:
            records, broken = result
            outcomes["broken" if broken else "harmless"] += 1
            for record in records:
                assert record["image"].shape == (8, 8, 3) and record["image"].dtype == np.uint8
                assert type(record["caption"]) is str
            if kind == "tfds":  # its checksums find every change
                assert all(
                    (record["image"] == pristine[record["caption"]]).all() for record in records
                )
            if kind == "jpeg":
                assert {record["caption"] for record in records} <= captions
            if broken:
                assert "max_broken_fraction=0.0 allows 0" in _read_all(source, str(tmp_path), 0.0)
        file.write_bytes(content)
    print(kind, dict(outcomes))
    assert outcomes["broken"] + outcomes["refused"] >= TRIALS[kind] // 4
    assert {r["caption"]: r["image"].sum() for r in _read_all(source, str(tmp_path), 0.0)[0]} == {
        caption: image.sum() for caption, image in pristine.items()
    }


def test_a_bad_tar_header_loses_its_record_only(tmp_path):
    LAYOUTS["webdataset"](tmp_path, PICTURES)
    (shard,) = tmp_path.glob("*.tar")
    data = bytearray(shard.read_bytes())
    for member in (b"000000000.jpg", b"000000005.jpg"):
        data[data.index(member) + 100] ^= 0x55  # the mode: the checksum no longer holds
    shard.write_bytes(data)
    source = make_source(
        DataConfig(source="webdataset", path=str(tmp_path), max_broken_fraction=0.5)
    )
    captions = {source[i]["caption"] for i in range(len(source))}
    assert captions == {caption for _, caption in PICTURES} - {
        "picture number 0",
        "picture number 5",
    }
    assert source.num_broken == 4  # the header, and the record that lacks its picture, twice


def test_a_shard_that_is_cut_off_keeps_what_is_whole(tmp_path):
    LAYOUTS["webdataset"](tmp_path, PICTURES, per_shard=6)
    shard = tmp_path / "00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: data.index(b"000000009.jpg") + 600])
    records, num_broken = _read_all("webdataset", str(tmp_path), 0.3)
    assert [r["caption"] for r in records] == [f"picture number {i}" for i in range(9)]
    assert num_broken == 3  # what the other shard has more, not only the one that was cut
    assert "3 of 12 records are broken" in _read_all("webdataset", str(tmp_path), 0.2)


def test_a_flipped_bit_in_an_array_record_loses_that_record_only(tmp_path):
    LAYOUTS["tfds"](tmp_path, PICTURES)
    (file,) = tmp_path.glob(FILES["tfds"])
    data = bytearray(file.read_bytes())
    data[data.index(PICTURES[4][0][-200:-100])] ^= 1
    file.write_bytes(data)
    records, num_broken = _read_all("tfds", str(tmp_path), 0.1)
    assert num_broken == 1
    assert {record["attributes"]["number"] for record in records} == {*range(12)} - {4}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_counts_the_broken_records_of_all_its_workers(tmp_path, num_workers):
    LAYOUTS["folder"](tmp_path, PICTURES)
    for number in (2, 7):
        path = pathlib.Path(tmp_path, "images", f"{number}.jpg")
        path.write_bytes(path.read_bytes()[:300])

    def epoch(limit):
        source = make_source(
            DataConfig(source="folder", path=str(tmp_path), image_size=8, max_broken_fraction=limit)
        )
        loader = make_loader(source, batch_size=2, num_workers=num_workers)
        try:
            captions = itertools.chain(*(next(loader)["caption"] for _ in range(6)))
            return collections.Counter(captions), loader.num_broken
        finally:
            loader.close()

    counts, num_broken = epoch(0.2)
    assert num_broken == 2
    # The next good record takes a broken one's place.
    assert counts == {PICTURES[n][1]: 2 if n in (3, 8) else 1 for n in range(12) if n not in (2, 7)}
    # Each worker alone stays under the limit of one in twelve; together they don't.
    with pytest.raises(ValueError, match="2 of 12 records are broken"):
        epoch(0.1)
