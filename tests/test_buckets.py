"""Orders and aspect-ratio buckets: exactly once an epoch, on any number of processes, resumable
anywhere.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os

import numpy as np
import pytest

from contextdiff_jax.benchmarks.source_layouts import make_pictures, write_folder, write_webdataset
from contextdiff_jax.data import (
    DataConfig,
    ShapesConfig,
    ShapesSource,
    bucket_sizes,
    make_loader,
    make_source,
)
from contextdiff_jax.data.buckets import derive_buckets, nearest_bucket
from contextdiff_jax.data.decoding import picture_size
from contextdiff_jax.data.orders import BucketOrder

SIZES = ((16, 16), (12, 24), (24, 12))


def _order(counts=(230, 97, 121), batch_size=40, seed=0):
    """Records in buckets of these counts, interleaved, after three of none."""
    bucket_of = np.concatenate([[-1] * 3, np.repeat(np.arange(len(counts)), counts)])
    bucket_of = bucket_of[np.random.default_rng(1).permutation(len(bucket_of))]
    return bucket_of, BucketOrder(SIZES[: len(counts)], bucket_of, batch_size, seed)


def test_a_batch_is_of_one_bucket_and_every_record_comes_once_before_any_comes_again():
    bucket_of, order = _order()
    seen = {k: [] for k in range(3)}
    for number in range(60):
        size, records, epochs = order(number, range(40))
        bucket = SIZES.index(size)
        assert (bucket_of[records] == bucket).all()
        seen[bucket] += list(zip(epochs, records, strict=True))
    for bucket, places in seen.items():
        members = set(np.flatnonzero(bucket_of == bucket))
        epochs = collections.defaultdict(list)
        for epoch, record in places:
            epochs[epoch].append(record)
        # All but those that 60 batches cut short: every member exactly once, and in another order
        # each time.
        whole = [epochs[epoch] for epoch in sorted(epochs)[:-2]]
        assert len(whole) > 2 and all(len(e) == len(members) and set(e) == members for e in whole)
        assert len({tuple(e) for e in whole}) == len(whole)


def test_an_epochs_batches_leave_at_most_a_batch_of_each_bucket_for_the_next():
    bucket_of, order = _order()
    given, number = np.zeros(len(bucket_of), int), 0
    for epoch in range(1, 6):
        while number < order.first_batches(epoch).sum():
            assert order.epoch_of(number) == epoch - 1
            np.add.at(given, order(number, range(40)).records, 1)
            number += 1
        for bucket in range(3):
            late = epoch - given[bucket_of == bucket]
            assert set(late) <= {0, 1} and late.sum() < 40
        assert not given[bucket_of < 0].any()


def test_buckets_alternate_within_an_epoch():
    _, order = _order(counts=(400, 400))
    sizes = [order(number, [0]).size for number in range(40)]
    assert 5 < sum(a != b for a, b in itertools.pairwise(sizes)) and sizes[:20] != sizes[20:]


def test_shares_of_any_number_of_processes_make_the_same_batches():
    _, order = _order(batch_size=12)
    for number in (0, 5, 77):
        whole = order(number, range(12))
        for count in (1, 2, 3, 4, 6, 12):
            shares = [order(number, range(p, 12, count)) for p in range(count)]
            assert {share.size for share in shares} == {whole.size}
            for p, share in enumerate(shares):  # here in stripes; by default the loader cuts blocks
                assert (
                    share.records == whole.records[p::count]
                    and share.epochs == whole.epochs[p::count]
                )


def test_a_batch_far_ahead_is_found_as_quickly_as_the_first():
    rng = np.random.default_rng(0)
    order = BucketOrder(SIZES, rng.integers(0, 3, 1_000_000), 256, 3)
    share = order(40_000_000, range(256))  # the 10,240th epoch
    assert set(share.epochs) == {order.epoch_of(40_000_000)} == {10_240}
    assert len(set(share.records)) == 256


def test_derived_buckets_fill_the_area_in_steps_up_to_the_ratio():
    assert derive_buckets(256**2, 2.0, 64) == ((192, 320), (256, 256), (320, 192))
    for height, width in derive_buckets(1024**2, 4.0, 64):
        assert height % 64 == width % 64 == 0 and height * width <= 1024**2 < height * (width + 64)
        assert max(height / width, width / height) <= 4
    assert (512, 2048) in derive_buckets(1024**2, 4.0, 64) and (1024, 1024) in derive_buckets(
        1024**2, 4.0, 64
    )
    assert derive_buckets(64**2, 1.0, 64) == ((64, 64),)


def test_the_nearest_bucket_is_by_the_logarithm_of_the_ratio():
    sizes = np.array(
        [[100, 100], [100, 142], [100, 143], [300, 100], [0, 0], [65535, 1]], np.uint16
    )
    np.testing.assert_array_equal(nearest_bucket(sizes, SIZES), [0, 1, 1, 2, -1, 2])
    np.testing.assert_array_equal(nearest_bucket(sizes, ((16, 16), (10, 22))), [0, 0, 0, 0, -1, 0])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """28 pictures of three shapes, as a folder and as shards: {source: path}."""
    pictures = [
        p
        for h, w, n in ((32, 32, 10), (24, 48, 9), (48, 24, 9))
        for p in make_pictures(n, h, w, seed=h)
    ]
    pictures = [(image, f"{number}") for number, (image, _) in enumerate(pictures)]
    root = tmp_path_factory.mktemp("mixed")
    return {
        "folder": str(write_folder(root / "f", pictures)),
        "webdataset": str(write_webdataset(root / "w", pictures, 11)),
    }


def _loader(mixed, source="webdataset", **options):
    data = make_source(DataConfig(source=source, path=mixed[source], image_size=16))
    return make_loader(data, **{"batch_size": 6, "seed": 2, "buckets": SIZES, **options})


@pytest.mark.parametrize("source", ["folder", "webdataset"])
def test_batches_have_the_bucket_of_their_pictures(mixed, source):
    loader = _loader(mixed, source)
    for _ in range(8):
        batch = next(loader)
        shapes = {
            (16, 16) if int(c) < 10 else (12, 24) if int(c) < 19 else (24, 12)
            for c in batch["caption"]
        }
        assert shapes == {batch["image"].shape[1:3]} and len(batch["image"]) == 6


def test_a_run_that_changes_its_process_count_sees_every_record_exactly_once(mixed):
    """Epochs of 14 batches of 2 begin on 2 processes and end on 1, across a saved state."""
    captions, state = [], None
    for number_of_batches, count in ((5, 2), (6, 1), (3, 2), (14, 1)):
        loaders = [
            _loader(mixed, batch_size=2, process_index=p, process_count=count) for p in range(count)
        ]
        for loader in loaders:
            if state:
                loader.set_state(state)
        batches = [
            [next(loader)["caption"] for loader in loaders] for _ in range(number_of_batches)
        ]
        captions += [[*itertools.chain(*shares)] for shares in batches]
        state = json.loads(json.dumps(loaders[0].get_state()))
        assert loaders[-1].get_state() == state
        for loader in loaders:
            loader.close()
    whole = _loader(mixed, batch_size=2)
    assert captions == [next(whole)["caption"] for _ in range(28)]
    whole.close()
    counts = collections.Counter(itertools.chain(*captions))
    # The buckets of 9 leave one record each for the next epoch.
    assert set(counts.values()) == {2} and len(counts) == 28


def test_the_state_of_other_buckets_is_refused(mixed):
    state = _loader(mixed).get_state()
    with pytest.raises(ValueError, match="the saved data state has buckets"):
        _loader(mixed, buckets=SIZES[:2]).set_state(state)
    with pytest.raises(ValueError, match="data.buckets=None: the saved data state has buckets"):
        _loader(mixed, buckets=()).set_state(state)


def test_measured_sizes_are_kept_and_pictures_without_a_header_are_in_no_bucket(
    mixed, tmp_path, monkeypatch
):
    pictures = [*make_pictures(6, 16, 16), (b"no picture", "bad")]
    config = DataConfig(
        source="webdataset", path=str(write_webdataset(tmp_path, pictures)), max_broken_fraction=0.2
    )
    source = make_source(config)
    assert source.picture_sizes().tolist() == [[16, 16]] * 6 + [[0, 0]] and source.num_broken == 1
    again = make_source(config)
    monkeypatch.setattr(type(again), "read", None)
    assert (
        again.picture_sizes().tolist() == source.picture_sizes().tolist() and again.num_broken == 1
    )
    monkeypatch.undo()
    loader = make_loader(again, batch_size=3, buckets=((16, 16),))
    counts = collections.Counter(itertools.chain(*(next(loader)["caption"] for _ in range(4))))
    assert set(counts.values()) == {2} and len(counts) == 6


@pytest.mark.parametrize("change", ["a picture arrives", "pictures are replaced", "another field"])
def test_sizes_are_measured_anew_when_the_records_are_others(change, tmp_path):
    flat, tall = (data for h, w in ((8, 24), (24, 8)) for data, _ in make_pictures(1, h, w))
    lines = [{"file_name": f"{i}.jpg", "text": f"{i}", "title": "t"} for i in range(8)]
    if change == "another field":
        del lines[0]["title"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i in range(8):
        if i or change != "a picture arrives":
            (tmp_path / f"{i}.jpg").write_bytes(flat if i % 2 else tall)
    config = DataConfig(source="folder", path=str(tmp_path), max_broken_fraction=0.5)
    make_source(config).picture_sizes()
    if change == "a picture arrives":
        (tmp_path / "0.jpg").write_bytes(tall)
    if change == "pictures are replaced":  # by others of the same length and time
        for i in range(8):
            file = tmp_path / f"{i}.jpg"
            time, length = file.stat().st_mtime_ns, file.stat().st_size
            file.write_bytes((tall if i % 2 else flat).ljust(length, b"\0")[:length])
            os.utime(file, ns=(time, time))
    if change == "another field":
        config = dataclasses.replace(config, caption_field="title")
    source = make_source(config)
    expected = [picture_size(source.read(i).image) for i in range(len(source))]
    assert source.picture_sizes().tolist() == [list(size) for size in expected]


def test_bad_buckets_are_refused_in_one_line(mixed):
    for options, words in (
        ({"buckets": ((16,),)}, "(16,) is not (height, width)"),
        ({"buckets": ((16, 0),)}, "(16, 0) is not"),
        ({"buckets": ((16, 16), (16, 16))}, "names a size twice"),
        (
            {"buckets": ((16, 16),), "bucket_max_ratio": 2.0},
            "must be 0 where data.buckets are named",
        ),
        ({"bucket_max_ratio": 0.5}, "data.bucket_max_ratio=0.5: must be at least 1"),
        ({"bucket_max_ratio": 2.0, "bucket_step": 0}, "data.bucket_step=0"),
        (
            {"bucket_max_ratio": 2.0, "image_size": 32},
            "data.bucket_step=64: no multiple of it fits",
        ),
    ):
        with pytest.raises(ValueError) as error:
            bucket_sizes(DataConfig(**options))
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="this data.source has pictures of one size"):
        make_loader(ShapesSource(ShapesConfig()), batch_size=4, buckets=SIZES)
    assert bucket_sizes(DataConfig(buckets=[[16, 16], [8, 32]])) == (
        (16, 16),
        (8, 32),
    ) and not bucket_sizes(DataConfig())


# compiles two training steps, 40 s of one core each: python -m pytest tests/test_buckets.py -m slow
@pytest.mark.slow
def test_training_compiles_one_program_a_bucket(mixed, tmp_path, caplog):
    from conftest import config_dict

    from contextdiff_jax.settings import parse
    from contextdiff_jax.training.loop import train

    config = config_dict(
        **{
            "data.source": "webdataset",
            "data.path": mixed["webdataset"],
            "data.buckets": "((8, 8), (8, 16))",
            "data.image_size": 8,
            "train.steps": 6,
            "train.batch_size": 2,
            "sample.steps": 1,
            "sample.guidance": 1.0,
        }
    )
    with caplog.at_level("INFO", logger="contextdiff_jax"):
        train(parse(config), config, tmp_path)
    assert sum("compiling for" in message for message in caplog.messages) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(
        np.isfinite(line["loss"]) for line in lines
    )
    assert lines[-1]["broken_records"] == 0
