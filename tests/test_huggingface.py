"""`data.source=huggingface`: Parquet and Arrow, in a folder and on a hub on loopback."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import one_line
from loopback_hub import point_to, serving
from small_data import PICTURES, encode_picture

from contextdiff_jax.benchmarks.source_layouts import write_folder, write_parquet
from contextdiff_jax.data import DataConfig, make_loader, make_source
from contextdiff_jax.data.identity import identity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 records of training in three files, six of a test split."""
    path = tmp_path_factory.mktemp("parquet")
    write_parquet(path, PICTURES[:24], per_file=10)
    return write_parquet(path, PICTURES[24:], "test")


def config_of(path, **fields) -> DataConfig:
    return DataConfig(source="huggingface", path=str(path), image_size=16, **fields)


def captions(source) -> list[str]:
    return [source[i]["caption"] for i in range(len(source))]


def test_splits_are_those_of_the_files_and_metadata_names_another_or_a_part(folder):
    config = config_of(folder)
    assert config.kind.splits(config) == ("train", "heldout")
    assert captions(make_source(config)) == [caption for _, caption in PICTURES[:24]]
    assert captions(make_source(config, "heldout")) == [caption for _, caption in PICTURES[24:]]
    for name, rows in (
        ("train[:25%]", range(6)),
        ("train[-2:]", (22, 23)),
        ("test", range(24, 30)),
    ):
        part = make_source(config_of(folder, metadata=name))
        assert captions(part) == [PICTURES[i][1] for i in rows], name


def test_batches_are_those_of_a_folder_in_all_processes_and_after_a_restart(folder, tmp_path):
    """The order is of record numbers alone, which the folder's are too."""
    write_folder(tmp_path / "plain", PICTURES[:24])
    plain = DataConfig(source="folder", path=str(tmp_path / "plain"), image_size=16)
    options = dict(batch_size=8, seed=5)
    wanted = make_loader(make_source(plain), **options)
    whole = [next(wanted) for _ in range(5)]  # into the second epoch
    source = make_source(config_of(folder))
    for process in (0, 1):
        share = dict(process_index=process, process_count=2, **options)
        loader = make_loader(source, **share)
        made = [next(loader) for _ in range(2)]
        again = make_loader(make_source(config_of(folder)), **share)
        again.set_state(loader.get_state())
        made += [next(again) for _ in range(3)]
        rows = slice(4 * process, 4 * process + 4)
        for one, all_of_it in zip(made, whole, strict=True):
            assert one["caption"] == all_of_it["caption"][rows]
            np.testing.assert_array_equal(one["image"], all_of_it["image"][rows])
    wanted.close()


def test_a_name_of_the_hub_is_downloaded_and_keeps_nothing_beside_the_project(
    folder, tmp_path, monkeypatch
):
    import datasets

    monkeypatch.chdir(tmp_path)
    files = {f"data/{file.name}": file.read_bytes() for file in folder.glob("*.parquet")}
    with serving() as hub:
        point_to(monkeypatch, hub.address, tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
        hub.add("org/set", files | {"set.py": b"raise SystemExit"}, kind="datasets")
        config = config_of("org/set@main/data")
        source = make_source(config)
        asked = {path for _, path in hub.requests if "resolve" in path}
        assert len([path for path in asked if path.endswith(".parquet")]) == 4
        assert not any(path.endswith(".py") for path in asked)
        with pytest.raises(ValueError, match="org/none: no such folder here, and on the hub"):
            make_source(config_of("org/none"))
    assert captions(source) == captions(make_source(config_of(folder)))
    assert source.picture_sizes().shape == (24, 2)
    assert any((tmp_path / "arrow").rglob("sizes-*.npy"))
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert len(make_source(config, "heldout")) == 6
    with pytest.raises(ValueError, match="run: hf download org/two --repo-type dataset") as error:
        make_source(config_of("org/two"))
    one_line(error)
    assert not (tmp_path / "org").exists()


def test_what_datasets_saves_is_read_with_its_images_still_encoded(tmp_path):
    import datasets

    rows = {
        "picture": [{"bytes": image, "path": None} for image, _ in PICTURES[:4]],
        "alt": [["one", "two"]] * 4,
        "boxes": [[1, 2]] * 4,
        "width": [48] * 4,
    }
    made = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": made, "validation": made.select([1])}).save_to_disk(
        tmp_path / "both"
    )
    (tmp_path / "arrow").mkdir()
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "arrow" / "train.arrow")
    for name in ("saved", "both", "arrow"):
        source = make_source(config_of(tmp_path / name, caption_field="alt"))
        encoded = source.read(2)
        assert encoded.image == PICTURES[2][0]
        assert list(encoded.captions) == ["one", "two"] and encoded.attributes == {"width": 48}
    config = config_of(tmp_path / "both", caption_field="alt")
    assert config.kind.splits(config) == ("train", "heldout")
    assert len(make_source(config, "heldout")) == 1


def test_broken_rows_are_counted_and_replaced(tmp_path):
    good = encode_picture(np.full((8, 8, 3), 200))
    table = {
        "pixels": [good, b"no picture", None, good] + [good] * 16,
        "text": ["a", "b", "c", None] + ["d"] * 16,
    }
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "set" / "train.parquet")
    source = make_source(config_of(tmp_path / "set", image_field="pixels", max_broken_fraction=0.2))
    assert captions(source) == ["a"] + ["d"] * 19 and source.num_broken == 3
    assert source.where(1) == "train: row 1"
    source = make_source(config_of(tmp_path / "set", image_field="pixels"))
    with pytest.raises(ValueError, match="broken"):
        captions(source)


def test_a_copy_elsewhere_has_the_same_identity(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".contextdiff_jax"))
    here, there = (identity(make_source(config_of(each))) for each in (folder, tmp_path / "copy"))
    assert here == there
    shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns(".*", "test*"))
    other = [(image, caption.upper()) for image, caption in PICTURES[:24]]
    write_parquet(tmp_path / "other", other, per_file=10)
    changed = identity(make_source(config_of(tmp_path / "other")))
    assert changed["names or sizes of the records"] != here["names or sizes of the records"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"path": "nowhere"}, "data.path='nowhere': is not a folder"),
        ({"path": ""}, "data.path='': data.source='huggingface' needs a folder or ORG/NAME"),
        ({"metadata": "valid"}, "data.metadata='valid': .* has the splits train, test"),
        ({"metadata": "train[a:]"}, "data.metadata='train.a:.': .* 'a' is no number of rows"),
        ({"metadata": "train[3]"}, "a part of a split is written train.:90%."),
        ({"image_field": "photo"}, "data.image_field='photo': .* has the columns image, caption"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(folder, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        make_source(config_of(**{"path": folder} | fields))
    one_line(error)


def test_a_folder_without_tables_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(ValueError, match="can't be read as a data set") as error:
        make_source(config_of(tmp_path))
    one_line(error)


def test_without_the_package_it_says_how_to_install_it(folder, monkeypatch):
    from contextdiff_jax.data import huggingface

    huggingface._open.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="data.source='huggingface': .* pip install datasets"):
        make_source(config_of(folder))
