"""Sources of encoded pictures: webdataset and tfds beside folder; decoding, captions, crops, the
cache.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from contextdiff_jax.benchmarks.source_layouts import LAYOUTS, make_pictures
from contextdiff_jax.data import (
    DataConfig,
    WebDatasetConfig,
    WebDatasetSource,
    make_loader,
    make_source,
)
from contextdiff_jax.data import webdataset as webdataset_module
from contextdiff_jax.data.decoding import UNDECODABLE, decode, open_picture, picture_size, shown
from contextdiff_jax.data.kept_arrays import kept_array
from contextdiff_jax.data.records import captions_of

PICTURES = make_pictures(30, 48, 64)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same 30 pictures in each layout: {source name: folder}."""
    root = tmp_path_factory.mktemp("layouts")
    return {name: str(write(root / name, PICTURES)) for name, write in LAYOUTS.items()}


def _tar(path, members) -> None:
    """A shard of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _encoded(pixels, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind)
    return file.getvalue()


# -------------------- the contract, for every layout


def test_every_layout_gives_the_same_records(layouts):
    tables = {}
    for name, path in layouts.items():
        source = make_source(DataConfig(source=name, path=path, image_size=32))
        assert len(source) == 30 and source.num_broken == 0
        records = [source[i] for i in range(30)]
        for record in records:
            assert record["image"].dtype == np.uint8 and record["image"].shape == (32, 32, 3)
            assert type(record["caption"]) is str and type(record["attributes"]["number"]) is int
        tables[name] = {
            r["attributes"]["number"]: (r["caption"], r["image"].tobytes()) for r in records
        }
        assert {number: caption for number, (caption, _) in tables[name].items()} == {
            i: PICTURES[i][1] for i in range(30)
        }
    assert tables["folder"] == tables["webdataset"] == tables["tfds"]


def test_tfds_reads_without_tensorflow(layouts):
    program = (
        "import sys; from contextdiff_jax.data import DataConfig, make_loader, make_source; "
        f"source = make_source(DataConfig(source='tfds', path={layouts['tfds']!r})); "
        "batch = next(make_loader(source, batch_size=4)); assert len(batch['caption']) == 4; "
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", ["webdataset", "tfds"])
def test_a_pickled_source_reads_the_same_and_carries_no_index(layouts, name):
    source = make_source(DataConfig(source=name, path=layouts[name], image_size=16))
    source[0]
    data = pickle.dumps(source)
    assert len(data) < 20_000
    np.testing.assert_array_equal(pickle.loads(data)[7]["image"], source[7]["image"])


@pytest.mark.parametrize("name", ["webdataset", "tfds"])
def test_workers_give_the_same_batches_as_threads(layouts, name):
    config = DataConfig(source=name, path=layouts[name], image_size=16, crop="random", seed=4)
    batches = []
    for num_workers in (0, 1):
        loader = make_loader(make_source(config), batch_size=8, seed=4, num_workers=num_workers)
        batches.append([next(loader) for _ in range(3)])
        loader.close()
    for threads, workers in zip(*batches, strict=True):
        np.testing.assert_array_equal(threads["image"], workers["image"])
        assert threads["caption"] == workers["caption"]


def test_data_that_are_not_there_are_refused_in_one_line(tmp_path, layouts):
    (tmp_path / "empty").mkdir()
    _tar(tmp_path / "other" / "a.tar", [("readme.md", b"text")])
    for source, path, options, words in (
        ("webdataset", tmp_path / "no", {}, "is not a folder"),
        ("webdataset", tmp_path / "empty", {}, r"data.metadata='\*.tar': no such tar shard"),
        ("webdataset", tmp_path / "other", {}, "hold no records"),
        ("tfds", tmp_path / "no", {}, "is not a folder"),
        ("tfds", tmp_path / "empty", {}, "must hold one tfds data set"),
        (
            "tfds",
            layouts["tfds"],
            {"metadata": "nosplit"},
            "data.metadata='nosplit': .* has the splits train",
        ),
        (
            "folder",
            layouts["folder"],
            {"crop": "left"},
            "data.crop='left': unknown; one of centre, random",
        ),
        (
            "folder",
            layouts["folder"],
            {"caption_choice": "last"},
            "data.caption_choice='last': unknown",
        ),
    ):
        with pytest.raises(ValueError, match=words) as error:
            make_source(DataConfig(source=source, path=str(path), **options))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_damaged_description_of_a_tfds_set_is_refused_in_one_line(file, layouts, tmp_path):
    shutil.copytree(layouts["tfds"], tmp_path / "set")
    (path,) = (tmp_path / "set").rglob(file)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ValueError, match=f"{file}.* cannot be read") as error:
        make_source(DataConfig(source="tfds", path=str(tmp_path / "set")))
    assert "\n" not in str(error.value)


def test_a_split_of_tfds_is_what_its_metadata_field_names(layouts):
    part = make_source(DataConfig(source="tfds", path=layouts["tfds"], metadata="train[:20%]"))
    rest = make_source(
        DataConfig(source="tfds", path=layouts["tfds"], heldout_metadata="train[20%:]"), "heldout"
    )
    numbers = [
        {source[i]["attributes"]["number"] for i in range(len(source))} for source in (part, rest)
    ]
    assert len(part) == 6 and len(rest) == 24 and set.union(*numbers) == set(range(30))


# -------------------- webdataset's layout


def test_members_of_all_kinds_make_records_and_other_files_are_passed_over(tmp_path):
    grey = np.full((8, 8, 3), 90)
    _tar(
        tmp_path / "0.tar",
        [
            ("./a.jpg", _encoded(grey, "JPEG")),
            ("./a.txt", b" a text \n"),
            ("./a.cls", b"3"),
            # The extension begins at the first dot: no picture.
            ("sub/b.with.dots.png", _encoded(grey)),
            ("sub/b.PNG", _encoded(grey)),
            ("sub/b.txt", b"b"),
            ("c.webp", _encoded(grey, "WEBP")),
            ("c.json", b'{"caption": "from json", "n": 1}'),
            ("x" * 150 + ".png", _encoded(grey)),
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
    picture = _encoded(np.zeros((8, 8, 3)))
    for i in range(2):
        _tar(tmp_path / f"{i}.part", [(f"{i}.png", picture), (f"{i}.txt", str(i).encode())])
    (tmp_path / "all.tar").write_bytes(
        (tmp_path / "0.part").read_bytes() + (tmp_path / "1.part").read_bytes()
    )
    source = WebDatasetSource(WebDatasetConfig(path=str(tmp_path)))
    assert [source[i]["caption"] for i in range(len(source))] == ["0", "1"]


def test_records_without_picture_or_caption_are_counted_with_their_place(tmp_path, caplog):
    picture = _encoded(np.zeros((8, 8, 3)))
    _tar(
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


P, MARK = _encoded(np.full((8, 8, 3), 90)), b"\0\5\x16\7"
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
    _tar(tmp_path / "0.tar", members)
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
    _tar(tmp_path / "0.tar", [("a.jpg", P), member])
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
        _tar(tmp_path / name, members)
    shard = tmp_path / "1.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    config = WebDatasetConfig(path=str(tmp_path), max_broken_fraction=1.0)
    source = WebDatasetSource(config)
    assert least <= source.num_broken <= least + 8 and len(source) + source.num_broken >= 119
    with pytest.raises(ValueError, match=r"records are broken.*1\.tar: "):
        WebDatasetSource(dataclasses.replace(config, max_broken_fraction=0.005))


def test_a_single_shard_that_is_cut_between_members_is_not_taken_for_whole(tmp_path):
    _tar(tmp_path / "0.tar", [(f"{i}.{e}", b"x") for i in range(60) for e in ("jpg", "txt")])
    shard = tmp_path / "0.tar"
    shard.write_bytes(_cut_in_half(shard.read_bytes()))
    with pytest.raises(ValueError, match="30 of 60 records are broken.*0.tar: is cut off at byte"):
        WebDatasetSource(WebDatasetConfig(path=str(tmp_path), max_broken_fraction=0.4))


def test_compressed_shards_and_hidden_files_and_folders_are_no_shards(tmp_path):
    _tar(tmp_path / "0.tar", [("a.jpg", P), ("a.txt", b"x")])
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


# -------------------- captions and crops


def test_the_caption_field_may_hold_a_list_to_choose_from(tmp_path):
    picture = _encoded(np.zeros((8, 8, 3)))
    fields = json.dumps({"alt": ["one", "two", "three"]}).encode()
    members = [((f"{i}.png", picture), (f"{i}.json", fields)) for i in range(20)]
    _tar(tmp_path / "0.tar", [member for record in members for member in record])
    (tmp_path / "0.png").write_bytes(picture)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "alt": ["one", "two", "three"]}\n' * 20
    )
    for name in ("webdataset", "folder"):
        shared = {"source": name, "path": str(tmp_path), "caption_field": "alt"}
        first = make_source(DataConfig(**shared))
        assert {first[i]["caption"] for i in range(20)} == {"one"} and first[0]["attributes"] == {}
        chosen = make_source(DataConfig(**shared, caption_choice="random", seed=1))
        captions = [[chosen.record(i, epoch)["caption"] for i in range(20)] for epoch in (0, 1)]
        assert {*captions[0]} == {"one", "two", "three"} and captions[0] != captions[1]
        again = make_source(DataConfig(**shared, caption_choice="random", seed=1))
        assert captions[1] == [again.record(i, 1)["caption"] for i in range(20)]


def test_sequences_of_captions_in_tfds_are_found_by_their_path(tmp_path):
    from contextdiff_jax.data.tfds import TFDSConfig, TFDSSource, _decoded

    assert _decoded([b"a", np.int64(3)]) == ["a", 3]
    with pytest.raises(ValueError, match="field 'text' not UTF-8 .byte 0xe9 at 3."):
        captions_of({"text": _decoded(b"caf\xe9")}, "text")
    source = TFDSSource.__new__(TFDSSource)
    source.config, source._image, source._caption = TFDSConfig(path=""), "image", "captions/text"
    source._source = [
        {"image": b"data", "captions": {"text": [b"one", b"two"], "id": [1, 2]}, "url": b"u"}
    ]
    encoded = source.read(0)
    assert (
        encoded.captions == ["one", "two"]
        and encoded.attributes == {"url": "u"}
        and encoded.image == b"data"
    )


def test_a_random_crop_moves_over_the_longer_side_only_and_the_centre_is_the_middle():
    ramp = np.broadcast_to(np.arange(96)[None, :, None], (32, 96, 3))  # the level is the column
    data = _encoded(ramp)
    assert np.abs(decode(data, (32, 32))[:, 0, 0].astype(int) - 32).max() <= 1
    assert np.abs(decode(data, (32, 32), (0.9, 0.0))[:, 0, 0].astype(int)).max() <= 1
    assert np.abs(decode(data, (32, 32), (0.0, 1.0))[:, -1, 0].astype(int) - 95).max() <= 1


def test_random_crops_change_with_the_epoch_and_come_again_with_the_seed(tmp_path):
    (tmp_path / "0.png").write_bytes(
        _encoded(np.random.default_rng(0).integers(0, 255, (16, 160, 3)))
    )
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n')
    shared = {"source": "folder", "path": str(tmp_path), "image_size": 16, "crop": "random"}
    source = make_source(DataConfig(**shared, seed=1))
    images = [source.record(0, epoch)["image"] for epoch in range(4)]
    assert len({image.tobytes() for image in images}) == 4
    np.testing.assert_array_equal(
        make_source(DataConfig(**shared, seed=1)).record(0, 2)["image"], images[2]
    )
    assert (make_source(DataConfig(**shared, seed=2)).record(0, 2)["image"] != images[2]).any()


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 40), (63, 47), (200, 200)])
def test_pictures_of_any_shape_come_out_at_the_very_size_asked_for(size):
    for shape in ((48, 64), (64, 48), (1, 300), (300, 2), (525, 700)):
        image = decode(_encoded(np.full((*shape, 3), 77)), size)
        assert image.shape == (*size, 3) and (image == 77).all()


@pytest.mark.parametrize(("height", "width"), [(512, 512), (525, 700), (1024, 768)])
def test_reduced_jpeg_decoding_is_the_full_decoding_to_40_decibels(height, width):
    ((data, _),) = make_pictures(1, height, width, seed=height)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    side, (left, top) = (
        min(height, width),
        ((width - min(height, width)) / 2, (height - min(height, width)) / 2),
    )
    box = (left, top, left + side, top + side)
    expected = np.asarray(picture.resize((256, 256), Image.Resampling.LANCZOS, box=box)).astype(
        float
    )
    error = np.mean((decode(data, (256, 256)) - expected) ** 2)
    assert 10 * np.log10(255**2 / error) > 40


# -------------------- what a viewer shows

RED, GREEN, BLUE, GREY = (230, 20, 20), (20, 200, 20), (20, 20, 230), (128, 128, 128)
# EXIF orientation -> colours at the corners (upper left, upper right, lower left, lower right) of a
# picture that is stored as red, green, blue, grey: the table of the standard, CIPA DC-008.
CORNERS = {
    1: (RED, GREEN, BLUE, GREY),
    2: (GREEN, RED, GREY, BLUE),
    3: (GREY, BLUE, GREEN, RED),
    4: (BLUE, GREY, RED, GREEN),
    5: (RED, BLUE, GREEN, GREY),
    6: (BLUE, RED, GREY, GREEN),
    7: (GREY, GREEN, BLUE, RED),
    8: (GREEN, GREY, RED, BLUE),
}
QUARTERS = np.repeat(np.repeat(np.uint8([[RED, GREEN], [BLUE, GREY]]), 32, 0), 48, 1)  # 64 x 96


def _saved(pixels, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _corners(image) -> np.ndarray:
    return image[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_every_orientation_is_shown_upright(kind):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    for orientation, corners in CORNERS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = _saved(QUARTERS, kind, exif=exif, **options)
        height, width = (64, 96) if orientation < 5 else (96, 64)
        assert picture_size(data) == (height, width)
        viewer = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(np.asarray(shown(open_picture(data))), np.asarray(viewer))
        np.testing.assert_array_equal(decode(data, (height, width)), np.asarray(viewer))
        small = decode(data, (height // 4, width // 4))  # a JPEG is decoded at a quarter
        assert np.abs(_corners(small) - corners).max() < 12, orientation


def test_a_portrait_photograph_that_is_stored_lying_is_in_the_portrait_bucket(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(_saved(QUARTERS, "JPEG", exif=exif))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n')
    source = make_source(DataConfig(source="folder", path=str(tmp_path)))
    stale = kept_array(  # as it was kept before orientations were read
        str(tmp_path), "", "sizes", source.cache_key(), lambda: (np.uint16([[64, 96]]), {})
    )
    assert stale[0].tolist() == [[64, 96]] and source.picture_sizes().tolist() == [[96, 64]]
    assert np.abs(_corners(source.record(0, size=(48, 32))["image"]) - CORNERS[6]).max() < 12


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_picture_with_damaged_exif_is_shown_as_it_is_stored(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = _saved(QUARTERS, kind, exif=exif)
        assert picture_size(data) == (64, 96)
        assert np.abs(_corners(decode(data, (64, 96))) - CORNERS[1]).max() < 12


RAMP = (np.arange(64, dtype=np.uint16) * 1024)[None].repeat(4, 0)


@pytest.mark.parametrize(
    ("pixels", "kind", "options", "expected"),
    [
        (RAMP, "PNG", {}, RAMP >> 8),
        (RAMP, "TIFF", {}, RAMP >> 8),
        (RAMP.astype(">u2"), "TIFF", {}, RAMP >> 8),
        (RAMP, "TIFF", {"tiffinfo": {262: 0}}, (65535 - RAMP) >> 8),  # white is 0
        (RAMP, "JPEG2000", {}, RAMP >> 8),
        (RAMP, "PPM", {}, RAMP >> 8),
        (RAMP // 256, "PPM", {}, RAMP >> 16),  # dark, but of 16 bits
        (RAMP.astype(np.int32), "TIFF", {}, RAMP >> 8),
        ((RAMP >> 8).astype(np.int32), "TIFF", {}, RAMP >> 8),
        ((RAMP / 65535).astype(np.float32), "TIFF", {}, np.rint(RAMP / 257)),
        ((RAMP >> 8).astype(np.float32), "TIFF", {}, RAMP >> 8),
    ],
)
def test_deep_grey_comes_out_as_the_grey_that_it_is(pixels, kind, options, expected):
    image = decode(_saved(pixels, kind, **options), (4, 64))
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize("values", [RAMP * 1e6, RAMP / 60000, RAMP / -65535, RAMP * np.nan])
def test_grey_of_an_unknown_scale_is_refused_with_its_values(values):
    with pytest.raises(ValueError, match=r"grey values from .* must be fractions in 0..1"):
        decode(_saved(values.astype(np.float32), "TIFF"), (4, 64))


def test_every_kind_of_transparency_lies_on_white():
    grey = (RAMP >> 8).astype(np.uint8)
    clear = np.repeat((grey == 40)[..., None], 3, -1)
    alpha = np.where(grey == 40, 0, 255).astype(np.uint8)
    expected = np.where(clear, 255, grey[..., None])
    palette = Image.fromarray(grey).convert("P")
    files = [
        _saved(np.dstack([grey, alpha])),
        _saved(np.dstack([grey, grey, grey, alpha]), "WEBP", lossless=True),
        _saved(grey, transparency=40),
        _saved(np.dstack([grey] * 3), transparency=(40, 40, 40)),
        _saved(RAMP, transparency=40 << 8),
    ]
    for kind in ("PNG", "GIF"):
        file = io.BytesIO()
        palette.save(file, kind, transparency=40)
        files.append(file.getvalue())
    for data in files:
        np.testing.assert_array_equal(decode(data, (4, 64)), expected)


def test_the_limit_of_pixels_is_the_configs_and_pillows_is_off(tmp_path, monkeypatch):
    """195 million pixels, as a scanned map has, are decoded at a size near the wanted one."""
    data = _saved(np.full((13000, 15000), 90, np.uint8), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**26)  # near Pillow's own
    assert picture_size(data) == (13000, 15000) and (decode(data, (8, 8)) == 90).all()
    (tmp_path / "a.png").write_bytes(_saved(QUARTERS))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    config = DataConfig(source="folder", path=str(tmp_path), max_pixels=64 * 96)
    assert make_source(config)[0]["image"].shape == (32, 32, 3)
    small = make_source(dataclasses.replace(config, max_pixels=64 * 96 - 1))
    with pytest.raises(ValueError, match=r"96 x 64 pixels; 1 to 6143 are read \(data.max_pixels"):
        small[0]
    with pytest.raises(ValueError, match="data.max_pixels=0: must be at least 1"):
        make_source(dataclasses.replace(config, max_pixels=0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_a_picture_that_is_cut_off_is_never_given_out(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as tfds may leave it
    data = _saved(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), kind)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(UNDECODABLE):
            decode(data[: int(share * len(data))], (64, 64))


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
    _tar(tmp_path / "data" / "00001.tar", [("z.jpg", PICTURES[7][0]), ("z.txt", b"new")])
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
