"""One program for one device and for many (8 simulated ones, in processes of their own)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import command

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def losses(workdir) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def train(workdir, *overrides: str, env: dict[str, str]) -> list[float]:
    result = command("train", "--config=configs/base.py", f"--workdir={workdir}", "--config.train.steps=3", *overrides,
                     tiny=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    return losses(workdir)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), env={"XLA_FLAGS": ""})


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)], ids=["data", "fsdp"])
def test_eight_devices_give_the_losses_of_one(one_device, mesh, tmp_path):
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp"), mesh, strict=True)]
    np.testing.assert_allclose(train(tmp_path, *sizes, env=EIGHT), one_device, rtol=2e-5)


def test_a_batch_that_the_devices_cannot_divide_is_refused_in_one_line(tmp_path):
    result = command("train", "--config=configs/base.py", f"--workdir={tmp_path}", "--config.train.batch_size=12",
                     tiny=True, env=EIGHT)
    assert result.returncode == 2 and "train.batch_size=12" in result.stderr and "= 8" in result.stderr
    assert not (tmp_path / "config.json").exists()
