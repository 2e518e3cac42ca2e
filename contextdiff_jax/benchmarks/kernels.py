"""The parts that a network's time goes into, each in the ways that this device has, forward and
backward: attention at the shapes of known networks, GroupNorm and SiLU, the relational network.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from contextdiff_jax.benchmarks import paired, turns
from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.models.attention import self_attention
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork
from contextdiff_jax.models.flash import choices_of
from contextdiff_jax.models.layers import GroupNorm
from contextdiff_jax.models.precision import Precision
from contextdiff_jax.parallel.mesh import current_target
from contextdiff_jax.runtime.errors import one_line


class Shape(NamedTuple):
    """Of attention: pictures, tokens, heads, features a head; keys, if they aren't the tokens."""

    batch: int
    tokens: int
    heads: int
    features: int
    keys: int | None = None


# The largest attention of each network, at the pictures that it was made for, and the least.
ATTENTION = {
    "SD 1.5, 512 px": Shape(8, 4096, 8, 40),
    "SD 1.5, to the text": Shape(8, 4096, 8, 40, 77),
    "SD 1.5, 256 tokens": Shape(8, 256, 8, 160),
    "SDXL, 1024 px": Shape(4, 4096, 10, 64),
    "SD 3, 1024 px": Shape(4, 4096 + 154, 24, 64),
    "Flux, 1024 px": Shape(2, 4096 + 512, 24, 128),
}
TINY = {"tiny": Shape(1, 256, 2, 16)}
_CALLS = 10  # of a form, one after the other, in a round
PLAIN = "xla"  # the form that others are compared with


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelBenchmark:
    """`tiny`: small shapes, to see that all runs. `rounds`: of each form."""

    tiny: bool = False
    rounds: int = 5


class Case(NamedTuple):
    """`forms`: functions of `arguments` by name; what they give is summed for the gradient."""

    name: str
    forms: dict[str, Callable[..., Array]]
    arguments: tuple[Array, ...]


def _attention_cases(tiny: bool) -> list[Case]:
    cases = []
    for name, (B, N, H, D, M) in (TINY if tiny else ATTENTION).items():
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, (B, length, H, D), jnp.bfloat16)
            for key, length in zip(keys, (N, M or N, M or N), strict=True)
        )
        forms = {
            choice: functools.partial(self_attention, choice=choice)
            for choice in choices_of(current_target())
        }
        cases.append(Case(f"attention, {name}", forms, (q, k, v)))
    return cases


def _norm_case(tiny: bool) -> Case:
    shape = (1, 16, 16, 32) if tiny else (8, 64, 64, 320)
    options = Precision(compute=jnp.bfloat16).policy(nnx.Rngs(0))
    norm = GroupNorm(shape[-1], 32, **options)
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    name = f"GroupNorm and SiLU, {' x '.join(map(str, shape))}"
    return Case(name, {PLAIN: lambda x: jax.nn.silu(norm(x))}, (x,))


def _relational_case(tiny: bool) -> Case:
    side, batch, length, width = (8, 1, 4, 16) if tiny else (64, 8, 77, 768)
    config = ContextConfig(in_channels=4, text_width=width)
    network = RelationalNetwork(config, rngs=nnx.Rngs(0), precision=Precision(compute=jnp.bfloat16))
    x0 = jax.random.normal(jax.random.key(0), (batch, side, side, 4))
    text = jax.random.normal(jax.random.key(1), (batch, length, width))
    mask, t = jnp.ones((batch, length), bool), jnp.zeros(batch)
    name = f"relational network, {batch} x {side} x {side} x 4"
    return Case(name, {PLAIN: lambda x0, text: network(x0, text, mask, t)}, (x0, text))


def _gradient(form: Callable[..., Array], count: int) -> Callable[..., Any]:
    """The values and the gradients of all arguments."""

    def total(*arguments):
        return form(*arguments).astype(jnp.float32).sum()

    return jax.value_and_grad(total, argnums=tuple(range(count)))


def _contestants(case: Case) -> tuple[list[paired.Contestant], dict[str, str]]:
    """Forward and gradient of each form, compiled; and why a form can't be had here, by name."""
    contestants, failed = [], {}
    for form, function in case.forms.items():
        count = len(case.arguments)
        for part, whole in (("forward", function), ("gradient", _gradient(function, count))):
            try:
                program = jax.jit(whole).lower(*case.arguments).compile()
                jax.block_until_ready(program(*case.arguments))
            except (RuntimeError, ValueError, NotImplementedError) as error:  # not on this device
                if form == PLAIN:
                    raise
                failed[form] = one_line(error)
                break
            name = f"{form} {part}"
            contestants.append(paired.Contestant.of(name, program, *case.arguments, calls=_CALLS))
    return contestants, failed


def run(options: KernelBenchmark) -> Result:
    """Times every case; a row for each form and part, `ahead` of the plain form."""
    cases = [
        *_attention_cases(options.tiny),
        _norm_case(options.tiny),
        _relational_case(options.tiny),
    ]
    rows = []
    for case in cases:
        contestants, failed = _contestants(case)
        with turns.alone():
            times = paired.measure(contestants, options.rounds)
        for name, (wall, _) in times.items():
            form, part = name.split(" ")
            found = paired.ratio(times[f"{PLAIN} {part}"].wall, wall)
            rows.append(
                {
                    "case": case.name,
                    "form": form,
                    "part": part,
                    "seconds": statistics.median(wall) / _CALLS,
                    "ahead": found.value,
                    "ahead_quartiles": list(found[1:]),
                }
            )
        rows += [{"case": case.name, "form": form, "why": why} for form, why in failed.items()]
    return Result(_table(rows), rows)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'kernel':<44}{'form':>8}{'part':>10}{'ms':>10}  times as fast as {PLAIN}"]
    for row in rows:
        if "why" in row:
            lines.append(f"{row['case']:<44}{row['form']:>8}  not here: {row['why']}")
            continue
        low, high = row["ahead_quartiles"]
        lines.append(
            f"{row['case']:<44}{row['form']:>8}{row['part']:>10}{1e3 * row['seconds']:>10.3f}"
            f"  {row['ahead']:.2f} [{low:.2f}, {high:.2f}]"
        )
    return "\n".join(lines)
