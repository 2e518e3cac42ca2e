"""The benchmark of the step and of the sampling loop against torch: same results or no ratio, and
what is made of the times.
"""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import (
    ONE_LEVEL,
    SMALLEST,
    SMALLEST_BY_FLAGS,
    TINY,
    command,
    config_dict,
    mmdit_dict,
    overrides,
)
from flax import nnx

from contextdiff_jax.benchmarks import method, network, paired, speed, torch_method, torch_peer
from contextdiff_jax.benchmarks.paired import Contestant, Times
from contextdiff_jax.benchmarks.speed import SpeedBenchmark
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.settings import parse

TORCHS = ("torch channels_last", "torch NCHW")

FEW = {"train.batch_size": 2, "data.image_size": 8, "sample.steps": 5}
SMALL = SMALLEST | FEW


@pytest.fixture(scope="module")
def settings():
    return parse(config_dict(**SMALL))


def test_rounds_take_turns_and_ratios_are_of_pairs(monkeypatch):
    """Ours takes 1, 2, 4 s and the peer 3, 2, 8; the ratios of the rounds are 3, 1, 2."""
    # The first three rounds, of 9 s, don't count.
    wall, order = (iter([0, 9] * 6 + [0, 1, 0, 3, 0, 2, 0, 2, 0, 4, 0, 8]), [])
    monkeypatch.setattr(paired.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(paired.time, "process_time", lambda: 0.0)
    contestants = [
        Contestant(name, lambda name=name: order.append(name)) for name in ("ours", "peer")
    ]
    times = paired.measure(contestants, 3)
    assert times["ours"].wall == [1, 2, 4] and times["peer"].wall == [3, 2, 8]
    assert order == ["peer", "ours", "ours", "peer"] * 3
    assert paired.ratio(times["peer"].wall, times["ours"].wall) == (2, 1.5, 2.5)


def test_the_better_of_torchs_layouts_is_the_baseline(monkeypatch):
    monkeypatch.setattr(paired, "extra_memory", lambda call: None)
    seconds = {"unet": 2.0, "torch channels_last": 3.0, "torch NCHW": 5.0}
    contestants = [Contestant(name, lambda: None) for name in seconds]
    times = {name: Times([s, s, s], [2 * s] * 3) for name, s in seconds.items()}
    rows = speed._rows(contestants, times, flops=8e9, peak=16e9)
    assert (
        rows[0]["peer"] == "torch channels_last" and rows[0]["ratio"] == rows[0]["cpu_ratio"] == 1.5
    )
    assert rows[0]["flops_per_second"] == 4e9 and rows[0]["share_of_peak"] == 0.25
    assert [row["name"] for row in rows if "ratio" in row] == ["unet"]


def test_memory_of_a_call_is_what_the_process_grew_by():
    grown = paired.extra_memory(lambda: np.ones(64 * 2**20, np.uint8).sum())
    assert grown is None or 60 * 2**20 < grown < 100 * 2**20


def test_our_pictures_are_torchs(settings):
    contestants, flops = speed.NETWORK["sample"](settings, SpeedBenchmark(compare="torch"))
    assert [one.name for one in contestants] == ["unet", *TORCHS] and flops > 1e6


def test_bfloat16_results_agree_within_its_rounding_and_the_method_has_no_peer_then(settings):
    train = dataclasses.replace(settings.train, precision="bfloat16")
    half = dataclasses.replace(settings, train=train)
    contestants, _ = speed.NETWORK["train"](half, SpeedBenchmark(compare="torch"))
    assert [c.peak_bytes(c.call) for c in contestants] == [None] * 3  # of accelerators alone
    assert network.random_network(half).conv_in.dtype == jax.numpy.bfloat16
    assert torch_method.lacking(half) == "train.precision='bfloat16'"


def test_torch_must_have_the_gpu_that_jax_has(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch_peer.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="JAX has a GPU and this torch has none"):
        torch_peer.torch_device()


def test_on_a_gpu_torch_is_compiled_too_with_the_same_weights(settings, monkeypatch):
    """Its first loss is compared with what the uncompiled network has then, after two steps."""
    monkeypatch.setattr(torch_peer, "torch_device", lambda: "cuda")
    monkeypatch.setattr(torch_peer.TorchNetwork, "__init__", lambda *_: None)
    monkeypatch.setattr(torch_peer.TorchNetwork, "compiled", lambda self: (self, "compiled"))
    found = torch_peer.peers(SimpleNamespace(config=UNetConfig()), settings)
    assert list(found) == ["torch channels_last", "torch channels_last compiled"]
    assert found["torch channels_last compiled"] == (found["torch channels_last"], "compiled")


def test_where_both_do_not_fit_torch_is_measured_first_and_gives_its_memory_back(
    settings, monkeypatch
):
    """Output, loss and parameters are compared all the same."""
    needed, released = [], []
    monkeypatch.setattr(torch_peer.TorchNetwork, "has_room_for", lambda _, n: needed.append(n))
    true = torch_peer.TorchNetwork.release

    def release(self):
        true(self)
        released.append(self)

    monkeypatch.setattr(torch_peer.TorchNetwork, "release", release)
    monkeypatch.setattr(paired, "_WARM_UP", 0)
    contestants, flops = speed.NETWORK["train"](settings, SpeedBenchmark(compare="torch"))
    assert [one.name for one in contestants] == ["unet", *TORCHS] and flops > 1e6
    assert needed[0] > 0 and len(released) == 2 and released[0]._network is None
    assert [contestant.times is None for contestant in contestants] == [True, False, False]
    rows = speed._rows(contestants, paired.measure(contestants, 5), flops, 1e9)
    assert [row["apart"] for row in rows] == [False, True, True] and rows[0]["ratio"] > 0
    facts = dict(cores=1, devices=1, precision="float32", rounds=5)
    table = speed._table([row | facts for row in rows], "train")
    assert table.endswith("torch was measured before ours, for both don't fit at once")


def test_a_compiled_peer_steps_the_weights_of_the_one_that_it_was_made_of(settings, monkeypatch):
    monkeypatch.setattr(torch_peer.torch, "compile", lambda module: module.forward)
    eager = torch_peer.TorchNetwork(network.random_network(settings), settings, "NCHW")
    inputs = network.make_inputs(settings, 2)
    first = speed._first_steps(eager, inputs, exact=False)
    second = speed._first_steps(eager.compiled(), inputs, exact=False)
    assert len(first.losses) == 2 and second.expected == second.losses
    assert second.losses[0] < first.losses[1] < first.losses[0]


@pytest.mark.parametrize("program", speed.PROGRAMS)
def test_a_transformers_results_are_torchs(program):
    """Of every tensor that torch trains; Euler's method on the straight path."""
    changes = {"model.dual_attention_layers": (0,), "model.num_layers": 2, "sample.steps": 2}
    settings = parse(mmdit_dict(**FEW | changes))
    contestants, flops = speed.NETWORK[program](settings, SpeedBenchmark(compare="torch"))
    assert [contestant.name for contestant in contestants] == ["transformer", "torch NCHW"]
    assert flops > 1e6
    for contestant in contestants:  # have had one turn, and have many
        assert np.isfinite(np.asarray(contestant.call())).all()
    missing = "model.kind='mmdit'"
    assert torch_method.lacking(settings) == missing and method._torch_method(settings) == []


@pytest.mark.parametrize(
    "changes", [{}, {"diffusion.prediction_type": "epsilon", "train.caption_dropout": 0.9}]
)
def test_the_methods_step_in_torch_gives_our_loss_and_parameters(changes):
    contestants = method._torch_method(parse(config_dict(**SMALL, **changes)))  # which checks it
    assert [contestant.name for contestant in contestants] == [
        "torch method channels_last",
        "torch method NCHW",
    ]


@pytest.mark.slow  # bash launch/test.sh -m slow tests/test_speed.py
def test_a_method_that_differs_gives_no_ratio_and_one_that_torch_lacks_is_left_out(
    settings, monkeypatch
):
    # No context in the forward process.
    monkeypatch.setattr(torch_method, "shift_coefficient", lambda schedule, t, shift: 0 * t)
    with pytest.raises(RunError, match="torch method channels_last, loss: .*no ratio"):
        method._torch_method(settings)
    linear = dataclasses.replace(
        settings, context=dataclasses.replace(settings.context, kind="linear")
    )
    assert (
        torch_method.lacking(linear) == "context.kind='linear'"
        and method._torch_method(linear) == []
    )


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("forward", lambda output: output * 1.001, "torch channels_last, output"),
        ("step", lambda loss: loss * 1.001, "torch channels_last, loss"),
        (
            "parameters",
            lambda tensors: {n: a + 1e-4 * (n == "conv_in.bias") for n, a in tensors.items()},
            "conv_in.bias",
        ),
        (
            "sample",
            lambda images: np.where(images == images.max(), np.nan, images),
            "torch channels_last, samples",
        ),
    ],
)
def test_no_ratio_where_results_differ(settings, monkeypatch, method, change, words):
    true = getattr(torch_peer.TorchNetwork, method)
    monkeypatch.setattr(
        torch_peer.TorchNetwork, method, lambda *arguments: change(true(*arguments))
    )
    make = speed.NETWORK["sample" if method == "sample" else "train"]
    with pytest.raises(RunError, match=words) as error:
        make(settings, SpeedBenchmark(compare="torch"))
    assert "no ratio" in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_compared_is_refused_in_one_line(settings, monkeypatch):
    with pytest.raises(ValueError, match="--compare='jax': unknown for --mode=train; one of torch"):
        SpeedBenchmark(compare="jax")
    with pytest.raises(ValueError, match="--repeats=3: must be at least 5"):
        SpeedBenchmark(rounds=3)
    uneven = dataclasses.replace(settings, sample=dataclasses.replace(settings.sample, steps=7))
    with pytest.raises(ValueError, match="sample.steps=7: must divide diffusion.num_timesteps=50"):
        torch_peer.make_scheduler(uneven)
    curved = dataclasses.replace(
        settings,
        diffusion=dataclasses.replace(
            settings.diffusion, schedule="edm", prediction_type="velocity"
        ),
    )
    with pytest.raises(ValueError, match="schedule='edm': unknown for --compare='torch'; .* flow"):
        torch_peer.make_scheduler(curved)
    monkeypatch.setattr(speed, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(
        ValueError,
        match="--compare='torch': no_such_package not installed; see requirements-test.txt",
    ):
        SpeedBenchmark(compare="torch")


@pytest.mark.slow  # half a minute, seven compiled programs: pytest -m slow tests/test_speed.py
def test_the_command_prints_ratio_and_share_of_the_context_and_writes_json(tmp_path):
    done = command(
        "benchmark",
        "--mode=train",
        "--config=configs/base.py",
        *overrides(TINY | SMALLEST_BY_FLAGS | FEW),
        "--compare=torch",
        f"--json={tmp_path / 'rows.json'}",
        env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    peers = ["torch channels_last", "torch NCHW"]
    whole = [
        "method, with context",
        "method, without context",
        "torch method channels_last",
        "torch method NCHW",
    ]
    assert list(rows) == ["unet", *peers, *whole]
    assert (
        rows["method, with context"]["ratio"] > 0
        and rows["method, with context"]["peer"] in whole[2:]
    )
    assert (
        rows["unet"]["ratio"] > 0
        and rows["unet"]["compile_seconds"] > 0
        and rows["unet"]["rounds"] == 5
    )
    assert rows["unet"]["devices"] == (
        num_cores() if SMALL["train.batch_size"] % num_cores() == 0 else 1
    )
    peak = rows["unet"]["matmul_peak_flops_per_second"]
    assert rows["unet"]["share_of_peak"] == rows["unet"]["flops_per_second"] / peak
    assert -1 < rows["method, with context"]["context_share"] < 1
    assert (
        all(name in done.stdout for name in rows)
        and "times [" in done.stdout
        and "the context is" in done.stdout
    )


def test_what_does_not_change_in_the_loop_is_computed_before_it():
    """The prompt's keys and values, of every cross-attention: XLA moves them out of the sampling
    loop, no cache is needed.
    """
    length, batch = 7, 3  # 2 x 3 x 7 rows are nothing else's
    settings = parse(config_dict(**ONE_LEVEL | FEW, **{"data.max_length": length}))
    unet = network.random_network(settings)
    x = network.make_inputs(settings, batch)["x"]
    inputs = network.make_inputs(settings, 2 * batch) | {"x": x}
    graph, params = nnx.split(unet)
    program = (
        jax.jit(network.sampling_loop(graph, settings))
        .lower(params, {k: inputs[k] for k in ("x", "text")})
        .compile()
        .as_text()
    )
    body = re.search(r"body=%?([\w.-]+)", program)[1]
    rows = {  # by computation, the matrices of that many rows that an operation makes
        text.split()[0].lstrip("%"): re.findall(
            rf"= f32\[{2 * batch * length},\d+\]\S* (?:dot|fusion)\(", text
        )
        for text in re.split(r"\n(?=%|ENTRY )", program)
    }
    # Both guidance branches; down, middle and up.
    assert not rows[body] and len(rows["ENTRY"]) >= 2 * 3
