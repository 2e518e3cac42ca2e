"""The parts of a training step against the roofline of products and memory (Williams et al., 2009).

Each kind of layer of the config's backbone (of a UNet at each of its levels), forward and backward,
the context, and the optimizer with the average are compiled by themselves. Without `topology` they
run on this machine's first device, and the roofs are measured, too; with it they are compiled for
one of its chips, and seconds and bytes are the compiler's estimates.

    intensity = operations / bytes          operations / s <= min(peak, intensity x bandwidth)
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree
from matplotlib.figure import Figure

from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.paired import Contestant
from contextdiff_jax.benchmarks.tpu import aot, hlo
from contextdiff_jax.models.attention import joint_attention
from contextdiff_jax.models.backbones import kind_of
from contextdiff_jax.models.joint import Stream
from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.parallel.chips import CHIPS
from contextdiff_jax.parallel.mesh import MeshConfig, make_mesh, replicated, tracing_for
from contextdiff_jax.runs.model import make_model
from contextdiff_jax.runtime.tables import aligned
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.compilation import compiler_options
from contextdiff_jax.training.state import make_optimizer, moving_average

LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RooflineBenchmark:
    """Options of the measurement.

    `topology`: whose chip; empty: this machine. `batch`: examples a chip (0: the config's).
    `plot`: a PNG, or empty.
    """

    topology: str = ""
    batch: int = 0
    rounds: int = 5
    plot: str = ""


class Part(NamedTuple):
    """`call(*arguments)` is its work in a training step; `arguments` are shapes."""

    name: str
    call: Callable
    arguments: tuple


class Roofs(NamedTuple):
    """Limits of one device, in operations and bytes a second."""

    name: str
    peak: float
    bandwidth: float


def parts(settings: Settings, batch: int) -> Iterator[Part]:
    """Yield the backbone's layers, the context, and the update."""
    model = nnx.eval_shape(lambda: make_model(settings))
    kinds = {UNet: _unet_parts, MMDiT: _transformer_parts}
    if type(model.backbone) not in kinds:
        raise ValueError(
            f"model.kind={kind_of(settings.model)!r}: its layers aren't taken apart here; unet or "
            "mmdit"
        )
    yield from kinds[type(model.backbone)](settings, model.backbone, batch)
    (height, width, C), L, shape = settings.shape, settings.data.max_length, jax.ShapeDtypeStruct
    if not settings.context.network.is_zero:
        x0, mask, t = (
            shape((batch, height, width, C), jnp.float32),
            shape((batch, L), jnp.bool_),
            shape((batch,), jnp.int32),
        )
        tokens = shape((batch, L, settings.text.width), jnp.float32)
        yield _layer(f"context: {settings.context.kind}", model.context, (x0, tokens), (mask, t))
    yield _update(settings, nnx.state(model, nnx.Param))


def _unet_parts(settings: Settings, unet: UNet, batch: int) -> Iterator[Part]:
    """Each level's last layers of its down block."""
    dtype, (height, width, _), L = unet.precision.compute, settings.shape, settings.data.max_length
    shape = jax.ShapeDtypeStruct
    temb = shape((batch, settings.model.time_features), dtype)
    text = shape((batch, L, settings.model.cross_attention_dim), dtype)
    for i, block in enumerate(unet.down_blocks):
        resnet, (H, W), channels = (
            block.resnets[-1],
            (height >> i, width >> i),
            settings.model.block_out_channels[i],
        )
        # As wide as the level above, if it is the only one.
        x = shape((batch, H, W, resnet.norm1.scale.shape[0]), dtype)
        yield _layer(f"resnet {H}x{W}, {channels}", resnet, (x, temb))
        if block.attentions:
            tokens, inner = (
                shape((batch, H * W, channels), dtype),
                block.attentions[-1].transformer_blocks[-1],
            )
            yield _layer(f"self-attention {H}x{W}, {channels}", inner.attn1, (tokens,))
            yield _layer(f"cross-attention {H}x{W}, {channels}", inner.attn2, (tokens, text))
            yield _layer(f"feed-forward {H}x{W}, {channels}", inner.ff, (tokens,))


def _transformer_parts(settings: Settings, mmdit: MMDiT, batch: int) -> Iterator[Part]:
    """The first layer whole, and what it is made of."""
    config, shape = settings.model, jax.ShapeDtypeStruct
    graph, stacked = nnx.split(mmdit.stacks[0].layers)
    block = nnx.merge(graph, jax.tree.map(lambda a: shape(a.shape[1:], a.dtype), stacked))
    (height, width, _), L, D = settings.shape, settings.data.max_length, config.width
    counts = {"picture": height * width // config.patch_size**2, "text": L}
    tokens = {
        name: shape((batch, count, D), mmdit.precision.compute) for name, count in counts.items()
    }
    time = shape((batch, D), mmdit.precision.compute)
    yield _layer(f"joint block, {D}", block, (*tokens.values(), time))
    for name, x in tokens.items():
        stream: Stream = getattr(block, name)
        yield _layer(f"q, k, v of the {name}, {counts[name]}", stream.attn, (x,))
        if stream.ff is not None:
            yield _layer(f"feed-forward of the {name}, {counts[name]}", stream.ff, (x,))
    H, E = config.num_attention_heads, config.attention_head_dim
    heads = [(shape((batch, H, count, E), time.dtype),) * 3 for count in counts.values()]
    attend = functools.partial(joint_attention, choice=settings.train.attention)
    yield _part(f"joint attention, {H} x {E}", attend, tuple(heads))


def _layer(name: str, module: nnx.Module, inputs: tuple, others: tuple = ()) -> Part:
    """Part of a layer: its output, and the gradients of `inputs` (not of `others`)."""
    graph, params = nnx.split(module)

    def forward(params, inputs, others):
        return nnx.merge(graph, params)(*inputs, *others)

    return _part(name, forward, (params, inputs), (others,))


def _part(name: str, forward: Callable, inputs: tuple, others: tuple = ()) -> Part:
    """`forward(*inputs, *others)`: its output, and the gradients of `inputs`."""

    def call(cotangent, inputs, others):
        output, gradients = jax.vjp(
            lambda *differentiated: forward(*differentiated, *others), *inputs
        )
        return output, gradients(cotangent)

    return Part(name, call, (jax.eval_shape(forward, *inputs, *others), inputs, others))


def _update(settings: Settings, params: PyTree) -> Part:
    """AdamW and the moving average of all parameters."""
    optimizer = make_optimizer(settings.train)

    def call(params, ema, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (
            params,
            moving_average(params, ema, jnp.ones((), jnp.int32), settings.train.ema_decay),
            opt_state,
        )

    return Part(
        "AdamW, average", call, (params, params, jax.eval_shape(optimizer.init, params), params)
    )


def run(settings: Settings, options: RooflineBenchmark) -> Result:
    """Compile each part, and run it if the device is here. ValueError for an unknown topology."""
    if options.topology:
        device = aot.described_devices(options.topology)[0]
        chip = CHIPS[device.device_kind].described()
        roofs = Roofs(f"{chip.name}, predicted by the compiler", chip.peak, chip.hbm_bandwidth)
    else:
        device = jax.devices()[0]
        roofs = Roofs(
            f"{device.device_kind}, measured", paired.matmul_peak(), paired.memory_bandwidth()
        )
    mesh = make_mesh(MeshConfig(), devices=[device])
    rows = []
    for part in parts(settings, options.batch or settings.train.batch_size):
        compiled = _compile(part, mesh, settings)
        if options.topology:
            cost = aot.predicted(compiled, chip, hlo.instructions(compiled.as_text()))
            row = {"flops": cost["flops"], "seconds": cost["seconds"]}
        else:
            row = {
                "flops": compiled.cost_analysis()["flops"],
                "seconds": _seconds(part, compiled, options.rounds),
            }
        row |= {
            "name": part.name,
            "bytes": compiled.cost_analysis()["bytes accessed"],
            "device": roofs.name,
        }
        row["intensity"] = row["flops"] / row["bytes"]
        row["flops_per_second"] = row["flops"] / row["seconds"]
        row["roof"] = min(roofs.peak, row["intensity"] * roofs.bandwidth)
        rows.append(row)
        LOGGER.info("%s: %.3g ms", part.name, 1e3 * row["seconds"])
    if options.plot:
        _plot(rows, roofs, options.plot)
    return Result(_table(rows, roofs), rows)


def _compile(part: Part, mesh: Mesh, settings: Settings) -> jax.stages.Compiled:
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated(mesh)), part.arguments
    )
    with tracing_for(mesh, settings.mesh.rules):
        options = compiler_options(settings.train, mesh)
        return aot.compiled_anew(jax.jit(part.call, compiler_options=options).lower(*placed))


def _seconds(part: Part, compiled: jax.stages.Compiled, rounds: int) -> float:
    arguments = jax.tree.map(lambda a: jnp.full(a.shape, 0.1).astype(a.dtype), part.arguments)

    def call():
        return jax.block_until_ready(compiled(*arguments))

    return statistics.median(paired.measure([Contestant(part.name, call)], rounds)[part.name].wall)


def _table(rows: list[dict[str, Any]], roofs: Roofs) -> str:
    title = (
        f"{roofs.name}: at most {roofs.peak / 1e12:.3g} TFLOP/s and "
        f"{roofs.bandwidth / 1e9:.4g} GB/s; forward and backward"
    )
    entries = [
        [
            row["name"],
            f"{row['flops'] / 1e9:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['intensity']:.1f}",
            f"{1e3 * row['seconds']:.3f}",
            f"{row['flops_per_second'] / 1e12:.3g}",
            f"{row['flops_per_second'] / row['roof']:.0%}",
        ]
        for row in rows
    ]
    head = ["", "GFLOP", "MB", "FLOP/byte", "ms", "TFLOP/s", "of roof"]
    return f"{title}\n{aligned(head, entries)}"


def _plot(rows: list[dict[str, Any]], roofs: Roofs, out: str) -> None:
    figure = Figure(figsize=(9, 6))
    axis = figure.subplots()
    kinds = dict.fromkeys(row["name"].split(" ")[0].rstrip(":,") for row in rows)
    markers = dict(zip(kinds, "osD^Pv", strict=False))
    x = np.array([row["intensity"] for row in rows])
    line = np.geomspace(x.min() / 3, max(x.max(), roofs.peak / roofs.bandwidth) * 3, 200)
    axis.loglog(line, np.minimum(roofs.peak, line * roofs.bandwidth), color="black", label="roof")
    for kind, marker in markers.items():
        of_kind = [row for row in rows if row["name"].startswith(kind)]
        axis.loglog(
            [r["intensity"] for r in of_kind],
            [r["flops_per_second"] for r in of_kind],
            marker,
            label=kind,
        )
        for row in of_kind:
            text = row["name"].removeprefix(kind).strip(" ,:")
            axis.annotate(
                text,
                (row["intensity"], row["flops_per_second"]),
                (5, -4),
                textcoords="offset points",
                fontsize=7,
            )
    axis.set(
        xlabel="operations / byte",
        ylabel="operations / s",
        title=f"Parts of a training step on {roofs.name}",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(pathlib.Path(out), dpi=110)
