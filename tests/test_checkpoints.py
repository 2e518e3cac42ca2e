"""Checkpoints that are damaged, unfinished or written on another mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import random
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config_dict
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs import workdir as workdir_room
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.training import log
from contextdiff_jax.training.state import TrainState, zero_metrics

TRIALS = 200


def state_at(step: int) -> TrainState:
    """A state whose every array says which step it is of."""
    params = {"kernel": jnp.full((8, 6), step, jnp.float32), "bias": jnp.arange(8.0) + step}
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        ema=jax.tree.map(lambda x: x + 0.5, params),
        opt_state={"mu": params},
        key=jax.random.key_data(jax.random.key(step)),
        metric_sums=zero_metrics(),
    )


def save_steps(workdir, steps, **options):
    manager = checkpoints.open_manager(workdir, **{"keep": 2} | options)
    with checkpoints.closing(manager, workdir):
        for step in steps:
            checkpoints.save(
                manager, state_at(step), {"next_batch": step}, {"loss": abs(step - 3.0)}
            )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2; tests copy it."""
    workdir = tmp_path_factory.mktemp("saved")
    save_steps(workdir, (1, 2))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def newest(workdir) -> int:
    """The step that a reader gets, all of whose values must be that step's."""
    state, data, step = checkpoints.restore_newest(workdir, jax.eval_shape(lambda: state_at(0)))
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))
    assert data == {"next_batch": step}
    return step


def test_whole_checkpoints_are_read_and_no_file_but_the_manifest_is_left_out_of_it(workdir):
    assert newest(workdir) == 2
    folder = workdir / "checkpoints" / "2"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    sealed = set(json.loads((folder / checkpoints.MANIFEST).read_text())["files"])
    assert files - sealed == {checkpoints.MANIFEST, "commit_success.txt"}


def test_of_200_truncations_and_bit_flips_none_is_loaded_silently(workdir, caplog):
    """Each damages one file of the newest checkpoint; the one before is what is read, or nothing
    has changed.
    """
    rng, folder = random.Random(0), workdir / "checkpoints" / "2"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 5
    harmless = 0
    for trial in range(TRIALS):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        if trial % 2 and whole:
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
        else:
            path.write_bytes(whole[: rng.randrange(max(len(whole), 1))])
        caplog.clear()
        changed = path.read_bytes() != whole
        with caplog.at_level(logging.WARNING, "contextdiff_jax"):
            step = checkpoints.newest_good(workdir)
        if step == 2:  # harmless: what Orbax notes last and nobody reads, or nothing at all
            assert not changed or path.name in (checkpoints.METADATA, "commit_success.txt"), (
                trial,
                path,
            )
            harmless += changed
        else:
            assert "checkpoint 2 is skipped" in caplog.text and "damaged" in caplog.text
        if trial % 40 == 0 or step == 2:  # the reader itself costs more
            assert newest(workdir) == step
        path.write_bytes(whole)
    assert newest(workdir) == 2 and harmless < TRIALS / 4


def test_a_missing_file_is_damage_and_a_run_that_resumes_can_save_that_step_again(workdir):
    next((workdir / "checkpoints" / "2").rglob("manifest.ocdbt")).unlink()
    checkpoints.set_damaged_aside(workdir)
    assert (workdir / "damaged" / "2").exists() and newest(workdir) == 1
    save_steps(workdir, (2,))
    assert newest(workdir) == 2


def cut(folder, *names):
    for name in names:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "lacking",
    [
        ["manifest.json"],
        ["manifest.json", "state"],
        ["manifest.json", "data"],
        ["state"],
        ["data"],
        ["_CHECKPOINT_METADATA"],
        ["state/manifest.ocdbt"],
        ["manifest.json", "state", "data", "_CHECKPOINT_METADATA"],
    ],
    ids=",".join,
)
def test_a_checkpoint_copied_in_part_is_skipped_by_readers_and_set_aside_by_runs(lacking, workdir):
    folder = workdir / "checkpoints" / "2"
    cut(folder, *lacking)
    assert checkpoints.newest_good(workdir) == 1 and folder.exists()
    checkpoints.set_damaged_aside(workdir)
    assert (workdir / "damaged" / "2").exists() and not folder.exists()
    with checkpoints.open_manager(workdir) as manager:
        assert manager.latest_step() == 1


def test_an_older_half_deleted_one_and_a_file_in_a_checkpoints_place_are_set_aside(workdir):
    cut(workdir / "checkpoints" / "1", "state")
    (workdir / "checkpoints" / "3").write_text("")
    checkpoints.set_damaged_aside(workdir)
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["1", "3"]
    assert newest(workdir) == 2


def test_where_no_checkpoint_is_whole_readers_say_so_and_a_run_begins_anew(workdir, caplog):
    for step in "12":
        cut(workdir / "checkpoints" / step, "manifest.json")
    (workdir / "metrics.jsonl").write_text('{"step": 2}\n')
    with pytest.raises(ValueError, match=r"all its checkpoints are damaged \(2, 1\)"):
        newest(workdir)
    assert (workdir / "metrics.jsonl").exists()
    checkpoints.set_damaged_aside(workdir)
    assert "training begins at step 0" in caplog.text
    aside = {path.name for path in (workdir / "damaged").iterdir()}
    assert aside == {"1", "2", "metrics.jsonl"}


@pytest.mark.parametrize("text", ["", "{", "null", "\0\0"])
def test_a_damaged_config_of_a_run_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"config.json: (not .*JSON|is empty).*; delete it to go on"
    ):
        claim_workdir(tmp_path, {"seed": 0})


def test_a_run_of_before_a_field_goes_on_and_means_its_default(tmp_path):
    config = config_dict()
    old = json.loads(json.dumps(config))
    del old["data"]["num_scenes"], old["model"]["act_fn"], old["latent"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    claim_workdir(tmp_path, config, write=False)
    config["data"]["num_scenes"] = 7
    with pytest.raises(ValueError, match=r"data.num_scenes is 100000 there and 7 here"):
        claim_workdir(tmp_path, config)


def test_an_unfinished_save_is_not_there(workdir):
    shutil.copytree(
        workdir / "checkpoints" / "2", workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    )
    assert newest(workdir) == 2
    save_steps(workdir, (3,))  # and its place is free
    assert newest(workdir) == 3 and not list((workdir / "checkpoints").glob("*tmp*"))


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=2, best=1)  # the loss is lowest at step 3
    assert sorted(
        int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()
    ) == [3, 6, 7]


def test_an_average_is_read_alone_and_in_bf16(workdir):
    place = NamedSharding(Mesh(np.array(jax.devices()[:1]), "x"), P())
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=place), state_at(0).ema
    )
    ema, step = checkpoints.restore_weights(workdir, abstract)
    assert step == 2 and ema["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(ema["kernel"].astype(jnp.float32), np.full((8, 6), 2.5))


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(tmp_path):
    """A file system of 1 MiB, and a state of 2 MiB after one of 3 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    try:
        save_steps(disk, (1,))
        big = dataclasses.replace(
            state_at(2), opt_state={"mu": jax.random.normal(jax.random.key(0), (1 << 19,))}
        )
        manager = checkpoints.open_manager(disk)
        with pytest.raises(
            RunError, match=r"checkpoint.*could not be written.*[Nn]o space left.*step 1 is kept"
        ) as error:
            with checkpoints.closing(manager, disk):
                checkpoints.save(manager, big, {"next_batch": 2})
        assert "\n" not in str(error.value)
        assert newest(disk) == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_at_the_last_file_is_the_same(workdir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "_digests", full)
    with pytest.raises(RunError, match="could not be written.*No space left.*step 2 is kept"):
        save_steps(workdir, (3,))
    monkeypatch.undo()
    assert newest(workdir) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_log_that_cannot_be_written_is_one_line_with_what_is_kept(code, workdir, monkeypatch):
    logged = log.MetricsLog(workdir, 2)
    logged.write(3, {"loss": 1.0})

    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(type(logged.path), "open", full)
    line = f"metrics.jsonl could not be written: {os.strerror(code)}; step 2 is kept"
    with pytest.raises(RunError, match=line):
        logged.write(4, {"loss": 1.0})
    logged.close()


def test_a_resumed_run_drops_torn_and_later_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.1}\n{"st{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    logged = log.MetricsLog(tmp_path, 2)
    logged.write(3, {"loss": 2.0})
    logged.close()
    assert path.read_text() == '{"step": 1, "loss": 0.1}\n{"step": 3, "loss": 2.0}\n'


class FullDisk:
    """tensorboardX's RecordWriter on a disk that is full (/dev/full), or that hangs."""

    def __init__(self, path):
        self.file = open("/dev/full", "wb")

    def write(self, data):
        self.file.write(data)

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


class HangingDisk(FullDisk):
    def write(self, data):
        threading.Event().wait()


@pytest.mark.parametrize("disk, warned", [(FullDisk, 1), (HangingDisk, 0)])
def test_events_on_a_bad_disk_neither_hold_up_nor_end_a_run(
    disk, warned, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(log, "RecordWriter", disk)
    events, start = log.Events(str(tmp_path), first=1), time.monotonic()
    for step in range(1, 1000):
        events.add(step, {"loss": 1.0})
    events.close(seconds=1)
    assert time.monotonic() - start < 5
    assert caplog.text.count("no more events are written") == warned


@pytest.mark.parametrize("kind", [pathlib.Path, epath.Path])
def test_the_folder_of_a_run_is_held_until_it_ends(kind, tmp_path):
    tmp_path = kind(tmp_path)
    with workdir_room.held(tmp_path / "run"):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on \S+ is writing to it"):
            with workdir_room.held(tmp_path / "run"):
                pass
    assert not (tmp_path / "run").exists()  # nothing was written: as it was before
    with workdir_room.held(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "owner, beats, flocks, free",
    [
        ("", False, True, True),
        ({"host": "here", "pid": 1}, False, True, True),  # killed: the system freed its lock
        ({"host": "here", "pid": 1}, True, False, False),
        ({"host": "here", "pid": 2**22 + 1}, True, False, True),  # no such process
        ({"host": "there", "pid": 1}, False, True, True),
        ({"host": "there", "pid": 1}, True, True, False),
        ({"host": "there", "pid": 1}, False, False, True),
    ],
)
def test_a_lock_that_was_left_is_known_by_its_host_process_and_time_stamp(
    owner, beats, flocks, free, tmp_path, monkeypatch
):
    lock, gone = tmp_path / workdir_room.LOCK, threading.Event()
    lock.write_text(json.dumps(owner) if owner else "")
    monkeypatch.setattr(workdir_room, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(workdir_room.socket, "gethostname", lambda: "here")
    if not flocks:

        def none(*_):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        monkeypatch.setattr(workdir_room.fcntl, "flock", none)

    def live():
        while not gone.wait(0.02):
            os.utime(lock)

    if beats:
        threading.Thread(target=live).start()
    try:
        with contextlib.nullcontext() if free else pytest.raises(ValueError, match="process 1 on"):
            with workdir_room.held(tmp_path):
                assert json.loads(lock.read_text())["pid"] == os.getpid()
                gone.set()
    finally:
        gone.set()


def test_a_bucket_stays_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(checkpoints._folder("gs://bucket/run")) == "gs://bucket/run/checkpoints"
    assert str(checkpoints._folder("run")) == f"{tmp_path}/run/checkpoints"
