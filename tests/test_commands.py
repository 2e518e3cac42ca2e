"""Bad input: one line that names the field, the value and what is allowed, exit status 2. What
every command sets up.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest
from absl import flags
from conftest import ON_EIGHT, ROOT, command
from ml_collections import ConfigDict
from PIL import Image

from contextdiff_jax import cli
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runtime import host

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
        (
            ("train", "--config=configs/nope.py", "--workdir=unused"),
            "--config=configs/nope.py: no such file; by name there are base, benchmark_cpu, ",
        ),
        (
            ("train", "--config=configs/shapes_flow.py:nope", "--workdir=unused"),
            "--config: configs/shapes_flow.py:METHOD='nope': unknown; one of velocity, ",
        ),
        (("sample", "--workdir=unused"), "--prompt: the list is empty"),
        (("sample", "--workdir=nowhere", "--prompt=a"), "nowhere: holds neither a trained run"),
        (("sample", "--workdir=nowhere", "--prompt=a", "--eta=2"), "eta=2.0: must lie in"),
        (
            ("evaluate", "--workdir=nowhere", "--metrics=foo"),
            "'foo': unknown; one of composition, bound, likelihood, branches, fid",
        ),
        (("evaluate", "--workdir=nowhere", "--metrics=fid"), "--workdir=nowhere: holds no run"),
        (("benchmark", "--mode=reuse", "--workdir=nowhere"), "nowhere: holds neither a trained"),
        (("train_classifier", "--config=configs/shapes.py"), "--workdir: missing; name the folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_bad_input_gets_one_line_and_status_2(arguments, message):
    result = command(*arguments, env=ON_EIGHT)
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
    """XLA's temporaries do the same at each step. 64 MiB are taken, written and freed; the second
    time costs no page fault.
    """
    code = (
        "import glob, resource, threading; from contextdiff_jax.runtime import host\n"
        "glob.glob = lambda pattern: []\n"
        f"host.keep_freed_memory() if {kept} else None\n"
        "def use(): bytearray(2**26)\n"
        "def run(): thread = threading.Thread(target=use); thread.start(); thread.join()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "run(); before = faults(); run(); print(faults() - before)\n"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GLIBC", "LD_PRELOAD"))  # it is glibc's memory that is kept
    } | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 1000) == kept, done.stdout


@pytest.mark.parametrize(
    "processor, own, flags",
    [
        ("GenuineIntel", "", "--xla_cpu_prefer_vector_width=512"),
        ("GenuineIntel", "--xla_a=1", "--xla_cpu_prefer_vector_width=512 --xla_a=1"),
        ("GenuineIntel", "--xla_cpu_prefer_vector_width=256", "--xla_cpu_prefer_vector_width=256"),
        ("AuthenticAMD", "", ""),
    ],
)
def test_xla_gets_intels_wide_vectors_unless_the_user_says_otherwise(
    monkeypatch, processor, own, flags
):
    monkeypatch.setenv("XLA_FLAGS", own)
    host.suit_processor(f"vendor_id\t: {processor}\nflags\t\t: fpu avx2 avx512f avx512bw\n")
    assert os.environ["XLA_FLAGS"] == flags
    host.suit_processor("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2\n")
    assert os.environ["XLA_FLAGS"] == flags


def test_xla_knows_the_option_of_wide_vectors():
    code = (
        "import jax; from contextdiff_jax.runtime import host\n"
        "host.suit_processor('GenuineIntel avx512f')\n"
        "print(jax.jit(lambda x: x + 1)(1))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "2\n", done.stderr  # an unknown one ends the process


def test_compiled_programs_are_kept_by_the_number_of_cores(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    set_to = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.update({name: value}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    host.set_compilation_cache(tmp_path)
    assert set_to == {"jax_compilation_cache_dir": str(tmp_path / "compiled" / "3-cores")}


@pytest.mark.parametrize(
    "value, message",
    [
        ("grid", "--out={}: must end in one of .png, .jpg"),
        ("grid.xyz", "--out={}: must end in one of .png"),
        ("", "--out: missing; name a file"),
        ("folder", "--out={}: is a folder; name a file"),
        ("new/", "--out={}: is a folder; name a file"),
        ("file/grid.png", "--out={}: lies below .*/file, a file; name another folder"),
        ("file/new/grid.png", "--out={}: lies below .*/file, a file; name another folder"),
        ("gs://bucket/grid.png", "--out={}: is remote"),
        ("/proc/grid.png", "--out={}: can't be written"),
        ("grid.png", None),
        ("GRID.JPG", None),
        ("new/deep/grid.webp", None),
    ],
)
def test_an_output_is_refused_before_the_work_and_nothing_is_made(tmp_path, value, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = set(tmp_path.rglob("*"))
    value = value if not value or value.startswith(("/", "gs:")) else f"{tmp_path}/{value}"
    if message is None:
        assert cli.output_file("out", value, cli.PICTURES) == pathlib.Path(value)
    else:
        with pytest.raises(ValueError, match=message.format(re.escape(value))):
            cli.output_file("out", value, cli.PICTURES)
    assert set(tmp_path.rglob("*")) == before


def test_paths_of_flags_and_configs_know_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = flags.FlagValues()
    flags.DEFINE(cli._Path(), "workdir", None, "", flag_values=values)
    values(["program", "--workdir=~/run"])
    assert values.workdir == f"{tmp_path}/run"
    config = {
        "data": {"path": "~/data", "metadata": "metadata*.jsonl", "seed": 0},
        "sample": {"prompts": ("~ a tilde",)},
        "latent": {"vae": "~"},
        "video": {"path": "/clip", "model": "runs/~x"},
    }
    monkeypatch.setattr(cli, "CONFIG", types.SimpleNamespace(value=ConfigDict(config)))
    found = cli.read_config()
    assert found["data"] == {"path": f"{tmp_path}/data", "metadata": "metadata*.jsonl", "seed": 0}
    assert found["sample"]["prompts"] == ["~ a tilde"]
    assert found["latent"]["vae"] == str(tmp_path)
    assert found["video"] == {"path": "/clip", "model": "runs/~x"}
    with pytest.raises(ValueError, match="data.path=~nobody_here/x: there is no such user"):
        cli.expand("~nobody_here/x", "data.path")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "abc"])
def test_a_flag_that_is_a_number_is_finite_and_within_its_bound(value):
    values = flags.FlagValues()
    flags.DEFINE(cli._Finite(lower_bound=0), "guidance", None, "", flag_values=values)
    with pytest.raises(flags.IllegalFlagValueError, match=f"--guidance={value}"):
        values(["program", f"--guidance={value}"])


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "", '{"train"', "[]", "\udcff"],
    ids=["deep", "empty", "cut", "list", "bytes"],
)
def test_a_run_whose_config_is_damaged_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(
        ValueError, match="config.json: (not valid JSON|not a JSON object|is empty)"
    ):
        load_run(str(tmp_path))
