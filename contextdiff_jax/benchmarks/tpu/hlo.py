"""Reads a compiled program's text (optimized HLO): its collectives, kernels and arrays."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|f16|c64|[fsu]\d+)(?:e\w+)?\[([\d,]*)\]")
_XLA_KERNEL = "online-softmax"
# Products of a kernel by the start of its name, each 2 * queries * keys * width operations.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5, _XLA_KERNEL: 1}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program; `times` it runs, by the trip counts of the loops around it."""

    name: str
    computation: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the result, (type, sides)
    opcode: str
    rest: str  # operands and attributes
    times: int = 1

    @property
    def num_bytes(self) -> int:
        """Size of the result, without what tiling pads."""
        return sum(_bits(kind) * math.prod(sides) for kind, sides in self.shapes) // 8


def _bits(kind: str) -> int:
    return _BITS.get(kind) or int(re.sub(r"\D", "", kind))


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (kind, tuple(int(n) for n in sides.split(",") if n)) for kind, sides in _ARRAY.findall(text)
    )


def instructions(text: str) -> list[Instruction]:
    """All instructions of all computations."""
    found, computation = [], ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            found.append(Instruction(match[1], computation, _shapes(match[2]), match[3], match[4]))
    times = _loop_counts(found)
    return [dataclasses.replace(each, times=times.get(each.computation, 1)) for each in found]


def _loop_counts(found: list[Instruction]) -> dict[str, int]:
    """The number of times that each computation runs.

    A loop whose trip count neither XLA nor its condition tells counts once.
    """
    callers: dict[str, tuple[str, int]] = {}
    bounds = _bounds(found)
    for each in found:
        trips = (
            re.search(r'known_trip_count[\\":{]+n[\\":]+(\d+)', each.rest)
            if each.opcode == "while"
            else None
        )
        if each.opcode == "while" and trips is None:
            condition = re.search(r"condition=%?([\w.\-]+)", each.rest)
            trips = [None, bounds.get(condition[1], 1)] if condition else None
        for called in re.findall(
            r"(?:calls|body|condition|to_apply|async_execution_thread)=%?([\w.\-]+)", each.rest
        ):
            callers[called] = (each.computation, int(trips[1]) if trips else 1)

    def count(name: str, depth: int = 0) -> int:
        if name not in callers or depth > 50:
            return 1
        caller, trips = callers[name]
        return trips * count(caller, depth + 1)

    return {name: count(name) for name in callers}


def _bounds(found: list[Instruction]) -> dict[str, int]:
    """The number that a counter is below while the loop runs, by the loop's condition: XLA:TPU
    writes no trip count, and JAX's loops count from 0.
    """
    numbers: dict[str, list[int]] = {}
    below = set()
    for each in found:
        if each.opcode == "constant" and (number := re.match(r"(\d+)\)", each.rest)):
            numbers.setdefault(each.computation, []).append(int(number[1]))
        if each.opcode == "compare" and "direction=LT" in each.rest:
            below.add(each.computation)
    return {name: of[0] for name, of in numbers.items() if name in below and len(of) == 1}


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Groups [G, S] of the numbers of an instruction's devices. They are written as lists,
    {{0,1},{2,3}}; as an array of numbers, [2,2]<=[2,2]T(1,0); as axes of a mesh, mesh['x'=2,'y'=4]
    {'x','y':(2)2}, where (2)2 are the inner 2 of 4; or as pairs of source and target. ValueError
    for another way.
    """
    if match := re.search(r"source_target_pairs=\{\{(.*?)\}\}", attributes):
        return _lists(match[1])
    if match := re.search(r"replica_groups=\{\{(.*?)\}\}", attributes):
        return _lists(match[1])
    if match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims = ([int(n) for n in group.split(",")] for group in match.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose([int(n) for n in match[3].split(",")]) if match[3] else ids).reshape(
            shape
        )
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        dims, inside = [], []  # each axis as (outer, chosen, inner)
        parts = re.findall(r"'(\w+)':\((\d+)\)(\d+)", match[2])
        chosen = {name: (int(before), int(size)) for name, before, size in parts}
        whole = set(re.findall(r"'(\w+)'(?!:)", match[2]))
        for name, size in sizes.items():
            before, width = (1, size) if name in whole else chosen.get(name, (size, 1))
            inside.append(len(dims) + 1)
            dims += [before, width, size // (before * width)]
        ids = np.moveaxis(np.arange(math.prod(dims)).reshape(dims), inside, range(-len(inside), 0))
        return ids.reshape(-1, math.prod(dims[i] for i in inside))
    if "replica_groups={}" in attributes:
        return np.arange(num_devices)[None]
    raise ValueError(f"a collective's groups are written in an unknown way: {attributes[:200]}")


def _lists(text: str) -> np.ndarray:
    return np.array([[int(n) for n in group.split(",")] for group in text.split("},{")])


def axes_of(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    coordinates = np.unravel_index(groups, tuple(mesh_shape.values()))  # an array [G, S] an axis
    return tuple(
        axis
        for axis, place in zip(mesh_shape, coordinates, strict=True)
        if (place != place[:, :1]).any()
    )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a chip of a ring sends in a step, for one kind of collective along some axes."""

    kind: str
    axes: str
    count: int
    sent_bytes: float


def collectives(program: list[Instruction], mesh_shape: Mapping[str, int]) -> list[Traffic]:
    """The collectives of a program, the largest first. In a ring of g chips an array of V bytes,
    whole, costs each of them V (g - 1) / g to gather or to scatter, and both to sum.

    One that XLA:TPU runs beside computations stands in each of their fusions, with the same
    channel: it counts once. A sum of which each keeps its part is a fusion named
    all-reduce-scatter.
    """
    totals: dict[tuple[str, str], tuple[int, float]] = {}
    counted = set()
    for each in program:
        kind = each.opcode.removesuffix("-start")
        channel = re.search(r"channel_id=\d+", each.rest)
        this = kind, channel[0] if channel else each.name
        if kind not in COLLECTIVES or this in counted:
            continue
        counted.add(this)
        groups = replica_groups(each.rest, math.prod(mesh_shape.values()))
        g = groups.shape[1]
        if g == 1:
            continue
        # A start's result is the pair (operand, result), with some counters.
        size = (
            max(_bits(kind) * math.prod(sides) // 8 for kind, sides in each.shapes)
            if each.opcode != kind
            else each.num_bytes
        )
        whole = size * g if kind == "reduce-scatter" and each.opcode == kind else size
        kind = "reduce-scatter" if each.computation.startswith("all-reduce-scatter") else kind
        sent = (
            whole
            if kind == "collective-permute"
            else whole * (g - 1) / g * (2 if kind == "all-reduce" else 1)
        )
        key = kind, "+".join(axes_of(groups, mesh_shape))
        count, total = totals.get(key, (0, 0.0))
        totals[key] = count + each.times, total + sent * each.times
    rows = [Traffic(*key, *value) for key, value in totals.items()]
    return sorted(rows, key=lambda row: -row.sent_bytes)


class Kernel(NamedTuple):
    """One call of a kernel: operations, with the head's width padded to the lanes, and bytes."""

    flops: float
    num_bytes: int
    times: int


def kernels(program: list[Instruction]) -> list[Kernel]:
    """The attention kernels, whose work XLA's cost analysis takes for nothing: ours, and the one
    that XLA:TPU itself puts in the place of a softmax and the product that follows.

    Read from the operands' shapes, [B, H, N, D] (or [H, N, D]), of this chip's part. ValueError for
    a kernel that isn't known.
    """
    found = []
    for each in program:
        if each.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in each.rest:
            continue
        products = next(
            (count for name, count in _KERNEL_PRODUCTS.items() if each.name.startswith(name)), None
        )
        if products is None:
            raise ValueError(
                f"{each.name}: a kernel whose work isn't known; one of "
                f"{', '.join(_KERNEL_PRODUCTS)}"
            )
        operands = re.search(
            r"operand_layout_constraints=\{((?:\w+\[[\d,]*\]\{[^}]*\}(?:, )?)*)\}", each.rest
        )[1]
        first, second = [
            sides
            for kind, sides in _shapes(operands)
            if kind in ("bf16", "f32") and len(sides) >= 3
        ][:2]
        # Ours read queries and keys, XLA's logits and values.
        rows, columns = (
            math.prod(first[:-1]),
            first[-1] if each.name.startswith(_XLA_KERNEL) else second[-2],
        )
        width = second[-1] + -second[-1] % 128
        moved = sum(
            _bits(kind) * math.prod(sides) // 8
            for kind, sides in (*_shapes(operands), *each.shapes)
        )
        found.append(Kernel(products * 2.0 * rows * columns * width, moved, each.times))
    return found


def cycles(program: list[Instruction]) -> int:
    """The compiler's own estimate of the cycles that its operations take, one after the other;
    kernels, and what is copied or sent beside the computation, are not in it.
    """
    fused = _fused(program)
    return sum(
        int(found[1]) * each.times
        for each in program
        if each.computation not in fused
        and (found := re.search(r'"estimated_cycles":"(\d+)"', each.rest))
    )


def _fused(program: list[Instruction]) -> set[str]:
    """The computations that are the inside of one operation."""
    return {
        called
        for each in program
        if each.opcode == "fusion"
        for called in re.findall(r"calls=%?([\w.\-]+)", each.rest)
    }


def largest(program: list[Instruction], count: int = 8) -> Iterator[tuple[str, int, str]]:
    """(type and shape, bytes, what made it) of the largest arrays that lie in memory, each shape
    once.
    """
    outside = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "conditional"}
    fused, seen = _fused(program), {}
    for each in program:
        if each.computation in fused or each.opcode in outside or len(each.shapes) != 1:
            continue
        kind, sides = each.shapes[0]
        made = re.search(r'op_name="([^"]*)"', each.rest)
        seen.setdefault(
            f"{kind}[{','.join(map(str, sides))}]", (each.num_bytes, made[1] if made else each.name)
        )
    for shape, (size, made) in sorted(seen.items(), key=lambda item: -item[1][0])[:count]:
        yield shape, size, made
