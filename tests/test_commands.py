"""Bad input: one line that names the field, the value and what is allowed, exit status 2. What
every command sets up.
"""

import json
import os
import re
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, command
from PIL import Image

from contextdiff_jax import cli

TRAIN = ("train", "--config=configs/shapes.py", "--workdir=unused")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*TRAIN, "--config.train.stepz=5"), "stepz.*steps"),
        ((*TRAIN, "--config.trian.steps=5"), "unknown section.*trian"),
        (
            (*TRAIN, "--config.context.shift=foo"),
            "context.shift='foo': unknown; one of quadratic, prior",
        ),
        (
            (*TRAIN, "--config.diffusion.schedule=foo"),
            "diffusion.schedule='foo': unknown; one of linear",
        ),
        ((*TRAIN, "--config.data.source=foo"), "data.source='foo': unknown; one of shapes, folder"),
        ((*TRAIN, "--config.sample.sampler=foo"), "sampler='foo': unknown; one of ddpm, ddim"),
        ((*TRAIN, "--config.sample.eta=1.5"), r"eta=1.5: must lie in \[0, 1\]"),
        ((*TRAIN, "--config.mesh.data=3"), "mesh=.*number of devices, 8"),
        (
            (*TRAIN, "--config.train.batch_size=12"),
            "train.batch_size=12: must be a multiple of .* 8",
        ),
        (("sample", "--workdir=unused"), "--prompt: the list is empty"),
        (("sample", "--workdir=nowhere", "--prompt=a"), "--workdir=nowhere: holds no run"),
        (("sample", "--workdir=nowhere", "--prompt=a", "--eta=2"), "eta=2.0: must lie in"),
        (
            ("evaluate", "--workdir=nowhere", "--metrics=foo"),
            "'foo': unknown; one of composition, bound, branches, fid",
        ),
        (("evaluate", "--workdir=nowhere", "--metrics=fid"), "--workdir=nowhere: holds no run"),
        (("benchmark", "--mode=reuse", "--workdir=nowhere"), "--workdir=nowhere: holds no run"),
        (("train_classifier", "--config=configs/shapes.py"), "--workdir: missing; name the folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_line_and_status_2(arguments, message):
    result = command(*arguments, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), result.stderr
    assert "Traceback" not in result.stderr
    assert not (ROOT / "unused").exists() or not any((ROOT / "unused").iterdir())


def test_broken_metadata_lines_are_counted_and_a_large_share_stops_the_run(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    rows = [
        {"file_name": "a.png", "text": "red"},
        {"file_name": "a.png"},
        {"file_name": "gone.png", "text": "gone"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command(*TRAIN, "--config.data.source=folder", f"--config.data.path={tmp_path}")
    assert result.returncode == 2
    assert "metadata.jsonl" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_not_paid_for_again(kept):
    """As XLA's temporaries do at each step: 64 MiB are taken, written and freed; the second time
    costs no page fault.
    """
    code = (
        "import glob, resource, threading; from contextdiff_jax import cli; glob.glob = lambda pattern: []\n"
        f"cli.keep_freed_memory() if {kept} else None\n"
        "def use(): bytearray(2**26)\n"
        "def run(): thread = threading.Thread(target=use); thread.start(); thread.join()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "run(); before = faults(); run(); print(faults() - before)\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GLIBC")
    } | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 1000) == kept, done.stdout


def test_compiled_programs_are_kept_by_the_number_of_cores(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    set_to = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.update({name: value}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    cli.set_compilation_cache(tmp_path)
    assert set_to == {"jax_compilation_cache_dir": str(tmp_path / "compiled" / "3-cores")}
