"""The measurements of an accelerator: in order, in time, each kept as it comes; on a CPU with tiny
networks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ON_EIGHT, ROOT, SMALLEST, command, config_dict

from contextdiff_jax.benchmarks import (
    accelerator,
    agreement,
    collectives,
    kernels,
    largest,
    predicted,
    profiled,
    turns,
    upkeep,
)
from contextdiff_jax.benchmarks.accelerator import AcceleratorBenchmark, Part, groups
from contextdiff_jax.benchmarks.accelerator_page import page
from contextdiff_jax.models import attention, flash, layers
from contextdiff_jax.parallel.mesh import Target
from contextdiff_jax.settings import parse


def python(code, environment):
    """What a process of its own prints."""
    own = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_most_telling_come_first_and_peers_only_where_they_are():
    names = [[part.name for part in group] for group in groups(False, True, pathlib.Path("p"))]
    assert names[:2] == [["the device"], ["train: UNet", "agreement with the CPU"]]
    assert names[-1] == ["largest batch: torch"]
    alone = [part for group in groups(True, False, pathlib.Path("p")) for part in group]
    assert not any("torch" in flag for part in alone for flag in part.flags)
    assert "configs/benchmark_gpu.py:tiny-unet" in alone[1].flags[1]


def test_each_result_is_written_as_it_comes_and_a_failure_costs_its_own(tmp_path, monkeypatch):
    jobs = [Part("first", ("good",)), Part("second", ("bad",)), Part("third", ("slow",))]
    monkeypatch.setattr(accelerator, "groups", lambda *_: [[job] for job in jobs])
    monkeypatch.setattr(accelerator, "upkeep", lambda left, tiny: {"error": "not here"})
    file, seen = tmp_path / "a.json", []

    def run(command, **_):
        seen.append(json.loads(file.read_text())["parts"] if file.exists() else {})
        if "slow" in command:
            raise subprocess.TimeoutExpired(command, 1, stderr=b"a line\nmeasuring")
        if "bad" in command:
            return subprocess.CompletedProcess(command, 1, "", "a trace\nerror: what failed")
        rows = next(flag for flag in command if flag.startswith("--json=")).split("=")[1]
        row = dict(ratio=1.5, ratio_quartiles=[1.4, 1.6], precision="bfloat16", batch=8)
        row |= dict(seconds=2.0, peer="torch channels_last")
        open(rows, "w").write(json.dumps({"rows": [row]}))
        return subprocess.CompletedProcess(command, 0, "a table\n", "")

    monkeypatch.setattr(accelerator.subprocess, "run", run)
    result = accelerator.run(AcceleratorBenchmark(minutes=1, json=file), show=lambda text: None)
    found = json.loads(file.read_text())["parts"]
    assert [len(parts) for parts in seen] == [0, 1, 2]
    assert found["second"]["error"] == "error: what failed"
    assert re.fullmatch("not finished in [0-9]+ s: measuring", found["third"]["error"])
    assert result.text.startswith("1 of 4 parts")
    text = file.with_suffix(".md").read_text()
    assert "| first | bfloat16, 8 | 4.00 | torch channels_last | 1.50 [1.40, 1.60] |" in text
    assert "Not measured: error: what failed" in text and "a table" in text


def test_no_part_is_begun_when_the_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator.subprocess, "run", None)  # would raise
    file = tmp_path / "a.json"
    accelerator.run(AcceleratorBenchmark(minutes=0.1, json=file), show=lambda text: None)
    found = json.loads(file.read_text())["parts"].values()
    assert {part["error"] for part in found} == {"no time was left"}
    with pytest.raises(ValueError, match="--minutes=0: must be above 0"):
        AcceleratorBenchmark(minutes=0, json=file)


def test_a_page_without_peers_says_what_is_missing():
    told = {"minutes": 8, "began": "now", "lacking": ["torch"], "parts": {}}
    assert "Nothing stands beside ours: torch." in page(told)


def test_kernels_have_every_form_of_the_platform_and_say_which_cannot_run(monkeypatch):
    rows = kernels.run(kernels.KernelBenchmark(tiny=True, rounds=1)).rows
    forms = {(row["form"], row["part"]) for row in rows if row["case"] == "attention, tiny"}
    wanted = flash.choices_of(Target())
    assert forms == {(form, part) for form in wanted for part in ("forward", "gradient")}
    monkeypatch.setattr(kernels, "choices_of", lambda target: ("xla", "cudnn"))
    monkeypatch.setattr(kernels, "_norm_case", lambda tiny: kernels._attention_cases(tiny)[0])
    monkeypatch.setattr(kernels, "_relational_case", kernels._norm_case)
    result = kernels.run(kernels.KernelBenchmark(tiny=True, rounds=1))
    assert any(row["form"] == "cudnn" and row["why"] for row in result.rows)
    assert "not here" in result.text


def test_cudnn_is_given_the_mask_and_the_scale_and_refuses_float32(monkeypatch):
    called = {}

    def dot_product_attention(q, k, v, **options):
        called.update(options)
        options.pop("implementation")
        return true(q, k, v, **options)

    true = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 2, 8), jnp.bfloat16)
    mask = jnp.arange(6) < jnp.array([[6], [4]])
    found = flash.cudnn_attention(q, k, v, 0.3, mask, target=Target())
    wanted = true(q[1:], k[1:, :4], v[1:, :4], scale=0.3)
    np.testing.assert_allclose(found[1:].astype(float), wanted.astype(float), atol=2e-2)
    assert called["implementation"] == "cudnn" and called["mask"].shape == (2, 1, 6, 6)
    with pytest.raises(ValueError, match="train.attention='cudnn': computes in bfloat16"):
        flash.cudnn_attention(*(x.astype(jnp.float32) for x in (q, k, v)), 1.0, target=Target())


@pytest.mark.parametrize("queries, keys", [(6, 6), (6, 5), (5, 6), (5, 5)])
def test_cudnn_has_even_numbers_of_queries_and_keys_and_finds_the_same(monkeypatch, queries, keys):
    """With odd ones it refuses to train."""
    seen, true = [], jax.nn.dot_product_attention

    def dot_product_attention(q, k, v, *, implementation, **options):
        seen.append((q.shape[1], k.shape[1]))
        return true(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 2, 8), jnp.bfloat16)
    q, k, v = q[:, :queries], k[:, :keys], v[:, :keys]
    found = flash.cudnn_attention(q, k, v, 0.3, target=Target())
    assert seen == [(6, 6)] and found.shape == q.shape
    wanted = true(q, k, v, scale=0.3)
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), atol=1e-2)


def test_auto_is_cudnn_on_a_gpu_where_it_can_be_had_and_wins(monkeypatch):
    monkeypatch.setattr(Target, "platform", "gpu")

    def choice(queries, keys, width=64, dtype=jnp.bfloat16):
        q, k = (jnp.zeros((1, n, 1, width), dtype) for n in (queries, keys))
        return flash.formulation("auto", q, k, Target())

    assert choice(4096, 4096) == choice(4096, 77, 40) == choice(256, 256) == "cudnn"
    assert choice(64, 64) == choice(64, 77) == "xla"
    for refused in (dict(dtype=jnp.float32), dict(width=160), dict(width=60)):
        assert choice(4096, 4096, **refused) == "xla"


def test_the_forms_for_a_gpu_compute_the_same(monkeypatch):
    """Without the order of products and the barriers that a CPU is fast by."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 2, 8))
    x, kernel = jax.random.normal(jax.random.key(1), (5, 8)), jnp.eye(8, 3)

    def both():
        def loss(q, x, kernel):
            return attention.attention(q, k, v).sum() + jnp.sin(layers.matmul(x, kernel)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, x, kernel)

    here = both()
    monkeypatch.setattr(Target, "platform", "gpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), both(), here)


def test_processes_measure_in_turns_while_none_compiles(tmp_path):
    """Each is at work beside the other until it measures, and then alone."""
    code = (
        "import sys, time; from contextdiff_jax.benchmarks import turns\n"
        "def say(what): print(time.monotonic(), what, flush=True)\n"
        "turns.begin(); say('begin'); time.sleep(float(sys.argv[1]))\n"
        "with turns.alone():\n    say('in'); time.sleep(0.3); say('out')"
    )
    own = os.environ | {turns.FILE: str(tmp_path / "turns"), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, seconds], env=own, stdout=subprocess.PIPE, text=True
        )
        for seconds in ("1", "2")
    ]
    lines = [line.split() for process in processes for line in process.communicate()[0].split("\n")]
    events = [what for _, what in sorted((float(t), what) for t, what in filter(None, lines))]
    assert events == ["begin", "begin", "in", "out", "in", "out"]


def test_a_profile_of_an_accelerator_is_summed_by_kernel(monkeypatch):
    """A CPU's has threads alone, and is refused."""
    event = dict(start_ns=0.0, end_ns=2e6, duration_ns=2e6, stats=(("hlo_op", "dot.1"),))
    events = [
        SimpleNamespace(name="gemm", **event),
        SimpleNamespace(name="gemm", **event | dict(start_ns=3e6, end_ns=5e6)),
        SimpleNamespace(name="copy", **event | dict(start_ns=4e6, end_ns=6e6)),
    ]
    line = SimpleNamespace(name="Stream #1(Compute)", events=events)
    host = SimpleNamespace(name="/host:CPU", lines=[line])
    planes = [SimpleNamespace(name="/device:GPU:0", lines=[line]), host]
    read = lambda _: SimpleNamespace(planes=planes)  # noqa: E731
    monkeypatch.setattr(jax.profiler.ProfileData, "from_serialized_xspace", read)
    found = profiled.summed(b"")
    assert found.seconds == pytest.approx(6e-3 / profiled.CALLS)
    assert found.idle == pytest.approx(1e-3 / profiled.CALLS)
    assert [(row["kernel"], row["times"]) for row in found.rows] == [
        ("gemm", 2 / profiled.CALLS),
        ("copy", 1 / profiled.CALLS),
    ]
    assert "17% of them idle" in profiled.table(found)
    planes.pop(0)
    with pytest.raises(ValueError, match="an accelerator's does"):
        profiled.summed(b"")


def test_a_program_is_recorded(tmp_path):
    double = jax.jit(lambda x: 2 * x)
    file = profiled.record(lambda: double(jnp.ones(3)).block_until_ready(), tmp_path)
    assert file.is_relative_to(tmp_path) and file.stat().st_size > 0


def test_collectives_are_timed_over_all_devices_and_one_device_has_none():
    code = (
        "from contextdiff_jax.benchmarks import collectives; import json; "
        "print(json.dumps(collectives.run(mebibytes=1, rounds=1).rows))"
    )
    rows = json.loads(python(code, ON_EIGHT).splitlines()[-1])
    assert [row["collective"] for row in rows] == list(collectives.COLLECTIVES)
    assert all(row["devices"] == 8 and row["bytes_per_second"] > 0 for row in rows)
    if jax.device_count() == 1:
        with pytest.raises(ValueError, match="nothing to send"):
            collectives.run()


def test_the_measured_step_stands_beside_the_predicted_one(tmp_path):
    lines = [{"seconds_per_step": value} for value in (9.0, 0.3, 0.2, 0.4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "aot.json").write_text(json.dumps({"rows": [{"seconds": None}, {"seconds": 0.2}]}))
    (row,) = predicted.run(str(tmp_path), str(tmp_path / "aot.json")).rows
    assert row["measured"] == 0.3 and row["ratio"] == pytest.approx(1.5)
    (tmp_path / "aot.json").write_text(json.dumps({"rows": [{"seconds": None}]}))
    with pytest.raises(ValueError, match="no program that fits the chip"):
        predicted.run(str(tmp_path), str(tmp_path / "aot.json"))
    with pytest.raises(ValueError, match="has no metrics.jsonl"):
        predicted.run(str(tmp_path / "nowhere"), "")


@pytest.mark.parametrize("file", sorted(ROOT.glob("launch/*.Dockerfile")), ids=lambda p: p.name)
def test_images_copy_what_is_there_and_run_what_python_finds(file):
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    instructions = [line.split(maxsplit=1) for line in lines]
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
    assert instructions[0][0] == "FROM" and {name for name, _ in instructions} <= known
    for name, rest in instructions:
        if name == "COPY":
            assert all((ROOT / part).exists() for part in rest.split()[:-1])
        if name == "CMD":
            program, option, module, *_ = json.loads(rest)
            assert (program, option) == ("python", "-m")
            assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_what_a_gpu_s_environment_sets_is_known_to_xla():
    script = "source launch/gpu_environment.sh && echo $XLA_FLAGS"
    flags = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert "latency_hiding" in flags
    # XLA ends the process at a flag that it doesn't know
    python("import jax; jax.devices(); print('ok')", {"XLA_FLAGS": flags})


def test_the_largest_batch_of_torch_is_what_its_memory_takes(monkeypatch):
    from contextdiff_jax.benchmarks import torch_peer

    torch, true = torch_peer.torch, torch_peer.TorchNetwork.step

    def step(self, inputs):
        if len(inputs["x"]) > 2:
            raise torch.OutOfMemoryError
        return true(self, inputs)

    monkeypatch.setattr(torch_peer.TorchNetwork, "step", step)
    settings = parse(config_dict(**SMALLEST, **{"data.image_size": 8}))
    (row,) = largest.run(settings, "torch").rows
    assert row["batch"] == 2 and row["images_per_second"] > 0
    with pytest.raises(ValueError, match="doesn't say how much memory it has"):
        largest.run(settings, "ours")


@pytest.mark.slow  # two compiled steps: pytest -m slow tests/test_accelerator.py
def test_a_step_that_differs_from_the_cpus_is_told(monkeypatch):
    settings = parse(config_dict(**SMALLEST, **{"data.image_size": 8}))
    assert agreement.run(settings).rows[0]["agrees"]
    true, calls = agreement.make_train_step, []

    def make_train_step(settings):
        calls.append(1)
        rate = settings.train.learning_rate * (-1) ** len(calls)
        train = dataclasses.replace(settings.train, learning_rate=abs(rate), weight_decay=0.0)
        step = true(dataclasses.replace(settings, train=train))
        if len(calls) == 1:
            return step

        def other(state, batch, null):
            return step(state, {**batch, "image": 255 - batch["image"]}, null)

        return other

    monkeypatch.setattr(agreement, "make_train_step", make_train_step)
    assert not agreement.run(settings).rows[0]["agrees"]


@pytest.mark.slow  # minutes: pytest -m slow tests/test_accelerator.py
def test_a_training_is_killed_and_resumed():
    found = upkeep.upkeep(240, tiny=True)
    assert "error" not in found, found
    (row,) = found["rows"]
    assert row["in_order"] and row["steps_after"] > row["steps_before"] > 0


@pytest.mark.slow  # ten minutes: pytest -m slow tests/test_accelerator.py
def test_the_command_measures_all_of_it_with_tiny_networks(tmp_path):
    file = tmp_path / "a.json"
    done = command("benchmark", "--mode=accelerator", "--tiny", "--minutes=12", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["parts"]
    failed = {name: part["error"] for name, part in found.items() if "error" in part}
    # A CPU's memory is the host's; all else must be there.
    assert list(failed) == ["largest batch: ours"], failed
    assert "train: UNet | bfloat16" in file.with_suffix(".md").read_text()
