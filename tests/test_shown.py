"""Where a training is shown: TensorBoard's events, its profile plugin, Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import struct
import subprocess
import sys
import time

import pytest
from conftest import ROOT, config_dict
from PIL import Image

from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.settings import TrainConfig, parse
from contextdiff_jax.settings.autoencoder import parse_autoencoder
from contextdiff_jax.settings.log import LogConfig
from contextdiff_jax.training import log, weights_and_biases
from contextdiff_jax.training.log import MetricsLog
from contextdiff_jax.training.weights_and_biases import check_wandb

PICTURE = Image.new("RGB", (6, 4), "red")


def read_events(folder):
    """The events of the folder's only file, of TFRecord: length, checksum, event, checksum."""
    (file,) = folder.iterdir()
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(log.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_events_have_the_values_the_pictures_and_the_config(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 3}')
    lines = MetricsLog(tmp_path, 4, 8)
    lines.write(5, {"loss": 0.25})
    lines.show(5, "samples", PICTURE)
    lines.close()
    values = [value for event in read_events(tmp_path / "events") for value in event.summary.value]
    config, loss, samples = values
    assert b'    {"seed": 3}' in config.tensor.string_val[0]
    assert config.metadata.plugin_data.plugin_name == "text"
    assert (loss.tag, loss.simple_value) == ("loss", 0.25)
    assert (samples.tag, samples.image.width, samples.image.height) == ("samples", 6, 4)
    png = tmp_path / "shown.png"
    png.write_bytes(samples.image.encoded_image_string)
    assert Image.open(png).getpixel((5, 3)) == (255, 0, 0)


@pytest.mark.parametrize("steps, traced", [((2, 3), {2, 3}), ((3, 9), {3, 4}), ((), None)])
def test_a_trace_has_the_steps_that_are_asked_for_and_is_written_at_the_end(
    tmp_path, steps, traced
):
    """(3, 9): the training ends first. In a process of its own: where libtpu is loaded, as by
    tests/test_aot.py, JAX's profiler brings a process without a TPU down.
    """
    done = subprocess.run(
        [sys.executable, ROOT / "tests/profile_program.py", tmp_path, *map(str, steps)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    seen, names = {int(n): there for n, there in found["seen"].items()}, found["names"]
    if traced is None:
        assert not any(seen.values())
        return
    assert seen == {n: n >= 3 and steps == (2, 3) for n in seen}
    assert {n for n in range(1, 5) if f"step number {n}" in names} == traced
    assert any(name.startswith("train") for name in names)


@pytest.mark.parametrize("steps", [(3,), (3, 2), (0, 1), (1, 2, 3), (999, 1001)])
def test_steps_to_profile_that_are_none_are_named(steps):
    with pytest.raises(ValueError, match=r"train.profile_steps=.*must be the first and the last"):
        TrainConfig(profile_steps=steps)


def test_runs_of_before_the_section_log_are_opened_and_resumed(tmp_path):
    new = config_dict()
    old = {name: section for name, section in new.items() if name != "log"}
    old["train"] = {k: v for k, v in old["train"].items() if k != "profile_steps"}
    assert parse(old).log == LogConfig() == parse(new).log
    claim_workdir(tmp_path, old)
    changed = new | {"log": {"wandb": "team/project"}}
    changed["train"] = new["train"] | {"profile_steps": (3, 4)}
    claim_workdir(tmp_path, changed)  # neither alters what a step computes
    assert json.loads((tmp_path / "config.json").read_text())["log"] == {"wandb": "team/project"}
    from contextdiff_jax.configs import vae_emoji

    vae = vae_emoji.get_config().to_dict()
    del vae["log"]
    assert parse_autoencoder(vae).log == LogConfig()


@pytest.mark.parametrize("value", ["/", "team/", " ", "a/b/c"])
def test_a_project_that_is_none_is_named(value):
    with pytest.raises(ValueError, match="log.wandb=.*must be PROJECT or TEAM/PROJECT"):
        LogConfig(wandb=value)


def test_without_wandb_the_extra_is_named_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb(LogConfig())
    with pytest.raises(ValueError, match=r"log.wandb='mine': .*pip install 'contextdiff_jax\[wand"):
        check_wandb(LogConfig(wandb="mine"))


def test_wandb_offline_keeps_the_lines_the_pictures_and_the_config(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="in requirements-test.txt; an extra of the package")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "config.json").write_text('{"train": {"steps": 98765}}')
    for step, loss in ((1, 0.4375), (2, 0.8125)):  # the second is a resumed run
        lines = MetricsLog(tmp_path, step - 1, 2, wandb="some_project")
        lines.write(step, {"loss": loss})
        lines.show(step, "samples", PICTURE)
        lines.close()
        time.sleep(1)  # wandb names a run's folder by the second
    identity = (tmp_path / weights_and_biases.IDENTITY).read_text()
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    kept = b"".join(file.read_bytes() for file in files)
    for words in (b"some_project", b"98765", b"loss", b"0.4375", b"0.8125", b"samples"):
        assert words in kept, words
    assert len([*tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png")]) == 2


def test_what_fails_in_wandb_ends_the_sending_and_not_the_training(caplog):
    @dataclasses.dataclass
    class Broken:
        calls: int = 0

        def log(self, values):
            self.calls += 1
            raise ConnectionError("no network")

    sink = object.__new__(weights_and_biases.WeightsAndBiases)
    sink._run = broken = Broken()
    for step in (1, 2):
        sink.add(step, {"loss": 1.0})
    sink.close()
    assert broken.calls == 1 and caplog.text.count("no network") == 1
