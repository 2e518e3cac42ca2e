"""A train step, a sampling loop or a clip's edit compiled for TPUs that aren't here: memory,
seconds, traffic.

The compiler is libtpu's own; nothing runs, no parameter is made. Its time is an estimate of the
program without what waits for other chips, and it takes a Pallas kernel's work for nothing, so to
its seconds come, each in a column of its own,

    kernels      the longer of an attention kernel's operations (padding included) /
                 (KERNEL_EFFICIENCY x the chip's peak), and its bytes / the HBM's bandwidth
    collectives  bytes that a chip sends / the bandwidth of its links along one axis, as if nothing
                 were overlapped
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.tpu import hlo, unrolled
from contextdiff_jax.benchmarks.tpu.aot_table import table, training_days
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.inference.pipeline import method_of
from contextdiff_jax.inference.sampling import Text
from contextdiff_jax.models.contextdiff import Frozen
from contextdiff_jax.models.remat import POLICIES
from contextdiff_jax.parallel.chips import CHIPS, Chip
from contextdiff_jax.parallel.mesh import (
    Feed,
    MeshConfig,
    make_mesh,
    place,
    replicated,
    state_shardings,
)
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.compilation import jit_step
from contextdiff_jax.training.state import init_state

LOGGER = logging.getLogger(__name__)
EDIT = "edit"
PROGRAMS = ("train", "sample", EDIT)
# What a program's parts add up to, of `predicted`.
ADDITIVE = (
    "seconds",
    "compiler_seconds",
    "cycle_seconds",
    "kernel_seconds",
    "flops",
    "compiler_flops",
    "kernel_flops",
    "kernel_calls",
)
KERNEL_EFFICIENCY = 0.5  # of the peak, padding counted as work: an assumption, not a measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotBenchmark:
    """Programs to compile.

    Attributes:
        topology: chips and their arrangement, such as v5e:4x4.
        program: `train`, `sample` or `edit`, whose settings are an edit's.
        batch_per_chip: replaces train.batch_size (0: the config's). For `sample` these are prompts
            (0: one).
        images: of the whole training, whose days are told; 0: train.steps x train.batch_size.
        sweep: also other meshes, rematerialisations and batches.
    """

    topology: str
    program: str = "train"
    batch_per_chip: int = 0
    images: int = 0
    sweep: bool = False

    def __post_init__(self):
        check_choice("--program", self.program, PROGRAMS)
        if self.program == EDIT and (self.sweep or self.batch_per_chip):
            raise ValueError("--program=edit: has neither --sweep nor --batch_per_chip")
        if not self.topology:
            raise ValueError(
                "--topology: missing; chips and their arrangement, as in --topology=v5e:4x4"
            )


def described_devices(topology: str) -> list[Any]:
    """The devices of a topology that needn't exist. ValueError if libtpu isn't installed or doesn't
    know it.
    """
    # libtpu asks the machine what it is part of, and takes a lock that one process holds: nothing
    # here runs on a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:  # a JaxRuntimeError is a RuntimeError
        known = "as in v5e:4x4, v5p:4x4x4, v6e:16x16 (libtpu of requirements-tpu.txt)"
        raise ValueError(f"--topology={topology!r}: {error}; {known}") from None
    if devices[0].device_kind not in CHIPS:
        raise ValueError(
            f"--topology={topology!r}: {devices[0].device_kind!r} is not in the table of chips, "
            f"{', '.join(CHIPS)}"
        )
    return devices


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree's arrays with their places."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )


def _text(
    settings: Settings, frozen: Frozen, rows: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    length = settings.data.max_length
    ids, mask = ((length,), (length,)) if frozen.text is None else frozen.text.shapes(length)
    arrays = {"token_ids": (ids, jnp.int32), "token_mask": (mask, jnp.bool_)}
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in arrays.items()
    }


def abstract_batch(
    settings: Settings, feed: Feed, frozen: Frozen = Frozen()
) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch's shapes on the mesh, as the loader of `data.source` gives them."""
    (H, W, C), B = settings.shape, settings.train.batch_size
    size = settings.data.crop_size or settings.data.image_size
    if settings.data.kind.is_cache and settings.latent.vae:
        arrays = {name: ((B, H, W, C), jnp.float16) for name in ("latent_mean", "latent_std")}
    else:
        arrays = {"image": ((B, size, size, 3 if settings.latent.vae else C), jnp.uint8)}
    images = {
        name: jax.ShapeDtypeStruct(s, d, sharding=feed.sharding(s))
        for name, (s, d) in arrays.items()
    }
    return images | _text(settings, frozen, B, feed.sharding((B, settings.data.max_length)))


def lower(settings: Settings, program: str, mesh: Mesh, frozen: Frozen) -> jax.stages.Lowered:
    """The program, lowered for the mesh's platform."""
    whole, rules = replicated(mesh), settings.mesh.rules
    state = jax.eval_shape(lambda: init_state(settings))
    shardings = state_shardings(mesh, state, rules)
    state, frozen = (
        abstract(state, shardings),
        abstract(frozen, state_shardings(mesh, frozen, rules)),
    )
    if program == "train":
        batch = abstract_batch(settings, Feed(mesh, settings.train.batch_size, rules), frozen)
        null = _text(settings, frozen, 1, whole)
        return jit_step(settings, shardings, batch, null, frozen).lower(state, batch, null, frozen)
    B, key = settings.train.batch_size, jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=whole)
    spread = place(mesh, (B, 1), ("batch", None), rules)
    text = (_text(settings, frozen, *each).values() for each in ((B, spread), (1, whole)))
    text = Text(*itertools.chain(*text))
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=whole)
    guidance = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    pipeline = of_run(settings, None, state.ema, frozen=frozen, mesh=mesh)
    steps = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
        pipeline.opened.find_steps(settings.sample),
    )
    program = pipeline.program(method_of(settings.sample), settings.shape)
    weights, small = pipeline.opened.weights, _small(settings, mesh)
    more = None, None, small
    return program.lower(weights, key, integers((B,)), None, text, steps, guidance, key, *more)


def _small(settings: Settings, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...] | None:
    """The pictures that an upsampler enlarges, and the level of their noise."""
    factor = settings.super_resolution.factor
    if not factor:
        return None
    side = settings.data.image_size // factor
    shape = (settings.train.batch_size, side, side, 3)
    spread = place(mesh, shape, ("batch", None, None, None), settings.mesh.rules)
    level = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=spread), level


def run(settings: Settings, options: AotBenchmark) -> Result:
    """Compiles, and tells what the programs would need. ValueError for a topology or a batch that
    can't be.
    """
    devices = described_devices(options.topology)
    if settings.train.accumulation > 1:
        LOGGER.info(
            "train.accumulation=%d: the loop's seconds are those of its parts together",
            settings.train.accumulation,
        )
    frozen = load_frozen(settings, described=True)
    images = options.images or settings.train.steps * settings.train.batch_size
    candidates = list(_candidates(settings, len(devices))) if options.sweep else [settings]
    rows = []
    for candidate in candidates:
        default = candidate.train.batch_size if options.program == "train" else len(devices)
        batch = options.batch_per_chip * len(devices) or default
        if not options.sweep or options.batch_per_chip:
            candidate = dataclasses.replace(
                candidate, train=dataclasses.replace(candidate.train, batch_size=batch)
            )
        mesh = make_mesh(
            candidate.mesh, candidate.train.batch_size, candidate.train.accumulation, devices
        )
        rows.append(compile_row(candidate, options.program, mesh, frozen))
        if options.program == "train" and rows[-1]["seconds"]:
            rows[-1] |= training_days(rows[-1], images, candidate.train.batch_size)
        LOGGER.info("%s: %s", rows[-1]["name"], "fits" if rows[-1]["fits"] else "doesn't fit")
    rows.sort(key=lambda row: (not row["fits"], -row.get("pictures_per_second", 0)))
    text = table(rows, options.program, options.topology, KERNEL_EFFICIENCY)
    return Result(text, rows)


def _candidates(settings: Settings, chips: int) -> Iterator[Settings]:
    """Meshes x rematerialisations x batches a chip, those that a mesh can share."""
    meshes = [(chips // f, f) for f in (1, 4, 16, chips) if chips % f == 0 and f <= chips]
    per_chip = max(settings.train.batch_size // chips, 1)
    for (data, fsdp), remat, batch in itertools.product(
        dict.fromkeys(meshes), POLICIES, (per_chip, 2 * per_chip, 4 * per_chip)
    ):
        train = dataclasses.replace(settings.train, remat=remat, batch_size=batch * chips)
        mesh = MeshConfig(data=data, fsdp=fsdp, rules=settings.mesh.rules)
        yield dataclasses.replace(settings, train=train, mesh=mesh)


def compile_row(settings: Settings, program: str, mesh: Mesh, frozen: Frozen) -> dict[str, Any]:
    """One program's figures, a chip; what doesn't fit has the compiler's own reason instead."""
    chip = CHIPS[mesh.devices.flat[0].device_kind].described()
    shape = {axis: size for axis, size in mesh.shape.items() if size > 1}
    name = " ".join([f"{a}={n}" for a, n in shape.items()] or ["1 chip"])
    row = {
        "name": f"{program} {name} remat={settings.train.remat} batch={settings.train.batch_size}",
        "program": program,
        "chip": chip.name,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "remat": settings.train.remat,
        "attention": settings.train.attention,
        "batch_per_chip": settings.train.batch_size / mesh.size,
        "hbm": chip.hbm,
        "optimization_level": jax.config.jax_optimization_level,
    }
    start = time.perf_counter()
    lowered = lower(settings, program, mesh, frozen)
    row["trace_seconds"] = time.perf_counter() - start
    row |= tried(lowered, mesh, trips(settings, program), settings.train.batch_size)
    if row["seconds"] is not None and unrolled.is_looped(settings):
        row |= _looped(settings, program, mesh, frozen)
    return row


def tried(lowered: jax.stages.Lowered, mesh: Mesh, loop: int, pictures: int) -> dict[str, Any]:
    """A program's figures; of one that doesn't fit the compiler's reason. `loop`, `pictures`: as
    `figures` takes them.
    """
    start = time.perf_counter()
    try:
        compiled = compiled_anew(lowered)
    except jax.errors.JaxRuntimeError as error:
        reason = out_of_memory(str(error))
        if reason is None:
            raise
        found = {"fits": False, "seconds": None, "reason": reason}
        return found | {"compile_seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    return figures(compiled, mesh, loop, pictures) | {"compile_seconds": seconds}


def _looped(settings: Settings, program: str, mesh: Mesh, frozen: Frozen) -> dict[str, Any]:
    """What the compiler counts, a loop's body as often as it runs (benchmarks.tpu.unrolled)."""
    chip = CHIPS[mesh.devices.flat[0].device_kind].described()

    def measure(candidate: Settings) -> dict[str, float]:
        compiled = compiled_anew(lower(candidate, program, mesh, frozen))
        instructions = hlo.instructions(compiled.as_text())
        cost = predicted(compiled, chip, instructions, trips(candidate, program))
        return {name: cost[name] for name in ADDITIVE}

    whole, layers = unrolled.counted(settings, measure)
    batch = settings.train.batch_size / mesh.size
    return whole | {
        "utilisation": whole["flops"] / whole["seconds"] / chip.peak,
        "pictures_per_second": settings.train.batch_size / whole["seconds"],
        "layers": [
            unrolled.describe(layer, batch, chip.peak) for layer in layers if program == "train"
        ],
    }


def trips(settings: Settings, program: str) -> int:
    """How often the program's outer loop runs."""
    return settings.sample.steps if program == "sample" else settings.train.accumulation


def compiled_anew(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles without the cache, which can't read what was compiled for devices that aren't here,
    and warns of it.
    """
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def out_of_memory(message: str) -> str | None:
    """The line of a compiler's refusal that says how much is missing; None if that is not what it
    is.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm[^\n]*", message)
    return found[0] if found else message.splitlines()[0]


def predicted(
    compiled: jax.stages.Compiled, chip: Chip, program: list[hlo.Instruction], loop: int = 1
) -> dict[str, Any]:
    """Seconds and operations of a compiled program, the kernels' in columns of their own. A loop's
    body (`sample`, accumulation) is counted as often as the loop runs it.
    """
    cost, kernels = compiled.cost_analysis(), hlo.kernels(program)
    hidden = sum(kernel.flops * kernel.times for kernel in kernels)
    hidden_seconds = sum(
        kernel.times
        * max(kernel.flops / (KERNEL_EFFICIENCY * chip.peak), kernel.num_bytes / chip.hbm_bandwidth)
        for kernel in kernels
    )
    flops = cost["flops"] * loop
    # The estimate counts what it can't tell (some asynchronous slices) as -1 s each; a step takes
    # no less than its products do.
    unknown = max(math.ceil(cost["flops"] / chip.peak - cost["optimal_seconds"]), 0)
    xla = (cost["optimal_seconds"] + unknown) * loop
    seconds = xla + hidden_seconds
    return {
        "seconds": seconds,
        "compiler_seconds": xla,
        "cycle_seconds": hlo.cycles(program) / chip.clock,
        "unknown": unknown,
        "kernel_seconds": hidden_seconds,
        "flops": flops + hidden,
        "compiler_flops": flops,
        "kernel_flops": hidden,
        "kernel_calls": sum(kernel.times for kernel in kernels),
        "utilisation": (flops + hidden) / seconds / chip.peak,
    }


def figures(compiled: jax.stages.Compiled, mesh: Mesh, loop: int, pictures: int) -> dict[str, Any]:
    """Read memory, seconds and traffic of a compiled program, whose outer loop runs `loop` times
    and which makes that many pictures.
    """
    chip = CHIPS[mesh.devices.flat[0].device_kind].described()
    memory, instructions = compiled.memory_analysis(), hlo.instructions(compiled.as_text())
    traffic = hlo.collectives(instructions, mesh.shape)
    cost = predicted(compiled, chip, instructions, loop)
    return cost | {
        "fits": memory.peak_memory_in_bytes <= chip.hbm,
        "collective_seconds": sum(row.sent_bytes for row in traffic) / chip.link,
        "peak_hbm": memory.peak_memory_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program_bytes": memory.generated_code_size_in_bytes,
        "pictures_per_second": pictures / cost["seconds"],
        "collectives": [dataclasses.asdict(row) for row in traffic],
        "largest": [
            dict(zip(("array", "bytes", "made_by"), row, strict=True))
            for row in hlo.largest(instructions)
        ],
    }
