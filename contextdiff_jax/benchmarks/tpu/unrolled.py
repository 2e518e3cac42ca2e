"""A looped network's program, counted as if its layers were written out.

XLA's cost analysis counts a loop's body once, whatever its trips. So beside the program itself,
which tells memory and traffic, small ones are compiled whose layers are written out: one with two
layers a stack, and for each longer stack one with four. Half their difference is a layer:

    whole = small + sum over stacks of (layers - 2) x (four - small) / 2                  (1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from contextdiff_jax.models.mmdit_config import MMDiTConfig
from contextdiff_jax.settings import Settings

_FEW, _MORE = 2, 4  # layers of a stack in the programs that are compared

Figures = Mapping[str, float]


class Layer(NamedTuple):
    """One layer's share of a step on one chip."""

    count: int  # of its kind in the network
    figures: dict[str, float]
    useful_flops: float


def is_looped(settings: Settings) -> bool:
    """Whether the backbone's layers are a loop of more trips than are written out here."""
    model = settings.model
    return isinstance(model, MMDiTConfig) and any(s.count > _FEW for s in model.stacks())


def with_layers(config: MMDiTConfig, counts: Sequence[int]) -> MMDiTConfig:
    """The network with these numbers of layers in its stacks."""
    dual = [
        stack.dual
        for stack, count in zip(config.stacks(), counts, strict=True)
        for _ in range(count)
    ]
    return dataclasses.replace(
        config,
        num_layers=len(dual),
        dual_attention_layers=tuple(i for i, second in enumerate(dual) if second),
    )


def _written_out(settings: Settings, counts: Sequence[int]) -> Settings:
    return dataclasses.replace(
        settings,
        model=with_layers(settings.model, counts),
        train=dataclasses.replace(settings.train, unroll=True),
    )


def small_programs(settings: Settings) -> Iterator[tuple[int | None, Settings]]:
    """Yield the settings of the program with few layers (None), then for each longer stack its
    number and the settings with more of its layers.
    """
    few = [min(stack.count, _FEW) for stack in settings.model.stacks()]
    yield None, _written_out(settings, few)
    for i, stack in enumerate(settings.model.stacks()):
        if stack.count > _FEW:
            yield i, _written_out(settings, [*few[:i], _MORE, *few[i + 1 :]])


def counted(
    settings: Settings, measure: Callable[[Settings], Figures]
) -> tuple[dict[str, float], list[Layer]]:
    """The whole program's figures by (1), and each longer stack's layer; `measure` compiles a
    program and gives the figures that add up.
    """
    stacks, small, layers, tokens = settings.model.stacks(), None, [], _tokens(settings)
    for i, candidate in small_programs(settings):
        figures = measure(candidate)
        if i is None:
            small, whole = figures, dict(figures)
            continue
        layer = {name: (figures[name] - small[name]) / (_MORE - _FEW) for name in small}
        whole = {name: whole[name] + (stacks[i].count - _FEW) * layer[name] for name in whole}
        useful = useful_flops(settings.model, stacks[i].dual, *tokens)
        layers.append(Layer(stacks[i].count, layer, useful))
    return whole, layers


def _tokens(settings: Settings) -> tuple[int, int]:
    height, width, _ = settings.shape
    return height * width // settings.model.patch_size**2, settings.data.max_length


def useful_flops(config: MMDiTConfig, dual: bool, picture: int, text: int) -> float:
    """The operations of a layer's products for one example, forward and twice that backward:
    projections, MLPs, modulation and attention, without padding and without what is computed again.
    """
    width, parts = config.width, 9 if dual else 6
    a_token = 2 * (4 + 8) * width**2
    products = (picture + text) * a_token + 2 * width * (parts + 6) * width
    attention = 4 * (picture + text) ** 2 * width
    if dual:
        products += picture * 2 * 4 * width**2
        attention += 4 * picture**2 * width
    return 3.0 * (products + attention)


def describe(layer: Layer, batch: float, peak: float) -> str:
    """One line on a layer; `batch`: examples for each chip."""
    figures, useful = layer.figures, layer.useful_flops * batch
    seconds, cycles = figures["seconds"], figures["cycle_seconds"] + figures["kernel_seconds"]
    return (
        f"  a layer of {layer.count}: {1e3 * seconds:.2f} ms (compiler "
        f"{1e3 * figures['compiler_seconds']:.2f}, kernels {1e3 * figures['kernel_seconds']:.2f}); "
        f"{useful / 1e12:.3f} useful TFLOP, {useful / seconds / peak:.1%} of the peak; by the "
        f"compiler's cycles {1e3 * cycles:.2f} ms, {useful / cycles / peak:.1%}"
    )
