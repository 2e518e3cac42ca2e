"""Sources of encoded pictures: webdataset and tfds beside folder; their captions."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from small_data import PICTURES, encode_picture, write_tar

from contextdiff_jax.benchmarks.source_layouts import LAYOUTS
from contextdiff_jax.data import DataConfig, make_loader, make_source
from contextdiff_jax.data.records import captions_of


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same 30 pictures in each layout: {source name: folder}."""
    root = tmp_path_factory.mktemp("layouts")
    return {name: str(write(root / name, PICTURES)) for name, write in LAYOUTS.items()}


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
    assert tables["folder"] == tables["webdataset"] == tables["tfds"] == tables["huggingface"]


def test_tfds_reads_without_tensorflow(layouts):
    program = (
        "import sys; from contextdiff_jax.data import DataConfig, make_loader, make_source; "
        f"source = make_source(DataConfig(source='tfds', path={layouts['tfds']!r})); "
        "batch = next(make_loader(source, batch_size=4)); assert len(batch['caption']) == 4; "
        "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", ["webdataset", "tfds", "huggingface"])
def test_a_pickled_source_reads_the_same_and_carries_no_index(layouts, name):
    source = make_source(DataConfig(source=name, path=layouts[name], image_size=16))
    source[0]
    data = pickle.dumps(source)
    assert len(data) < 20_000
    np.testing.assert_array_equal(pickle.loads(data)[7]["image"], source[7]["image"])


@pytest.mark.parametrize("name", ["webdataset", "tfds", "huggingface"])
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
    write_tar(tmp_path / "other" / "a.tar", [("readme.md", b"text")])
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


# -------------------- captions


def test_the_caption_field_may_hold_a_list_to_choose_from(tmp_path):
    picture = encode_picture(np.zeros((8, 8, 3)))
    fields = json.dumps({"alt": ["one", "two", "three"]}).encode()
    members = [((f"{i}.png", picture), (f"{i}.json", fields)) for i in range(20)]
    write_tar(tmp_path / "0.tar", [member for record in members for member in record])
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
