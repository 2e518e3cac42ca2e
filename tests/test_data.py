"""The tokenizer, the loader, and sources by name."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from conftest import command, one_line
from small_data import write_folder

from contextdiff_jax.data import (
    SOURCES,
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
from contextdiff_jax.evaluation import subject

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
        assert one_line(error).startswith(f"tokenizer={path}")
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
        assert "the saved data state has" in one_line(error)


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
        assert field in one_line(error)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_with_too_many_broken_pictures_stops_the_loader(tmp_path, num_workers):
    write_folder(tmp_path)
    for i in range(5):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no picture")
    source = FolderSource(FolderConfig(path=str(tmp_path), image_size=4, max_broken_fraction=0.2))
    loader = make_loader(source, batch_size=5, num_workers=num_workers)
    with pytest.raises(Exception, match="max_broken_fraction=0.2"):
        _take(loader, 4)
    loader.close()


# -------------------- sources


def test_sources_are_made_by_name(tmp_path):
    write_folder(tmp_path)
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
    write_folder(tmp_path)
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
        assert words in one_line(error)


def test_a_function_alone_is_a_source_with_training_records(monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", lambda config, split: [{"caption": split}])
    data = DataConfig(source="mine")
    assert subject.splits(data) == {"training records": [{"caption": "train"}]}
    assert subject.classifier_source(data) == [{"caption": "train"}]
    with pytest.raises(ValueError, match="data.source='yours': unknown; one of shapes.*, mine"):
        subject.splits(DataConfig(source="yours"))
