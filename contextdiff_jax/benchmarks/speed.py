"""Our training step and sampling loop in turns with torch's, and what the context adds to them.

The UNet alone does the same work on both sides: the same weights (random, every tensor of weight), inputs and cores, AdamW on
the mean squared error, or DDIM with guidance. Ours is on all of JAX's devices, by the config's mesh: on a CPU one a core is the
fastest (JAX_NUM_CPU_DEVICES). Before a ratio is given the results must agree: the output, and after a step its loss and the
change of each parameter; samples. The whole method has no torch version: it is measured with and without its context, on one
device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import statistics
import time
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
from contextdiff_jax.benchmarks.data import Result
from contextdiff_jax.benchmarks.paired import Contestant, Times
from contextdiff_jax.cli import RunError, num_cores
from contextdiff_jax.diffusion.samplers import Denoised
from contextdiff_jax.models.contextdiff import make_sampler
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.parallel.mesh import Feed, make_mesh, state_shardings, tracing_for
from contextdiff_jax.pretrained.unet import unet_state_to_torch
from contextdiff_jax.settings import Settings
from contextdiff_jax.training.state import build_model, init_state, model_graph
from contextdiff_jax.training.step import make_train_step

PEERS = ("torch",)
PACKAGES = ("torch", "diffusers")
PROGRAMS = ("train", "sample")
# Largest differences, of the largest value: of an output as in the parity tests. Of a tensor's change by a step, in root mean
# square: AdamW's first change is the learning rate times the gradient's sign, so that rounding may turn one near 0 about.
TOLERANCES = {"output": 2e-5, "loss": 1e-5, "parameters": 0.02, "samples": 1e-4}
Inputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedBenchmark:
    """`program`: of `PROGRAMS`. `compare`: of `PEERS`, or empty for ours alone. `rounds`: of each contestant."""

    program: str = "train"
    compare: str = ""
    rounds: int = 5

    def __post_init__(self):
        if self.compare and self.compare not in PEERS:
            raise ValueError(f"--compare={self.compare!r}: unknown for --mode={self.program}; one of {', '.join(PEERS)}")
        lacking = [package for package in PACKAGES if self.compare and importlib.util.find_spec(package) is None]
        if lacking:
            raise ValueError(f"--compare='torch': {', '.join(lacking)} not installed; see requirements-test.txt")
        if self.rounds < 5:
            raise ValueError(f"--repeats={self.rounds}: must be at least 5 with --mode={self.program}")


def random_unet(settings: Settings) -> UNet:
    """The config's UNet, without a context head, with random weights of about unit gain and none at 0: a new network's
    output and most of its gradients are 0, which would compare nothing."""
    unet = UNet(dataclasses.replace(settings.model, context_head=False), rngs=nnx.Rngs(settings.seed))
    rng = np.random.default_rng(settings.seed)

    def drawn(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        value = noise / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else (path[-1] == "scale") + 0.1 * noise
        return leaf.replace(jnp.asarray(value, jnp.float32))

    flat = nnx.to_flat_state(nnx.state(unet, nnx.Param))
    nnx.update(unet, nnx.from_flat_state([(path, drawn(path, leaf)) for path, leaf in flat]))
    return unet


def make_inputs(settings: Settings, batch: int) -> Inputs:
    """A batch of the UNet's inputs, float32 but for `t`, and the `target` of its loss."""
    rng = np.random.default_rng(settings.seed)
    model, shapes = settings.model, {"x": settings.shape, "text": (settings.data.max_length, settings.model.cross_attention_dim)}
    shapes["target"] = (*settings.shape[:2], model.out_channels)
    if model.addition_embed_type == "text_time":
        pooled = model.projection_class_embeddings_input_dim - 6 * model.addition_time_embed_dim
        shapes |= {"text_embeds": (pooled,), "time_ids": (6,)}
    inputs = {name: rng.standard_normal((batch, *shape), np.float32) for name, shape in shapes.items()}
    return inputs | {"t": np.arange(batch) * settings.diffusion.num_timesteps // batch}


def _predict(unet: UNet, x: Array, t: Array, inputs: Mapping[str, Array]) -> Array:
    return unet(x, t, inputs["text"], added={k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs})


def unet_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """`step(params, opt_state, inputs) -> (params, opt_state, loss)`: the denoiser's part of a training step."""

    def loss_fn(params, inputs):
        return jnp.mean((_predict(nnx.merge(graph, params), inputs["x"], inputs["t"], inputs) - inputs["target"]) ** 2)

    def step(params, opt_state, inputs):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def unet_sample(graph: nnx.GraphDef, settings: Settings) -> Callable:
    """`sample(params, inputs) -> x0`: DDIM with guidance, both branches in one batch; `inputs` but x are 2 B long, those
    without the caption first."""
    schedule, sample = settings.diffusion.make_schedule(), settings.sample
    timesteps = diffusion.spaced_timesteps(schedule.num_timesteps, sample.steps, sample.spacing)

    def run(params, inputs):
        unet = nnx.merge(graph, params)

        def denoise(x, t, s):
            without, with_text = jnp.split(_predict(unet, jnp.concatenate([x, x]), jnp.concatenate([t, t]), inputs), 2)
            output = without + sample.guidance * (with_text - without)
            x0 = diffusion.predict_x0(schedule, output, x, t, settings.diffusion.prediction_type)
            return Denoised(x0, jnp.zeros_like(x), jnp.zeros_like(x))

        return diffusion.ddim_sample(denoise, inputs["x"], schedule, timesteps, shift="none")

    return run


def check(what: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """Raises RunError if the largest difference is over `tolerance` of the largest value, or anything is not finite."""
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    if not error <= tolerance:
        found = f"differ by {error:.2g} of the largest value, allowed {tolerance}"
        raise RunError(f"--compare: {what}: ours and torch's {found}: no ratio")


def check_change(
    what: str, before: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> None:
    """Raises RunError, naming the worst tensor, unless a step changed each parameter alike."""
    errors = {
        name: np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(theirs[name] - value) for name, value in before.items()
    }
    off = {name: error for name, error in errors.items() if not error <= TOLERANCES["parameters"]}  # NaN is off too
    if off:
        name = max(off, key=off.get)
        allowed = f"allowed {TOLERANCES['parameters']}"
        raise RunError(f"--compare: {what}: {name}: the step's changes differ by {off[name]:.2g}, {allowed}: no ratio")


def _compiled(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> tuple[Callable, float, float]:
    """The program, the seconds that it took to compile, and its floating-point operations before XLA's changes."""
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start, float((lowered.cost_analysis() or {}).get("flops", 0))


class _Devices:
    """All of them, as the config's mesh lays them out: a step of ours runs on each with its share of the batch."""

    def __init__(self, settings: Settings):
        self.rules = settings.mesh.rules
        self.mesh = make_mesh(settings.mesh, settings.train.batch_size)

    def parameters(self, tree: Any) -> Any:
        return jax.device_put(tree, state_shardings(self.mesh, tree, self.rules))

    def batch(self, inputs: Inputs) -> dict[str, Array]:
        return {k: jax.device_put(v, Feed(self.mesh, len(v), self.rules).sharding(v.shape)) for k, v in inputs.items()}

    def tracing(self) -> contextlib.AbstractContextManager:
        return tracing_for(self.mesh, self.rules)


class _Stepper:
    """A training step's program with its state: a call is a step, its result the loss."""

    def __init__(self, step: Callable, *state: Any, rest: tuple):
        self._rest, self.state = rest, state
        self._step, self.compile_seconds, self.flops = _compiled(step, *state, *rest, donate=tuple(range(len(state))))

    def __call__(self) -> Array:
        *self.state, result = self._step(*self.state, *self._rest)
        return jax.block_until_ready(result)


def _peers(unet: UNet, settings: Settings, compare: str) -> dict[str, Any]:
    if not compare:
        return {}
    from contextdiff_jax.benchmarks.torch_peer import LAYOUTS, TorchUNet

    return {f"torch {layout}": TorchUNet(unet, settings, layout) for layout in LAYOUTS}


def _train_unet(settings: Settings, options: SpeedBenchmark) -> tuple[list[Contestant], float]:
    """The UNet's training steps, checked against each other, and the operations of one."""
    unet, inputs, train = random_unet(settings), make_inputs(settings, settings.train.batch_size), settings.train
    peers = _peers(unet, settings, options.compare)
    before = unet_state_to_torch(unet)
    devices, (graph, params) = _Devices(settings), nnx.split(unet)
    placed, params = devices.batch(inputs), devices.parameters(params)
    forward = jax.jit(lambda params, inputs: _predict(nnx.merge(graph, params), inputs["x"], inputs["t"], inputs))
    optimizer = optax.adamw(train.learning_rate, train.b1, train.b2, weight_decay=train.weight_decay)
    with devices.tracing():
        output = np.asarray(forward(params, placed))
        opt_state = devices.parameters(jax.jit(optimizer.init)(params))
        ours = _Stepper(unet_step(graph, optimizer), params, opt_state, rest=(placed,))
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
    devices, (graph, params) = _Devices(settings), nnx.split(unet)
    arguments = devices.parameters(params), devices.batch(inputs)
    with devices.tracing():
        program, compile_seconds, _ = _compiled(unet_sample(graph, settings), *arguments)
    call = lambda: jax.block_until_ready(program(*arguments))
    contestants, images = [Contestant("unet", call, compile_seconds)], np.asarray(call())
    for name, peer in peers.items():
        from contextdiff_jax.benchmarks.torch_peer import make_scheduler

        run = functools.partial(peer.sample, peer.tensors(inputs), make_scheduler(settings), settings.sample.guidance)
        check(f"{name}, samples", images, run(), TOLERANCES["samples"])
        contestants.append(Contestant(name, run))
    # XLA counts a loop's body once, whatever its number of turns.
    two = {**inputs, "x": np.concatenate([inputs["x"]] * 2), "t": np.zeros(2 * batch, np.int32)}
    one_step = jax.jit(lambda params, two: _predict(nnx.merge(graph, params), two["x"], two["t"], two)).lower(params, two)
    return contestants, settings.sample.steps * float(one_step.cost_analysis().get("flops", 0))


def _variants(settings: Settings) -> dict[str, Settings]:
    """The whole method with its context, and the same without."""
    plain = dataclasses.replace(
        settings, context=dataclasses.replace(settings.context, kind="none", estimate="plugin"),
        model=dataclasses.replace(settings.model, context_head=False),
    )
    return {"method, without context": plain} | ({} if settings.context.kind == "none" else {"method, with context": settings})


def _method(settings: Settings, program: str) -> list[Contestant]:
    """The real training step (text encoder, average of the weights and metrics included) or sampling loop."""
    rng, size, length = np.random.default_rng(settings.seed), settings.train.batch_size, settings.data.max_length
    ids, mask = rng.integers(1, settings.text.vocab_size, (size, length)), np.ones((size, length), bool)
    contestants = []
    for name, variant in _variants(settings).items():
        state = jax.jit(functools.partial(init_state, variant))()
        if program == "train":
            image = rng.integers(0, 256, (size, *variant.shape)).astype(np.uint8)
            batch = {"image": image, "token_ids": ids, "token_mask": mask}
            null = {"token_ids": ids[:1], "token_mask": mask[:1]}
            call = _Stepper(make_train_step(variant), state, rest=(batch, null))
            contestants.append(Contestant(name, call, call.compile_seconds))
            continue
        chosen = {k: v for k, v in dataclasses.asdict(variant.sample).items() if k != "prompts"}
        sample = make_sampler(
            variant.diffusion.make_schedule(), prediction_type=variant.diffusion.prediction_type,
            shift=variant.context.shift, **chosen,
        )
        graph = model_graph(variant)
        arguments = (
            state.params, rng.standard_normal((size, *variant.shape), np.float32), jax.random.key(settings.seed),
            ids, mask, ids[:1], mask[:1],
        )
        run, seconds, _ = _compiled(lambda params, *rest, g=graph, s=sample: s(build_model(g, params), *rest), *arguments)
        contestants.append(Contestant(name, lambda r=run, a=arguments: jax.block_until_ready(r(*a)), seconds))
    return contestants


def run(settings: Settings, options: SpeedBenchmark) -> Result:
    """Measures both groups and says what was found.

    Raises:
        ValueError: for a config in which nothing can be compared: pretrained or latent networks, bfloat16.
        RunError: ours and a peer's results differ.
    """
    for field, value in (("model.pretrained", settings.pretrained), ("latent.vae", settings.latent.vae),
                         ("text.pretrained", settings.text.pretrained), ("context.clip", settings.context.clip)):
        if value:
            raise ValueError(f"{field}={value!r}: --mode={options.program} measures networks of random weights; must be empty")
    if options.compare and settings.train.precision != "float32":
        raise ValueError(f"train.precision={settings.train.precision!r}: must be float32 with --compare")
    peak = paired.matmul_peak()
    contestants, flops = {"train": _train_unet, "sample": _sample_unet}[options.program](settings, options)
    rows = _rows(contestants, paired.measure(contestants, options.rounds), flops, peak)
    del contestants  # the peers' memory and ours
    contestants = _method(settings, options.program)
    times = paired.measure(contestants, options.rounds)
    rows += _rows(contestants, times, 0.0, peak)
    if len(contestants) == 2:
        with_context, without = (times[contestant.name].wall for contestant in contestants[::-1])
        share = paired.ratio([a - b for a, b in zip(with_context, without)], with_context)
        rows[-1] |= {"context_share": share.value, "context_share_quartiles": [share.low, share.high]}
    facts = {"cores": num_cores(), "devices": jax.device_count(), "matmul_peak_flops_per_second": peak, "rounds": options.rounds}
    rows = [row | facts for row in rows]
    return Result(_table(rows, options.program), rows)


def _rows(contestants: list[Contestant], times: Mapping[str, Times], flops: float, peak: float) -> list[dict[str, Any]]:
    """A row a contestant. The first's is compared with the best of the others where they are torch's."""
    rows = []
    for name, call, compile_seconds in contestants:
        seconds = statistics.median(times[name].wall)
        row = {
            "name": name, "seconds": seconds, "all_seconds": times[name].wall, "all_cpu_seconds": times[name].cpu,
            "cpu_seconds": statistics.median(times[name].cpu), "compile_seconds": compile_seconds,
            "extra_memory_bytes": paired.extra_memory(call),
        }
        if flops:
            row |= {"flops": flops, "flops_per_second": flops / seconds, "share_of_peak": flops / seconds / peak}
        rows.append(row)
    peers = [row for row in rows if row["name"].startswith("torch")]
    if peers:
        best = min(peers, key=lambda row: row["seconds"])
        found = {kind: paired.ratio(best[f"all{kind}"], rows[0][f"all{kind}"]) for kind in ("_seconds", "_cpu_seconds")}
        rows[0] |= {
            "peer": best["name"], "ratio": found["_seconds"].value, "ratio_quartiles": list(found["_seconds"][1:]),
            "cpu_ratio": found["_cpu_seconds"].value, "cpu_ratio_quartiles": list(found["_cpu_seconds"][1:]),
        }
    return rows


def _table(rows: list[dict[str, Any]], program: str) -> str:
    head = f"{program}, {rows[0]['cores']} cores, {rows[0]['devices']} devices"
    lines = [f"{head:<30}{'s':>9}{'CPU s':>9}{'GFLOP/s':>9}{'of peak':>9}{'compile s':>11}{'memory MiB':>12}  ahead"]
    for row in rows:
        rate = f"{row['flops_per_second'] / 1e9:.1f}" if "flops" in row else "-"
        share = f"{row['share_of_peak']:.0%}" if "flops" in row else "-"
        memory = "-" if row["extra_memory_bytes"] is None else f"{row['extra_memory_bytes'] / 2**20:.0f}"
        compiling = f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "-"
        told = ""
        if "ratio" in row:
            wall, cpu = ([row[f"{kind}ratio"], *row[f"{kind}ratio_quartiles"]] for kind in ("", "cpu_"))
            told = "{:.2f} times [{:.2f}, {:.2f}] of {}; in CPU s {:.2f} [{:.2f}, {:.2f}]".format(*wall, row["peer"], *cpu)
        if "context_share" in row:
            shares = row["context_share"], *row["context_share_quartiles"]
            told = "the context is {:.1%} [{:.1%}, {:.1%}] of the time".format(*shares)
        lines.append(
            f"{row['name']:<30}{row['seconds']:>9.3f}{row['cpu_seconds']:>9.3f}{rate:>9}{share:>9}{compiling:>11}{memory:>12}"
            f"  {told}".rstrip()
        )
    peak = f"peak: {rows[0]['matmul_peak_flops_per_second'] / 1e9:.0f} GFLOP/s in a float32 matrix product"
    brackets = f"brackets: quartiles of {rows[0]['rounds']} rounds; memory: what the process grew by in a call"
    return "\n".join([*lines, f"{peak}; {brackets}"])
