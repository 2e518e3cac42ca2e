"""Sources, the tokenizer, and the loader."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from conftest import command
from PIL import Image

from contextdiff_jax.data import (
    DataConfig,
    FolderConfig,
    FolderSource,
    ShapesConfig,
    ShapesSource,
    load_tokenizer,
    make_loader,
    make_source,
    train_tokenizer,
)
from contextdiff_jax.data.folder import load_image
from contextdiff_jax.data.identity import identity
from contextdiff_jax.data.records import find_files
from contextdiff_jax.data.shapes import (
    COLOURS,
    SHAPES,
    SIZES,
)
from contextdiff_jax.runtime.texts import read_lines

TRIPLES = set(itertools.product(SHAPES, COLOURS, SIZES))


def _one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------- folder


def _write_folder(path, count=10, lines=()):
    """`count` good records, whose pictures are grey of level 10 * i, then `lines`."""
    (path / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        Image.new("RGB", (12, 8), (10 * i,) * 3).save(path / "images" / f"{i}.png")
        records.append(
            json.dumps({"file_name": f"images/{i}.png", "text": f"grey {i}", "level": 10 * i})
        )
    (path / "metadata.jsonl").write_text("\n".join([*records, *lines]) + "\n")


def test_folder_records_hold_picture_caption_and_other_fields(tmp_path):
    _write_folder(tmp_path)
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
    _write_folder(tmp_path, lines=["", *lines])
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
    _write_folder(tmp_path, lines=["{"] * 30)
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        FolderSource(FolderConfig(path=str(tmp_path), max_broken_fraction=1.0))
    assert sum("not JSON" in m for m in caplog.messages) == 20


def test_too_many_broken_lines_stop_the_run(tmp_path):
    _write_folder(tmp_path, lines=["{"])
    with pytest.raises(ValueError) as error:
        FolderSource(FolderConfig(path=str(tmp_path), max_broken_fraction=0.05))
    assert "1 of 11" in _one_line(error) and "max_broken_fraction=0.05" in _one_line(error)


def test_a_picture_that_fails_to_decode_is_replaced_by_the_next_good_one(tmp_path, caplog):
    _write_folder(tmp_path)
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    good = (tmp_path / "images" / "5.png").read_bytes()
    (tmp_path / "images" / "5.png").write_bytes(good[: len(good) // 2])  # cut off
    source = FolderSource(FolderConfig(path=str(tmp_path), image_size=4, max_broken_fraction=0.2))
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        assert source[4]["caption"] == "grey 6"
    assert source.num_broken == 2 and sum("fails to decode" in m for m in caplog.messages) == 2
    assert source[4]["caption"] == source[5]["caption"] == "grey 6" and source.num_broken == 2


def test_too_many_pictures_that_fail_to_decode_stop_the_run(tmp_path):
    _write_folder(tmp_path)
    for i in (3, 4):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no picture")
    source = FolderSource(FolderConfig(path=str(tmp_path), image_size=4, max_broken_fraction=0.1))
    with pytest.raises(ValueError) as error:
        source[3]
    assert "2 of 10" in _one_line(error)


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
    _one_line(error)


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
    _write_folder(tmp_path / "a")
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


# -------------------- tokenizer


def test_rows_are_bos_tokens_eos_padding():
    ids, mask = load_tokenizer().encode(["a small red circle", ""], 10)
    assert ids.shape == mask.shape == (2, 10) and ids.dtype == np.int32 and mask.dtype == bool
    assert ids[0, 0] == 1 and ids[0, 5] == 2 and (ids[0, 1:5] > 2).all() and (ids[0, 6:] == 0).all()
    assert ids[1].tolist() == [1, 2] + [0] * 8
    np.testing.assert_array_equal(mask.sum(1), [6, 2])


def test_long_captions_are_cut_and_still_end():
    tokenizer = load_tokenizer()
    ids, mask = tokenizer.encode(["a small red circle left of a large blue square"], 5)
    assert mask.all() and ids[0, -1] == 2
    full, _ = tokenizer.encode(["a small red circle"], 6)
    np.testing.assert_array_equal(ids[0, :4], full[0, :4])


def test_the_bundled_tokenizer_has_one_token_a_word_of_scene_captions_and_knows_any_text():
    tokenizer = load_tokenizer()
    assert tokenizer.vocab_size == 4096
    texts = [ShapesSource(ShapesConfig(split="all"))[i]["caption"] for i in range(200)]
    _, mask = tokenizer.encode(texts, 64)
    words = [len(text.replace(",", " ,").split()) for text in texts]
    np.testing.assert_array_equal(mask.sum(1), np.add(words, 2))
    odd = ["zebra über 日本 🙂", "x < y <eos> <pad>"]
    ids, mask = tokenizer.encode(odd, 64)
    assert tokenizer.decode(ids) == odd
    np.testing.assert_array_equal((ids == 2).sum(1), 1)  # "<eos>" in a caption ends nothing
    np.testing.assert_array_equal(mask, np.arange(64) <= ids.argmin(1, keepdims=True) - 1)


def test_case_and_white_space_do_not_count():
    ids, _ = load_tokenizer().encode(["A Red\n circle ", "a red circle"], 8)
    np.testing.assert_array_equal(ids[0], ids[1])


def test_a_pickled_tokenizer_is_the_same():
    tokenizer = load_tokenizer()
    texts = ["a red circle", "<eos> in a text"]
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode(texts, 16)[0], tokenizer.encode(texts, 16)[0])


def test_the_command_trains_a_tokenizer_that_loads(tmp_path):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "tokenizer.json"
    corpus.write_text("a red circle\na blue circle\n" * 20)
    result = command("train_tokenizer", f"--corpus={corpus}", f"--out={out}", "--vocab_size=270")
    tokenizer = load_tokenizer(out)
    assert 259 < tokenizer.vocab_size <= 270 and f"{tokenizer.vocab_size} tokens" in result.stdout
    assert tokenizer.decode(tokenizer.encode(["a red circle"], 16)[0]) == ["a red circle"]


def test_bad_tokenizer_input_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    for path in (tmp_path / "no.json", tmp_path / "bad.json"):
        with pytest.raises(ValueError) as error:
            load_tokenizer(path)
        assert _one_line(error).startswith(f"tokenizer={path}")
    with pytest.raises(ValueError, match="max_length=1"):
        load_tokenizer().encode(["a"], 1)
    with pytest.raises(ValueError, match="not one string"):
        load_tokenizer().encode("a", 4)
    assert train_tokenizer(["a b"], 300).token_to_id("<eos>") == 2


# -------------------- loader


class Numbers:
    """Record i is a picture of i, so that batches tell which records they hold."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": np.full((2, 2, 3), index, np.uint8), "caption": f"number {index}"}


def _take(loader, count: int) -> list[dict]:
    return [next(loader) for _ in range(count)]


def _numbers(batches) -> np.ndarray:
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])


def _assert_equal(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() and a["caption"] == b["caption"]
        for name in a.keys() - {"caption"}:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_loader_goes_on_with_the_very_next_batch(num_workers):
    options = {"batch_size": 4, "seed": 3, "tokenizer": load_tokenizer(), "max_length": 8}
    source = ShapesSource(ShapesConfig(image_size=16, length=50))
    loader = make_loader(source, num_workers=num_workers, **options)
    _take(loader, 3)
    state = json.loads(json.dumps(loader.get_state()))
    # Past the end of the first epoch: the states of both shuffles count.
    expected = _take(loader, 12)
    loader.set_state(state)  # in place, also after more was read
    _assert_equal(_take(loader, 2), expected[:2])
    loader.close()
    restored = make_loader(source, num_workers=2 - num_workers, **options)
    restored.set_state(state)
    _assert_equal(_take(restored, 12), expected)
    restored.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_have_the_contracts_shapes_and_types(num_workers):
    source = ShapesSource(ShapesConfig(image_size=16, length=20))
    loader = make_loader(
        source, batch_size=4, num_workers=num_workers, tokenizer=load_tokenizer(), max_length=24
    )
    batch = next(loader)
    loader.close()
    shapes = {name: (type(v), v.shape, v.dtype) for name, v in batch.items() if name != "caption"}
    assert shapes == {
        "image": (np.ndarray, (4, 16, 16, 3), np.uint8),
        "token_ids": (np.ndarray, (4, 24), np.int32),
        "token_mask": (np.ndarray, (4, 24), bool),
    }
    assert isinstance(batch["caption"], list)
    ids, mask = load_tokenizer().encode(batch["caption"], 24)
    np.testing.assert_array_equal(batch["token_ids"], ids)
    np.testing.assert_array_equal(batch["token_mask"], mask)


def test_each_epoch_shows_every_record_once_in_another_order():
    numbers = _numbers(_take(make_loader(Numbers(30), batch_size=6), 15)).reshape(3, 30)
    assert all(sorted(epoch) == list(range(30)) for epoch in numbers)
    assert len({tuple(epoch) for epoch in numbers}) == 3
    assert tuple(numbers[0]) != tuple(range(30))


def test_epochs_are_joined_without_dropping_records():
    numbers = _numbers(_take(make_loader(Numbers(10), batch_size=4), 5))
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))


def test_the_seed_decides_the_order():
    first, same, other = (
        _numbers(_take(make_loader(Numbers(100), batch_size=10, seed=s), 5)) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_processes_share_each_global_batch_in_order():
    whole = _take(make_loader(Numbers(30), batch_size=8, seed=5), 6)
    shares = [
        _take(make_loader(Numbers(30), batch_size=8, seed=5, process_index=p, process_count=4), 6)
        for p in range(4)
    ]
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(
            _numbers([share[step] for share in shares]), _numbers([batch])
        )


def test_the_state_does_not_depend_on_the_number_of_processes():
    one = make_loader(Numbers(30), batch_size=4, process_index=0, process_count=2)
    _take(one, 3)
    whole = make_loader(Numbers(30), batch_size=4)
    whole.set_state(one.get_state())
    np.testing.assert_array_equal(_numbers([next(whole)])[:2], _numbers([next(one)]))


def test_the_state_of_another_run_is_refused():
    state = make_loader(Numbers(30), batch_size=4, seed=1).get_state()
    for source, options in (
        (Numbers(31), {}),
        (Numbers(30), {"batch_size": 8}),
        (Numbers(30), {"seed": 2}),
    ):
        loader = make_loader(source, **{"batch_size": 4, "seed": 1, **options})
        with pytest.raises(ValueError) as error:
            loader.set_state(state)
        assert "the saved data state has" in _one_line(error)


def test_bad_loader_options_are_refused():
    for options, field in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5"),
        ({"batch_size": 4, "process_count": 2, "process_index": 2}, "process_index=2"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 4, "prefetch": 0}, "prefetch=0"),
    ):
        with pytest.raises(ValueError) as error:
            make_loader(Numbers(10), **options)
        assert field in _one_line(error)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_with_too_many_broken_pictures_stops_the_loader(tmp_path, num_workers):
    _write_folder(tmp_path)
    for i in range(5):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no picture")
    source = FolderSource(FolderConfig(path=str(tmp_path), image_size=4, max_broken_fraction=0.2))
    loader = make_loader(source, batch_size=5, num_workers=num_workers)
    with pytest.raises(Exception, match="max_broken_fraction=0.2"):
        _take(loader, 4)
    loader.close()


# -------------------- sources


def test_sources_are_made_by_name(tmp_path):
    _write_folder(tmp_path)
    (tmp_path / "metadata.jsonl").rename(tmp_path / "metadata_train.jsonl")
    first = (tmp_path / "metadata_train.jsonl").read_text().splitlines()[0]
    (tmp_path / "metadata_test.jsonl").write_text(first)
    emoji = DataConfig(source="emoji", path=str(tmp_path), image_size=8)
    lengths = {split: len(make_source(emoji, split)) for split in ("train", "heldout", "all")}
    assert lengths == {"train": 10, "heldout": 1, "all": 11}
    folder = DataConfig(
        source="folder", path=str(tmp_path), metadata="metadata_test.jsonl", image_size=8
    )
    assert len(make_source(folder)) == 1 and make_source(folder)[0]["image"].shape == (8, 8, 3)
    shapes = make_source(DataConfig(num_scenes=7, image_size=16), "heldout")
    assert len(shapes) == 7 and shapes.config.split == "heldout"


def test_unknown_sources_and_splits_are_refused_in_one_line(tmp_path):
    _write_folder(tmp_path)
    for config, split, words in (
        (
            DataConfig(source="emojis"),
            "train",
            "data.source='emojis': unknown; one of shapes, folder, emoji",
        ),
        (DataConfig(source="folder", path=str(tmp_path)), "heldout", "data.heldout_metadata"),
        (DataConfig(source="folder"), "train", "data.path=''"),
        (DataConfig(), "test", "split='test'"),
    ):
        with pytest.raises(ValueError) as error:
            make_source(config, split)
        assert words in _one_line(error)


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
