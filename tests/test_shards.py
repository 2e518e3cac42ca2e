"""Shards of webdataset: their members, what is damaged in them, their index and its cache."""

from __future__ import annotations

import dataclasses
import gzip
import subprocess
import time

import numpy as np
import pytest
from small_data import PICTURES, encode_picture, write_tar

from contextdiff_jax.benchmarks.source_layouts import LAYOUTS
from contextdiff_jax.data import WebDatasetConfig, WebDatasetSource, make_loader
from contextdiff_jax.data import webdataset as webdataset_module
from contextdiff_jax.data.kept_arrays import kept_array

# -------------------- webdataset's layout


def test_members_of_all_kinds_make_records_and_other_files_are_passed_over(tmp_path):
    grey = np.full((8, 8, 3), 90)
    write_tar(
        tmp_path / "0.tar",
        [
            ("./a.jpg", encode_picture(grey, "JPEG")),
            ("./a.txt", b" a text \n"),
            ("./a.cls", b"3"),
            # The extension begins at the first dot: no picture.
            ("sub/b.with.dots.png", encode_picture(grey)),
            ("sub/b.PNG", encode_picture(grey)),
            ("sub/b.txt", b"b"),
            ("c.webp", encode_picture(grey, "WEBP")),
            ("c.json", b'{"caption": "from json", "n": 1}'),
            ("x" * 150 + ".png", encode_picture(grey)),
            ("x" * 150 + ".txt", b"long name"),
        ],
    )
    source = WebDatasetSource(WebDatasetConfig(path=str(tmp_path), image_size=8))
    assert [source[i]["caption"] for i in range(len(source))] == [
        "a text",
        "b",
        "from json",
        "long name",
    ]
    assert source[2]["attributes"] == {"n": 1} and source.num_broken == 0
    assert all(np.abs(source[i]["image"].astype(int) - 90).max() <= 2 for i in range(4))


def test_concatenated_shards_are_read_to_the_end(tmp_path):
    picture = encode_picture(np.zeros((8, 8, 3)))
    for i in range(2):
        write_tar(tmp_path / f"{i}.part", [(f"{i}.png", picture), (f"{i}.txt", str(i).encode())])
    (tmp_path / "all.tar").write_bytes(
        (tmp_path / "0.part").read_bytes() + (tmp_path / "1.part").read_bytes()
    )
    source = WebDatasetSource(WebDatasetConfig(path=str(tmp_path)))
    assert [source[i]["caption"] for i in range(len(source))] == ["0", "1"]


def test_records_without_picture_or_caption_are_counted_with_their_place(tmp_path, caplog):
    picture = encode_picture(np.zeros((8, 8, 3)))
    write_tar(
        tmp_path / "0.tar",
        [
            ("a.png", picture),
            ("a.txt", b"a"),
            ("b.png", picture),
            ("c.txt", b"c"),
            ("d.png", b""),
            ("d.txt", b"d"),
        ],
    )
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        source = WebDatasetSource(WebDatasetConfig(path=str(tmp_path), max_broken_fraction=0.8))
    assert len(source) == 1 and source.num_broken == 3
    for words in ("0.tar: byte 2048: b has no caption", "c has no picture", "3 of 4"):
        assert words in caplog.text, words


def _samples(path) -> int | str:
    """The number of samples that the package webdataset gives, or what it raises."""
    import webdataset

    try:
        return sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False))
    except ValueError as error:
        return type(error).__name__


P, MARK = encode_picture(np.full((8, 8, 3), 90)), b"\0\5\x16\7"


# name: members, captions that are given out, number of broken records
LAYOUTS_IN_THE_WILD = {
    "dots": (
        [(f"cat{i} v2.{i}{e}", c) for i in range(3) for e, c in ((".jpg", P), (".txt", b"x"))],
        ["x"] * 3,
        0,
    ),
    "dots of one key": (
        [(f"v2.{i}{e}", c) for i in range(3) for e, c in ((".jpg", P), (".txt", b"%d" % i))],
        ["0", "1", "2"],
        0,
    ),
    "more about a picture": (
        [("a.jpg", P), ("a.seg.png", P), ("a.txt", b"x"), ("a.seg.json", b"{}")],
        ["x"],
        0,
    ),
    "one picture of a longer name": ([("a.full.jpg", P), ("a.txt", b"x")], ["x"], 0),
    "two pictures, one caption": (
        [("a.0.jpg", P), ("a.1.jpg", P), ("a.txt", b"x"), ("b.jpg", P), ("b.txt", b"b")],
        ["b"],
        1,
    ),
    "a key twice": (
        [
            ("a.jpg", P),
            ("a.txt", b"x"),
            ("a.jpg", P),
            ("a.txt", b"y"),
            ("b.jpg", P),
            ("b.txt", b"b"),
        ],
        ["b"],
        2,
    ),
    "a key again": (
        [
            ("a.jpg", P),
            ("a.txt", b"x"),
            ("b.jpg", P),
            ("b.txt", b"b"),
            ("a.jpg", P),
            ("a.txt", b"y"),
        ],
        ["x", "b", "y"],
        0,
    ),
    "macOS and old tars": (
        [
            ("._a.jpg", MARK),
            ("a.jpg", P),
            ("._a.txt", MARK),
            ("a.txt", b"x"),
            ("__MACOSX/._a.jpg", MARK),
            ("PaxHeaders.9/b.jpg", b"30 m=1"),
            ("b.jpg", P),
            ("b.txt", b"b"),
        ],
        ["x", "b"],
        0,
    ),
    "a null beside a text": (
        [("a.jpg", P), ("a.json", b'{"text": null, "caption": "c"}'), ("a.txt", b"x")],
        ["x"],
        0,
    ),
    "a null beside a caption": (
        [("a.jpg", P), ("a.json", b'{"text": null, "caption": "c"}')],
        ["c"],
        0,
    ),
    "an empty text beside a caption": (
        [("a.jpg", P), ("a.json", b'{"caption": "c"}'), ("a.txt", b"")],
        ["c"],
        0,
    ),
    "an empty text": ([("a.jpg", P), ("a.txt", b"")], [""], 0),
    "upper case": (
        [("A.JPG", P), ("A.TXT", b"x"), ("B.Jpeg", P), ("B.JSON", b'{"text": [null, "j"]}')],
        ["x", "j"],
        0,
    ),
    "names that are no UTF-8": ([("caf\udce9.jpg", P), ("caf\udce9.txt", b"x")], ["x"], 0),
    "byte order marks": (
        [
            ("a.jpg", P),
            ("a.txt", b"\xef\xbb\xbfx"),
            ("b.jpg", P),
            ("b.txt", "é".encode("utf-16")),
            ("c.jpg", P),
            ("c.json", b'\xef\xbb\xbf{"text": "c"}'),
        ],
        ["x", "é", "c"],
        0,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS_IN_THE_WILD)
def test_members_make_the_samples_that_webdataset_makes_of_them(name, tmp_path):
    members, captions, num_broken = LAYOUTS_IN_THE_WILD[name]
    write_tar(tmp_path / "0.tar", members)
    config = WebDatasetConfig(path=str(tmp_path), image_size=8, max_broken_fraction=0.7)
    source = WebDatasetSource(config)
    assert [source[i]["caption"] for i in range(len(source))] == captions
    assert source.num_broken == num_broken
    # The package stops at a key that comes twice, makes one sample of all of one key, and takes
    # what old tars keep about files for samples.
    differs = {"a key twice": "ValueError", "dots of one key": 1, "macOS and old tars": 4}
    assert _samples(tmp_path / "0.tar") == differs.get(name, len(captions) + num_broken)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("a.txt", "café".encode("cp1252")), r"a.jpg\): the .txt: not UTF-8 \(byte 0xe9 at 3\)"),
        (("a.txt", b"\0\0\0"), "the .txt: holds NUL"),
        (("a.json", b'{"text": "x \\ud83d"}'), r"holds a lone surrogate \(.ud83d at 2\)"),
        (("a.json", b"[" * 100_000), "nested too deeply"),
        (("a.json", b'{"text": NaN}'), "field 'text' is no string"),
    ],
)
def test_a_caption_that_is_no_text_is_broken_and_its_record_named(member, reason, tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", P), member])
    source = WebDatasetSource(WebDatasetConfig(path=str(tmp_path), image_size=8))
    with pytest.raises(ValueError, match=reason):
        source[0]


def _cut_in_half(raw: bytes) -> bytes:
    return raw[: 30 * 2 * 1024]  # 2 members of 1 kB a record


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        (lambda raw: bytes(len(raw)), 60),
        (lambda raw: raw[: len(raw) // 2] + bytes(len(raw) // 2), 29),
        (lambda raw: b"<html>403</html>", 60),
        (lambda raw: b"<html>" + b" " * 600, 60),
        (_cut_in_half, 30),
        (lambda raw: b"", 60),
        (lambda raw: raw[:100], 60),
        (lambda raw: raw[:-10240] + b"x" * 5000, 1),
    ],
    ids=["zeros", "half zeros", "html", "long html", "cut at a header", "empty", "tiny", "tail"],
)
def test_what_a_spoilt_shard_lost_is_counted_by_its_share(spoil, least, tmp_path):
    members = [(f"{i:04}.{e}", c) for i in range(60) for e, c in (("jpg", P[:500]), ("txt", b"x"))]
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, members)
    shard = tmp_path / "1.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    config = WebDatasetConfig(path=str(tmp_path), max_broken_fraction=1.0)
    source = WebDatasetSource(config)
    assert least <= source.num_broken <= least + 8 and len(source) + source.num_broken >= 119
    with pytest.raises(ValueError, match=r"records are broken.*1\.tar: "):
        WebDatasetSource(dataclasses.replace(config, max_broken_fraction=0.005))


def test_a_single_shard_that_is_cut_between_members_is_not_taken_for_whole(tmp_path):
    write_tar(tmp_path / "0.tar", [(f"{i}.{e}", b"x") for i in range(60) for e in ("jpg", "txt")])
    shard = tmp_path / "0.tar"
    shard.write_bytes(_cut_in_half(shard.read_bytes()))
    with pytest.raises(ValueError, match="30 of 60 records are broken.*0.tar: is cut off at byte"):
        WebDatasetSource(WebDatasetConfig(path=str(tmp_path), max_broken_fraction=0.4))


def test_compressed_shards_and_hidden_files_and_folders_are_no_shards(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", P), ("a.txt", b"x")])
    (tmp_path / "._0.tar").write_bytes(MARK)
    (tmp_path / "folder.tar").mkdir()
    assert len(WebDatasetSource(WebDatasetConfig(path=str(tmp_path)))) == 1
    packed = gzip.compress((tmp_path / "0.tar").read_bytes())
    (tmp_path / "1.tar.gz").write_bytes(packed)
    with pytest.raises(ValueError, match="1.tar.gz is compressed"):
        WebDatasetSource(WebDatasetConfig(path=str(tmp_path)))
    (tmp_path / "1.tar").write_bytes(packed)
    with pytest.raises(ValueError, match=r"1.tar: is compressed \(gzip\)"):
        WebDatasetSource(WebDatasetConfig(path=str(tmp_path), shards="[01].tar"))


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_sparse_members_are_read_with_their_holes(kind, tmp_path):
    (tmp_path / "a.png").write_bytes(P)
    with open(tmp_path / "a.png", "ab") as file:
        file.truncate(300_000)
    (tmp_path / "a.txt").write_text("x")
    command = ["tar", "-S", "-H", kind, "-cf", "0.tar", "a.png", "a.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "0.tar").stat().st_size < 100_000
    source = WebDatasetSource(WebDatasetConfig(path=str(tmp_path), image_size=8))
    assert source.read(0).image == (tmp_path / "a.png").read_bytes()
    assert source[0]["caption"] == "x" and source.num_broken == 0


# -------------------- the index and the cache


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    LAYOUTS["webdataset"](tmp_path / "data", PICTURES[:6], per_shard=3)
    config = WebDatasetConfig(
        path=str(tmp_path / "data"), index_folder=str(tmp_path / "kept"), image_size=8
    )
    assert len(WebDatasetSource(config)) == 6
    assert not (tmp_path / "data" / ".contextdiff_jax").exists()

    def fail(*_):
        raise AssertionError("indexed again")

    with monkeypatch.context() as patch:
        patch.setattr(webdataset_module, "_index_shard", fail)
        assert WebDatasetSource(config)[5]["caption"] == "picture number 5"
    write_tar(tmp_path / "data" / "00001.tar", [("z.jpg", PICTURES[7][0]), ("z.txt", b"new")])
    source = WebDatasetSource(config)
    assert [source[i]["caption"] for i in range(len(source))][2:] == ["picture number 2", "new"]


@pytest.mark.parametrize("damage", ["cut", "flip", "facts", "missing"])
def test_a_damaged_index_is_made_anew(tmp_path, damage, caplog):
    LAYOUTS["webdataset"](tmp_path, PICTURES[:5])
    config = WebDatasetConfig(path=str(tmp_path), image_size=8)
    WebDatasetSource(config)
    (array,), (facts,) = (
        list((tmp_path / ".contextdiff_jax").glob(f"index-*.{kind}")) for kind in ("npy", "json")
    )
    content = bytearray(array.read_bytes())
    content[-3] ^= 1
    {
        "cut": lambda: array.write_bytes(content[:-20]),
        "flip": lambda: array.write_bytes(content),
        "facts": lambda: facts.write_text("{"),
        "missing": array.unlink,
    }[damage]()
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        source = WebDatasetSource(config)
    assert "damaged" in caplog.text and source[4]["caption"] == "picture number 4"
    caplog.clear()
    assert len(WebDatasetSource(config)) == 5 and "damaged" not in caplog.text


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError,
        match="data.index_folder='.*file': .* cannot be written .*; name a folder that can",
    ):
        kept_array(str(tmp_path), str(tmp_path / "file"), "x", "key", lambda: (np.zeros(3), {}))


def test_a_million_records_open_and_resume_within_a_second(tmp_path):
    """An index of 1 M records, as `_index` writes it, over one real shard: record i of it is record
    i % 100.
    """
    LAYOUTS["webdataset"](tmp_path, [PICTURES[i % 30] for i in range(100)])
    config = WebDatasetConfig(path=str(tmp_path), image_size=16)
    small = WebDatasetSource(config)
    entries = np.resize(small._entries, 1_000_000)
    facts, array = (
        next((tmp_path / ".contextdiff_jax").glob(f"index-*.{kind}")) for kind in ("json", "npy")
    )
    facts.unlink()
    array.unlink()
    kept_array(
        str(tmp_path),
        "",
        "index",
        small.cache_key(),
        lambda: (entries, {"num_broken": 0, "reasons": []}),
    )
    start = time.process_time()
    loader = make_loader(WebDatasetSource(config), batch_size=8, seed=1)
    loader.set_state({"seed": 1, "batch_size": 8, "num_records": 1_000_000, "next_batch": 170_003})
    batch = next(loader)
    seconds = time.process_time() - start
    print(f"{seconds:.3f} s of CPU")
    assert seconds < 1
    loader.close()
    assert loader._load.source._entries.shape == (1_000_000,) and len(batch["caption"]) == 8
