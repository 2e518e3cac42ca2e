"""Our training step and sampling loop in turns with torch's, and what the context adds to them.

The network alone does the same work on both sides: the same weights (random, every tensor of
weight), inputs and cores, AdamW on the mean squared error, or DDIM (on the straight path Euler's
method) with guidance. Ours is on all of JAX's devices, by the config's mesh: on a CPU the command
makes one a core, unless JAX_NUM_CPU_DEVICES says otherwise. Before a ratio is given the results
must agree: the output, and after a step its loss and the change of each parameter; samples. The
whole method's step is measured with and without its context, and against torch's (torch_method.py,
for the configs that it has); its sampling loop only with and without.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.util
import logging
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from contextdiff_jax.benchmarks import paired, profiled, turns
from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.measured import (
    Devices,
    Inputs,
    Stepper,
    check,
    check_change,
    compile_timed,
    program_bytes,
    tolerances,
)
from contextdiff_jax.benchmarks.method import WITH_CONTEXT, WITHOUT_CONTEXT, contestants_of_method
from contextdiff_jax.benchmarks.network import (
    make_adamw,
    make_inputs,
    predict,
    random_network,
    sampling_loop,
    to_torch,
    training_step,
)
from contextdiff_jax.benchmarks.paired import Contestant, Times
from contextdiff_jax.models.backbones import Backbone
from contextdiff_jax.runs.model import precision_of
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.settings import Settings

if TYPE_CHECKING:
    from contextdiff_jax.benchmarks.torch_peer import TorchNetwork

LOGGER = logging.getLogger(__name__)
PEERS = ("torch",)
SUBJECTS = ("network", "method")
PACKAGES = ("torch", "diffusers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedBenchmark:
    """`program`: of `PROGRAMS`. `compare`: of `PEERS`, or empty for ours alone. `rounds`: of each
    contestant. `subjects`: of `SUBJECTS`, the network alone and the whole method. `profile`: folder
    for a profile of our network's program, whose kernels are told.
    """

    program: str = "train"
    compare: str = ""
    rounds: int = 5
    subjects: tuple[str, ...] = ("network", "method")
    profile: str = ""

    def __post_init__(self):
        for subject in self.subjects:
            check_choice("--subjects", subject, SUBJECTS)
        if self.compare:
            check_choice("--compare", self.compare, PEERS, f"--mode={self.program}")
        lacking = [
            package
            for package in PACKAGES
            if self.compare and importlib.util.find_spec(package) is None
        ]
        if lacking:
            raise ValueError(
                f"--compare='torch': {', '.join(lacking)} not installed; see requirements-test.txt"
            )
        if self.rounds < 5:
            raise ValueError(
                f"--repeats={self.rounds}: must be at least 5 with --mode={self.program}"
            )


def _peers(network: Backbone, settings: Settings, compare: str) -> dict[str, TorchNetwork]:
    if not compare:
        return {}
    from contextdiff_jax.benchmarks import torch_peer

    return torch_peer.peers(network, settings)


def _compiled_peak(program: Any) -> Callable[[Callable[[], Any]], int | None]:
    """`peak_bytes` of a program of ours; on a CPU the process tells."""
    told = jax.default_backend() != "cpu" and program.memory_analysis() is not None
    return lambda call: program_bytes(program) if told else None


def _train(settings: Settings, options: SpeedBenchmark) -> tuple[list[Contestant], float]:
    """The network's training steps, checked against each other, and the operations of one."""
    train = settings.train
    LOGGER.info("drawing the weights")
    model, inputs = random_network(settings), make_inputs(settings, train.batch_size)
    peers = _peers(model, settings, options.compare)
    precision = train.precision
    exact = tolerances(precision)["parameters"] is not None
    before = to_torch(model) if peers and exact else {}
    devices, (graph, params) = Devices(settings), nnx.split(model)
    placed, params = devices.batch(inputs), devices.parameters(params)
    optimizer = make_adamw(train)

    def compiled() -> tuple[np.ndarray | None, Stepper]:
        with devices.tracing():
            output = np.asarray(jax.jit(forward)(params, placed)) if exact else None
            moments = devices.described(jax.eval_shape(optimizer.init, params))
            step = Stepper(training_step(graph, optimizer), params, moments, rest=(placed,))
            LOGGER.info("compiled our step in %.0f s", step.compile_seconds)
            return output, step

    def forward(params, inputs):
        return predict(nnx.merge(graph, params), inputs["x"], inputs["t"], inputs)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles beside torch
        begun = pool.submit(compiled)
        firsts = {name: _first_steps(peer, inputs, exact) for name, peer in peers.items()}
        output, ours = begun.result()
    theirs = [Contestant(n, f.step, peak_bytes=peers[n].peak_bytes) for n, f in firsts.items()]
    needed = program_bytes(ours.program) - sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if peers and not next(iter(peers.values())).has_room_for(needed):
        theirs = _measured_apart(theirs, options.rounds)
        for peer in peers.values():
            peer.release()
    ours.state = [params, devices.parameters(jax.jit(optimizer.init)(params))]
    losses = [float(ours())]
    after = to_torch(nnx.merge(graph, ours.state[0])) if before else {}
    if not exact:
        losses.append(float(ours()))
    peak = _compiled_peak(ours.program)
    contestants = [Contestant(model.name, ours, ours.compile_seconds, peak)]
    for name, first in firsts.items():
        expected = losses if first.expected is None else first.expected
        check(f"{name}, losses", expected, first.losses, precision, of="loss")
        if exact and first.output is not None:
            check(f"{name}, output", output, first.output, precision, of="output")
            check_change(f"{name}, parameters", before, after, first.parameters)
    return [*contestants, *theirs], ours.flops


def _measured_apart(contestants: list[Contestant], rounds: int) -> list[Contestant]:
    """Measure them now, without ours: with it the device has too little memory."""
    LOGGER.info("waiting for the device, which has too little memory for both at once")
    with turns.alone():
        times = paired.measure(contestants, rounds)
        peaks = {c.name: c.peak_bytes and c.peak_bytes(c.call) for c in contestants}
    return [
        c._replace(times=times[c.name], peak_bytes=lambda _, peak=peaks[c.name]: peak)
        for c in contestants
    ]


class _First(NamedTuple):
    """A peer's step and what it gave at first: the loss, with the output before it and the
    parameters after it, or, where these aren't compared, the losses of two steps. `expected`: of a
    compiled one, the losses without.
    """

    step: Callable[[], float]
    losses: list[float]
    output: np.ndarray | None = None
    parameters: Mapping[str, np.ndarray] | None = None
    expected: list[float] | None = None


def _first_steps(peer: TorchNetwork, inputs: Inputs, exact: bool) -> _First:
    LOGGER.info("first steps of torch's%s", ", compiled" * (peer.eager is not None))
    tensors = peer.tensors(inputs)
    step = functools.partial(peer.step, tensors)
    if peer.eager is not None:  # with the same weights, which have had their first steps
        expected = peer.eager.loss(tensors)
        return _First(step, [step()], expected=[expected])
    output = peer.forward(tensors) if exact else None
    loss = step()
    if exact:
        return _First(step, [loss], output, peer.parameters())
    return _First(step, [loss, step()])


def _sample(settings: Settings, options: SpeedBenchmark) -> tuple[list[Contestant], float]:
    """The network's sampling loops, checked against each other, and the operations of one."""
    LOGGER.info("drawing the weights")
    model, batch = random_network(settings), settings.train.batch_size
    peers = _peers(model, settings, options.compare)
    inputs = make_inputs(settings, 2 * batch) | {"x": make_inputs(settings, batch)["x"]}
    del inputs["target"], inputs["t"]
    devices, (graph, params) = Devices(settings), nnx.split(model)
    dtype = precision_of(settings).compute
    params = jax.tree.map(lambda p: p.astype(dtype), params)  # as torch's weights are when sampling
    arguments = devices.parameters(params), devices.batch(inputs)

    def compiled() -> tuple[Callable, float, float]:
        with devices.tracing():
            found = compile_timed(sampling_loop(graph, settings), *arguments)
        LOGGER.info("compiled our loop in %.0f s", found[1])
        return found

    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles beside torch
        begun = pool.submit(compiled)
        runs = {name: peer.sampler(inputs, settings) for name, peer in peers.items()}
        LOGGER.info("first pictures of torch's")
        theirs = {name: run() for name, run in runs.items()}
        program, compile_seconds, flops = begun.result()

    def call() -> jax.Array:
        return jax.block_until_ready(program(*arguments))

    ours = Contestant(model.name, call, compile_seconds, _compiled_peak(program))
    contestants, images = [ours], np.asarray(call())
    for name, run in runs.items():
        check(f"{name}, samples", images, theirs[name], settings.train.precision, of="samples")
        contestants.append(Contestant(name, run, peak_bytes=peers[name].peak_bytes))
    return contestants, flops


NETWORK = {"train": _train, "sample": _sample}
PROGRAMS = tuple(NETWORK)


def run(settings: Settings, options: SpeedBenchmark) -> Result:
    """Measures both groups and says what was found.

    Raises:
        ValueError: for a config in which nothing can be compared: pretrained or latent networks.
        RunError: ours and a peer's results differ.
    """
    for field, value in (
        ("model.pretrained", settings.pretrained),
        ("latent.vae", settings.latent.vae),
        ("text.pretrained", settings.text.pretrained),
        ("context.clip", settings.context.clip),
    ):
        if value:
            raise ValueError(
                f"{field}={value!r}: --mode={options.program} measures networks of random "
                "weights; must be empty"
            )
    dtype = precision_of(settings).compute
    rows, kernels = [], None
    if "network" in options.subjects:
        contestants, flops = NETWORK[options.program](settings, options)
        LOGGER.info("waiting for the device")
        with turns.alone():
            LOGGER.info("measuring")
            times, peak = (
                paired.measure(contestants, options.rounds),
                paired.matmul_peak(dtype=dtype),
            )
            rows += _rows(contestants, times, flops, peak)
            if options.profile:
                kernels = profiled.summed(
                    profiled.record(contestants[0].call, options.profile).read_bytes()
                )
                rows[0]["kernels"] = kernels.rows
        del contestants  # the peers' memory and ours
    if "method" in options.subjects:
        rows += _method_rows(settings, options, dtype)
    facts = {
        "program": options.program,
        "precision": settings.train.precision,
        "batch": settings.train.batch_size,
        "cores": num_cores(),
        "devices": jax.device_count(),
        "rounds": options.rounds,
    }
    rows = [row | facts for row in rows]
    text = _table(rows, options.program)
    if kernels is not None:
        text += "\n" + profiled.table(kernels)
    return Result(text, rows)


def _method_rows(
    settings: Settings, options: SpeedBenchmark, dtype: DTypeLike
) -> list[dict[str, Any]]:
    """The whole method's, the first with what the context's share of the time is."""
    contestants = contestants_of_method(settings, options.program, options.compare)
    with turns.alone():
        times, peak = paired.measure(contestants, options.rounds), paired.matmul_peak(dtype=dtype)
        rows = _rows(contestants, times, 0.0, peak)
    if WITH_CONTEXT in times:
        with_context, without = times[WITH_CONTEXT].wall, times[WITHOUT_CONTEXT].wall
        differences = [a - b for a, b in zip(with_context, without, strict=True)]
        share = paired.ratio(differences, with_context)
        rows[0] |= {
            "context_share": share.value,
            "context_share_quartiles": [share.low, share.high],
        }
    return rows


def _rows(
    contestants: list[Contestant], times: Mapping[str, Times], flops: float, peak: float
) -> list[dict[str, Any]]:
    """A row a contestant. The first's is compared with the best of the others where they are
    torch's.
    """
    rows = []
    for name, call, compile_seconds, peak_bytes, before in contestants:
        seconds = statistics.median(times[name].wall)
        row = {
            "name": name,
            "seconds": seconds,
            "all_seconds": times[name].wall,
            "all_cpu_seconds": times[name].cpu,
            "cpu_seconds": statistics.median(times[name].cpu),
            "compile_seconds": compile_seconds,
            "extra_memory_bytes": None if before else paired.extra_memory(call),
            "apart": before is not None,
            "matmul_peak_flops_per_second": peak,
            "peak_bytes": peak_bytes(call) if peak_bytes else None,
        }
        if flops:
            row |= {
                "flops": flops,
                "flops_per_second": flops / seconds,
                "share_of_peak": flops / seconds / peak,
            }
        rows.append(row)
    peers = [row for row in rows if row["name"].startswith("torch")]
    if peers:
        best = min(peers, key=lambda row: row["seconds"])
        found = {
            kind: paired.ratio(best[f"all{kind}"], rows[0][f"all{kind}"])
            for kind in ("_seconds", "_cpu_seconds")
        }
        rows[0] |= {
            "peer": best["name"],
            "ratio": found["_seconds"].value,
            "ratio_quartiles": list(found["_seconds"][1:]),
            "cpu_ratio": found["_cpu_seconds"].value,
            "cpu_ratio_quartiles": list(found["_cpu_seconds"][1:]),
        }
    return rows


def _table(rows: list[dict[str, Any]], program: str) -> str:
    head = f"{program}, {rows[0]['cores']} cores, {rows[0]['devices']} devices"
    lines = [
        f"{head:<30}{'s':>9}{'CPU s':>9}{'GFLOP/s':>9}{'of peak':>9}{'compile s':>11}"
        f"{'memory MiB':>12}  ahead"
    ]
    for row in rows:
        rate = f"{row['flops_per_second'] / 1e9:.1f}" if "flops" in row else "-"
        share = f"{row['share_of_peak']:.0%}" if "flops" in row else "-"
        taken = row["peak_bytes"] or row["extra_memory_bytes"]
        memory = "-" if taken is None else f"{taken / 2**20:.0f}"
        compiling = f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "-"
        told = ""
        if "ratio" in row:
            wall, cpu = (
                [row[f"{kind}ratio"], *row[f"{kind}ratio_quartiles"]] for kind in ("", "cpu_")
            )
            told = "{:.2f} times [{:.2f}, {:.2f}] of {}; in CPU s {:.2f} [{:.2f}, {:.2f}]".format(
                *wall, row["peer"], *cpu
            )
        if "context_share" in row:
            shares = row["context_share"], *row["context_share_quartiles"]
            told += "; " * bool(told)
            told += "the context is {:.1%} [{:.1%}, {:.1%}] of the time".format(*shares)
        lines.append(
            f"{row['name']:<30}{row['seconds']:>9.3f}{row['cpu_seconds']:>9.3f}{rate:>9}{share:>9}"
            f"{compiling:>11}{memory:>12}  {told}".rstrip()
        )
    peak = (
        f"peak: {rows[0]['matmul_peak_flops_per_second'] / 1e9:.0f} GFLOP/s in a matrix product of "
        f"{rows[0]['precision']}"
    )
    brackets = (
        f"brackets: quartiles of {rows[0]['rounds']} rounds; memory: the accelerator's, or what "
        "the process grew by in a call"
    )
    if any(row["apart"] for row in rows):
        brackets += "; torch was measured before ours, for both don't fit at once"
    return "\n".join([*lines, f"{peak}; {brackets}"])
