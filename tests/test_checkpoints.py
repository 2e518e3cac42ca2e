"""Checkpoints that are damaged, unfinished or written on another mesh."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import random
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from contextdiff_jax.cli import RunError
from contextdiff_jax.training import checkpoints
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


def test_a_bucket_stays_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(checkpoints._folder("gs://bucket/run")) == "gs://bucket/run/checkpoints"
    assert str(checkpoints._folder("run")) == f"{tmp_path}/run/checkpoints"
