"""Folders of pictures and their metadata: forms of tables, what is broken, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from conftest import one_line
from PIL import Image
from small_data import write_folder

from contextdiff_jax.data import (
    DataConfig,
    FolderConfig,
    FolderSource,
    ShapesConfig,
    ShapesSource,
    load_tokenizer,
    make_source,
)
from contextdiff_jax.data.folder import load_image
from contextdiff_jax.data.identity import identity
from contextdiff_jax.data.records import find_files
from contextdiff_jax.runtime.texts import read_lines


def test_folder_records_hold_picture_caption_and_other_fields(tmp_path):
    write_folder(tmp_path)
    source = FolderSource(FolderConfig(path=str(tmp_path), image_size=4))
    assert len(source) == 10 and source.num_broken == 0
    record = source[3]
    assert record["caption"] == "grey 3" and record["attributes"] == {"level": 30}
    np.testing.assert_array_equal(record["image"], np.full((4, 4, 3), 30, np.uint8))


def test_broken_lines_are_skipped_counted_and_logged_with_their_place(tmp_path, caplog):
    lines = [
        "{",
        "[1]",
        '{"text": "x"}',
        '{"file_name": "images/0.png"}',
        '{"file_name": "no.png", "text": "x"}',
    ]
    write_folder(tmp_path, lines=["", *lines])
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        source = FolderSource(
            FolderConfig(path=str(tmp_path), image_size=4, max_broken_fraction=0.5)
        )
    assert len(source) == 10 and source.num_broken == 5
    for number, reason in zip(
        range(12, 17),
        ("not JSON", "not a JSON object", "'file_name'", "'text'", "no.png"),
        strict=True,
    ):
        assert any(f"metadata.jsonl:{number}: " in m and reason in m for m in caplog.messages)
    assert any("5 of 15" in m for m in caplog.messages)


def test_at_most_twenty_broken_lines_are_logged(tmp_path, caplog):
    write_folder(tmp_path, lines=["{"] * 30)
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        FolderSource(FolderConfig(path=str(tmp_path), max_broken_fraction=1.0))
    assert sum("not JSON" in m for m in caplog.messages) == 20


def test_too_many_broken_lines_stop_the_run(tmp_path):
    write_folder(tmp_path, lines=["{"])
    with pytest.raises(ValueError) as error:
        FolderSource(FolderConfig(path=str(tmp_path), max_broken_fraction=0.05))
    assert "1 of 11" in one_line(error) and "max_broken_fraction=0.05" in one_line(error)


def test_a_picture_that_fails_to_decode_is_replaced_by_the_next_good_one(tmp_path, caplog):
    write_folder(tmp_path)
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    good = (tmp_path / "images" / "5.png").read_bytes()
    (tmp_path / "images" / "5.png").write_bytes(good[: len(good) // 2])  # cut off
    source = FolderSource(FolderConfig(path=str(tmp_path), image_size=4, max_broken_fraction=0.2))
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        assert source[4]["caption"] == "grey 6"
    assert source.num_broken == 2 and sum("fails to decode" in m for m in caplog.messages) == 2
    assert source[4]["caption"] == source[5]["caption"] == "grey 6" and source.num_broken == 2


def test_too_many_pictures_that_fail_to_decode_stop_the_run(tmp_path):
    write_folder(tmp_path)
    for i in (3, 4):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no picture")
    source = FolderSource(FolderConfig(path=str(tmp_path), image_size=4, max_broken_fraction=0.1))
    with pytest.raises(ValueError) as error:
        source[3]
    assert "2 of 10" in one_line(error)


def _folder_of(path, raw: bytes, name="metadata.jsonl", pictures=("a.png", "images/b.png")):
    """A folder of these pictures and this metadata, up to every record of it broken."""
    for picture in pictures:
        (path / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path / picture)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(raw)
    return make_source(DataConfig(source="folder", path=str(path), max_broken_fraction=0.9))


A, B = '{"file_name": "a.png", "text": "x"}\n', '{"file_name": "images/b.png", "text": "y"}\n'


@pytest.mark.parametrize(
    ("raw", "captions", "num_broken"),
    [
        (("\ufeff" + A + B).encode(), ["x", "y"], 0),
        ((A + B).encode("utf-16"), ["x", "y"], 0),
        (("\n" + A + "  \n" + B).replace("\n", "\r\n").encode(), ["x", "y"], 0),
        ((A + B).replace("\n", "\r").encode(), ["x", "y"], 0),
        (A.replace('x"}', 'x\u2028\x85z"}').encode(), ["x\u2028\x85z"], 0),
        (A.replace('x"}', '\\ud83d\\ude00"}').encode(), ["\U0001f600"], 0),
        ((A.replace('x"}', 'café"}') + B).encode("cp1252"), ["y"], 1),
        ((A.replace('x"}', 'a \\ud83d"}') + B).encode(), ["y"], 1),
        ((A.replace('x"}', 'a \\u0000"}') + B).encode(), ["y"], 1),
        ((A.replace('"x"', "NaN") + B).encode(), ["y"], 1),
        ((A.replace('"x"', "7") + B).encode(), ["y"], 1),
        ((A.replace('"x"', "null") + B).encode(), ["y"], 1),
        (A.replace('"x"', '[null, "z"]').encode(), ["z"], 0),
        (("[" * 100_000 + "\n" + B).encode(), ["y"], 1),
        (B.replace("/", "\\\\").encode(), ["y"], 0),
        ((A * 2).encode(), ["x", "x"], 0),
        ((A * 4).encode() + bytes(4 * len(A)), ["x"] * 4, 4),  # a disk that failed
    ],
)
def test_text_is_read_as_people_write_it_and_what_is_none_is_counted(
    raw, captions, num_broken, tmp_path
):
    source = _folder_of(tmp_path, raw)
    assert [source[i]["caption"] for i in range(len(source))] == captions
    assert source.num_broken == num_broken


@pytest.mark.parametrize(
    ("raw", "captions", "num_broken"),
    [
        (
            '\ufefffile_name,text,n\r\na.png,"x, ""y""\nz",3\r\nimages\\b.png,é,\r\n',
            ['x, "y"\nz', "é"],
            0,
        ),
        ("file_name,text\na.png,\na.png,x,y\nimages/b.png\na.png,x\n", ["x"], 3),
        ('file_name,text\na.png,y\na.png,"x\na.png,x\na.png,x\n', ["y"], 3),
    ],
    ids=["as Excel writes it", "cells missing", "a quote that never ends"],
)
def test_csv_tables_are_read_as_hugging_face_has_them(raw, captions, num_broken, tmp_path):
    source = _folder_of(tmp_path, raw.encode(), "metadata.csv")
    assert [source[i]["caption"] for i in range(len(source))] == captions
    assert source.num_broken == num_broken


def test_parquet_tables_are_read_and_damaged_ones_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"file_name": ["a.png", "images\\b.png", "a.png"], "text": [["x"], ["é"], None]}
    table = pyarrow.table({**columns, "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "metadata.parquet")
    raw = (tmp_path / "metadata.parquet").read_bytes()
    source = _folder_of(tmp_path, raw, "metadata.parquet")
    assert [source[i]["caption"] for i in range(len(source))] == ["x", "é"]
    assert source[1]["attributes"] == {"n": 2} and source.num_broken == 1
    with pytest.raises(ValueError, match="metadata.parquet: no Parquet file") as error:
        _folder_of(tmp_path, raw[:-20], "metadata.parquet")
    one_line(error)


def test_metadata_is_found_in_the_folders_of_splits_at_absolute_paths_and_at_home(
    tmp_path, monkeypatch
):
    for split in ("train", "test"):
        line = json.dumps({"file_name": "../a.png", "text": split})
        _folder_of(tmp_path, A.encode())  # a.png
        (tmp_path / "metadata.jsonl").unlink()
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.jsonl").write_text(line)
    (tmp_path / "metadata.csv").mkdir()
    (tmp_path / "._metadata.jsonl").write_bytes(b"\0")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    config = DataConfig(source="folder", path=f"~/{tmp_path.name}")
    assert make_source(config)[0]["caption"] == "train"
    assert make_source(config, "heldout")[0]["caption"] == "test"
    for metadata in (str(tmp_path / "test/*.jsonl"), f"~/{tmp_path.name}/test/metadata.jsonl"):
        named = dataclasses.replace(config, metadata=metadata)
        assert make_source(named)[0]["caption"] == "test"


def test_prompts_and_corpora_are_read_line_by_line_or_refused_by_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\u2028here\r\n\r\n a dog \r\n".encode())
    assert read_lines(file, "--prompts_file") == ["a cat\u2028here", "a dog"]
    file.write_bytes("a cat\né\n".encode("cp1252"))
    with pytest.raises(ValueError, match="--prompts_file=.*: line 2: not UTF-8 .byte 0xe9 at 0."):
        read_lines(file, "--prompts_file")
    with pytest.raises(ValueError, match="--prompts_file=.*: cannot be read"):
        read_lines(tmp_path, "--prompts_file")
    with pytest.raises(ValueError, match=r"caption 'x .ud83d': holds a lone surrogate"):
        load_tokenizer().encode(["a", "x \ud83d"], 8)


def test_the_same_records_have_one_identity_wherever_they_lie_and_others_another(tmp_path):
    write_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "images" / "3.png", (1, 1))

    def facts(name):
        return identity(make_source(DataConfig(source="folder", path=str(tmp_path / name))))

    assert facts("a") == facts("b")
    metadata = tmp_path / "b" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("grey 3", "gray 3"))
    assert facts("a") != facts("b")
    scenes = [identity(ShapesSource(ShapesConfig(length=9, seed=seed))) for seed in (0, 0, 1)]
    assert scenes[0] == scenes[1] != scenes[2]


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(str(tmp_path / "a.png"), 8)
    assert (image[:, :4] == 255).all() and (image[:, 4:] == 0).all()


def test_pictures_are_scaled_to_the_shorter_side_and_cut_to_the_centre(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16, 0] = pixels[:, 16:32, 1] = pixels[:, 32:, 2] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(str(tmp_path / "a.png"), 8)
    assert image.shape == (8, 8, 3)
    assert (np.abs(image[:, 2:6].astype(int) - (0, 200, 0)) <= 8).all()


def test_folders_and_metadata_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.path"):
        FolderSource(FolderConfig(path=str(tmp_path / "no")))
    with pytest.raises(ValueError, match="data.metadata"):
        FolderSource(FolderConfig(path=str(tmp_path), metadata="no.jsonl"))
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        FolderSource(FolderConfig(path=str(tmp_path)))


def test_metadata_may_be_named_by_its_whole_path(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b/metadata.jsonl").write_text("")
    for pattern in (
        f"{tmp_path}/b/metadata.jsonl",
        f"{tmp_path}/b/*.jsonl",
        f"{tmp_path}/**/*.jsonl",
    ):
        found = find_files(str(tmp_path / "a"), pattern, "file")
        assert found == [tmp_path / "b/metadata.jsonl"]
    with pytest.raises(ValueError, match="data.metadata='/nowhere/x.jsonl': no such file"):
        find_files(str(tmp_path), "/nowhere/x.jsonl", "file")
