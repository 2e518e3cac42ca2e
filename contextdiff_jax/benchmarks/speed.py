"""Our training step and sampling loop in turns with torch's, and what the context adds to them.

The UNet alone does the same work on both sides: the same weights (random, every tensor of weight),
inputs and cores, AdamW on the mean squared error, or DDIM with guidance. Ours is on all of JAX's
devices, by the config's mesh: on a CPU the command makes one a core, unless JAX_NUM_CPU_DEVICES
says otherwise. Before a ratio is given the results must agree: the output, and after a step its
loss and the change of each parameter; samples. The whole method's step is measured with and without
its context, and against torch's (torch_method.py, for the configs that it has); its sampling loop
only with and without.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from contextdiff_jax import diffusion
from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.benchmarks.measured import (
    TOLERANCES,
    Devices,
    Inputs,
    Stepper,
    check,
    check_change,
    compile_timed,
    randomised,
)
from contextdiff_jax.benchmarks.method import WITH_CONTEXT, WITHOUT_CONTEXT, contestants_of_method
from contextdiff_jax.benchmarks.paired import Contestant, Times
from contextdiff_jax.diffusion.samplers import Denoised
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.pretrained.unet import unet_state_to_torch
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.settings import Settings

PEERS = ("torch",)
PACKAGES = ("torch", "diffusers")
PROGRAMS = ("train", "sample")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedBenchmark:
    """`program`: of `PROGRAMS`. `compare`: of `PEERS`, or empty for ours alone. `rounds`: of each
    contestant.
    """

    program: str = "train"
    compare: str = ""
    rounds: int = 5

    def __post_init__(self):
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


def random_unet(settings: Settings) -> UNet:
    """The config's UNet, without a context head, with random weights of about unit gain and none at
    0: a new network's output and most of its gradients are 0, which would compare nothing.
    """
    config = dataclasses.replace(settings.model, context_head=False)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=Undrawn())))
    return nnx.merge(graph, randomised(shapes, settings.seed))


def make_inputs(settings: Settings, batch: int) -> Inputs:
    """A batch of the UNet's inputs, float32 but for `t`, and the `target` of its loss."""
    rng = np.random.default_rng(settings.seed)
    model, shapes = (
        settings.model,
        {
            "x": settings.shape,
            "text": (settings.data.max_length, settings.model.cross_attention_dim),
        },
    )
    shapes["target"] = (*settings.shape[:2], model.out_channels)
    if model.addition_embed_type == "text_time":
        pooled = model.projection_class_embeddings_input_dim - 6 * model.addition_time_embed_dim
        shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
    inputs = {
        name: rng.standard_normal((batch, *shape), np.float32) for name, shape in shapes.items()
    }
    return inputs | {"t": np.arange(batch) * settings.diffusion.num_timesteps // batch}


def _predict(unet: UNet, x: Array, t: Array, inputs: Mapping[str, Array]) -> Array:
    return unet(
        x,
        t,
        inputs["text"],
        added={k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs},
    )


def unet_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """`step(params, opt_state, inputs) -> (params, opt_state, loss)`: the denoiser's part of a
    training step.
    """

    def loss_fn(params, inputs):
        return jnp.mean(
            (
                _predict(nnx.merge(graph, params), inputs["x"], inputs["t"], inputs)
                - inputs["target"]
            )
            ** 2
        )

    def step(params, opt_state, inputs):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def unet_sample(graph: nnx.GraphDef, settings: Settings) -> Callable:
    """`sample(params, inputs) -> x0`: DDIM with guidance, both branches in one batch; `inputs` but
    x are 2 B long, those without the caption first.
    """
    schedule, sample = settings.diffusion.make_schedule(), settings.sample
    timesteps = sample.times(schedule)

    def run(params, inputs):
        unet = nnx.merge(graph, params)

        def branches(x, t, s):
            output = _predict(unet, x, t, inputs)
            x0 = diffusion.predict_x0(schedule, output, x, t, settings.diffusion.prediction_type)
            return Denoised(x0, jnp.zeros_like(x), jnp.zeros_like(x))

        denoise = diffusion.classifier_free(
            branches,
            sample.guidance,
            join=lambda a, b: jnp.concatenate([a, b]),
            split=lambda both: jnp.split(both, 2)[::-1],
        )
        return diffusion.ddim_sample(denoise, inputs["x"], schedule, timesteps, shift="none")

    return run


def _peers(unet: UNet, settings: Settings, compare: str) -> dict[str, Any]:
    if not compare:
        return {}
    from contextdiff_jax.benchmarks.torch_peer import LAYOUTS, TorchUNet

    return {f"torch {layout}": TorchUNet(unet, settings, layout) for layout in LAYOUTS}


def _train_unet(settings: Settings, options: SpeedBenchmark) -> tuple[list[Contestant], float]:
    """The UNet's training steps, checked against each other, and the operations of one."""
    unet, inputs, train = (
        random_unet(settings),
        make_inputs(settings, settings.train.batch_size),
        settings.train,
    )
    peers = _peers(unet, settings, options.compare)
    before = unet_state_to_torch(unet)
    devices, (graph, params) = Devices(settings), nnx.split(unet)
    placed, params = devices.batch(inputs), devices.parameters(params)
    forward = jax.jit(
        lambda params, inputs: _predict(nnx.merge(graph, params), inputs["x"], inputs["t"], inputs)
    )
    optimizer = optax.adamw(
        train.learning_rate, train.b1, train.b2, weight_decay=train.weight_decay
    )
    with devices.tracing():
        output = np.asarray(forward(params, placed))
        opt_state = devices.parameters(jax.jit(optimizer.init)(params))
        ours = Stepper(unet_step(graph, optimizer), params, opt_state, rest=(placed,))
    loss = float(ours())
    after = unet_state_to_torch(nnx.merge(graph, ours.state[0]))
    contestants = [Contestant("unet", ours, ours.compile_seconds)]
    for name, peer in peers.items():
        tensors = peer.tensors(inputs)
        check(f"{name}, output", output, peer.forward(tensors), TOLERANCES["output"])
        check(f"{name}, loss", np.array(loss), np.array(peer.step(tensors)), TOLERANCES["loss"])
        check_change(f"{name}, parameters", before, after, peer.parameters())
        contestants.append(Contestant(name, functools.partial(peer.step, tensors)))
    return contestants, ours.flops


def _sample_unet(settings: Settings, options: SpeedBenchmark) -> tuple[list[Contestant], float]:
    """The UNet's sampling loops, checked against each other, and the operations of one."""
    unet, batch = random_unet(settings), settings.train.batch_size
    peers = _peers(unet, settings, options.compare)
    inputs = make_inputs(settings, 2 * batch) | {"x": make_inputs(settings, batch)["x"]}
    del inputs["target"], inputs["t"]
    devices, (graph, params) = Devices(settings), nnx.split(unet)
    arguments = devices.parameters(params), devices.batch(inputs)
    with devices.tracing():
        program, compile_seconds, _ = compile_timed(unet_sample(graph, settings), *arguments)

    def call() -> jax.Array:
        return jax.block_until_ready(program(*arguments))

    contestants, images = [Contestant("unet", call, compile_seconds)], np.asarray(call())
    for name, peer in peers.items():
        from contextdiff_jax.benchmarks.torch_peer import make_scheduler

        run = functools.partial(
            peer.sample, peer.tensors(inputs), make_scheduler(settings), settings.sample.guidance
        )
        check(f"{name}, samples", images, run(), TOLERANCES["samples"])
        contestants.append(Contestant(name, run))
    # XLA counts a loop's body once, whatever its number of turns.
    two = {**inputs, "x": np.concatenate([inputs["x"]] * 2), "t": np.zeros(2 * batch, np.int32)}
    one_step = jax.jit(
        lambda params, two: _predict(nnx.merge(graph, params), two["x"], two["t"], two)
    ).lower(params, two)
    return contestants, settings.sample.steps * float(one_step.cost_analysis().get("flops", 0))


def run(settings: Settings, options: SpeedBenchmark) -> Result:
    """Measures both groups and says what was found.

    Raises:
        ValueError: for a config in which nothing can be compared: pretrained or latent networks,
            bfloat16.
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
    if options.compare and settings.train.precision != "float32":
        raise ValueError(
            f"train.precision={settings.train.precision!r}: must be float32 with --compare"
        )
    peak = paired.matmul_peak()
    contestants, flops = {"train": _train_unet, "sample": _sample_unet}[options.program](
        settings, options
    )
    rows = _rows(contestants, paired.measure(contestants, options.rounds), flops, peak)
    del contestants  # the peers' memory and ours
    contestants = contestants_of_method(settings, options.program, options.compare)
    times = paired.measure(contestants, options.rounds)
    method = _rows(contestants, times, 0.0, peak)
    if WITH_CONTEXT in times:
        with_context, without = times[WITH_CONTEXT].wall, times[WITHOUT_CONTEXT].wall
        share = paired.ratio(
            [a - b for a, b in zip(with_context, without, strict=True)], with_context
        )
        method[0] |= {
            "context_share": share.value,
            "context_share_quartiles": [share.low, share.high],
        }
    rows += method
    facts = {
        "cores": num_cores(),
        "devices": jax.device_count(),
        "matmul_peak_flops_per_second": peak,
        "rounds": options.rounds,
    }
    rows = [row | facts for row in rows]
    return Result(_table(rows, options.program), rows)


def _rows(
    contestants: list[Contestant], times: Mapping[str, Times], flops: float, peak: float
) -> list[dict[str, Any]]:
    """A row a contestant. The first's is compared with the best of the others where they are
    torch's.
    """
    rows = []
    for name, call, compile_seconds in contestants:
        seconds = statistics.median(times[name].wall)
        row = {
            "name": name,
            "seconds": seconds,
            "all_seconds": times[name].wall,
            "all_cpu_seconds": times[name].cpu,
            "cpu_seconds": statistics.median(times[name].cpu),
            "compile_seconds": compile_seconds,
            "extra_memory_bytes": paired.extra_memory(call),
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
        memory = (
            "-" if row["extra_memory_bytes"] is None else f"{row['extra_memory_bytes'] / 2**20:.0f}"
        )
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
        f"peak: {rows[0]['matmul_peak_flops_per_second'] / 1e9:.0f} GFLOP/s in a float32 matrix "
        "product"
    )
    brackets = (
        f"brackets: quartiles of {rows[0]['rounds']} rounds; memory: what the process grew by in "
        "a call"
    )
    return "\n".join([*lines, f"{peak}; {brackets}"])
