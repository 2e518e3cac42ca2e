"""LPIPS (Zhang et al., 2018), version 0.1 on AlexNet: how different two pictures look.

Weights: the `lpips` package's state, backbone and linear layers together, as safetensors under its
    own names:

    python -c "import lpips; from safetensors.torch import save_file; \
        save_file({k: v.clone() for k, v in lpips.LPIPS(net='alex').state_dict().items()},
        'lpips.safetensors')"
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import lax
from jaxtyping import Array, Float, UInt8

from contextdiff_jax.evaluation.features import check_finite
from contextdiff_jax.models.pixels import to_unit

# AlexNet's convolutions by their names in the file: (kernel, input, output, stride, padding,
# whether a pooling comes before).
_LAYERS = {
    "net.slice1.0": (11, 3, 64, 4, 2, False),
    "net.slice2.3": (5, 64, 192, 1, 2, True),
    "net.slice3.6": (3, 192, 384, 1, 1, True),
    "net.slice4.8": (3, 384, 256, 1, 1, False),
    "net.slice5.10": (3, 256, 256, 1, 1, False),
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
SMALLEST = 31  # pixels a side: below, nothing is left for the second pooling
Params = dict[str, Float[Array, "..."]]
Distance = Callable[
    [UInt8[np.ndarray, "N H W 3"], UInt8[np.ndarray, "N H W 3"]],
    tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N H W"]],
]


def load_lpips(path: str | pathlib.Path, height: int, width: int) -> Distance:
    """`distance(pictures, others)` of pictures of that size: LPIPS of each pair, and its map (the
    package's `spatial=True`).

    Raises ValueError, one line, for a file that isn't there, isn't safetensors, or lacks tensors;
    and for pictures under `SMALLEST` pixels a side.
    """
    path = pathlib.Path(path)
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"edit.lpips={path}: pictures of {height} x {width} pixels; it needs {SMALLEST} a side"
        )
    if not path.is_file():
        raise ValueError(
            f"edit.lpips={path}: no such file; contextdiff_jax/evaluation/networks/lpips.py says "
            "how it is made"
        )
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"edit.lpips={path}: not safetensors ({error}); a pickle is not read, it can run code"
        ) from None
    params = _params(tensors, path)
    compiled = jax.jit(lpips)

    def distance(pictures, others):
        values, maps = map(np.asarray, compiled(params, pictures, others))
        check_finite(**{f"edit.lpips={path}": values})
        return values, maps

    return distance


def _params(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> Params:
    wanted = {}
    for i, (name, (side, inputs, outputs, *_)) in enumerate(_LAYERS.items()):
        wanted |= {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}
        wanted[f"lin{i}.model.1.weight"] = (1, outputs, 1, 1)
    found = {name: tensors[name].shape if name in tensors else "missing" for name in wanted}
    problems = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in wanted.items()
        if found[name] != shape
    ]
    if problems:
        raise ValueError(f"edit.lpips={path}: {'; '.join(problems)}")
    return {name: jnp.asarray(tensors[name], jnp.float32) for name in wanted}


def _features(params: Params, x: Float[Array, "N H W 3"]) -> list[Float[Array, "N h w C"]]:
    """The features of each layer."""
    found = []
    for name, (*_, stride, padding, pooled) in _LAYERS.items():
        if pooled:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        kernel = params[f"{name}.weight"].transpose(2, 3, 1, 0)
        x = lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + params[f"{name}.bias"])
        found.append(x)
    return found


def lpips(
    params: Params, pictures: UInt8[Array, "N H W 3"], others: UInt8[Array, "N H W 3"]
) -> tuple[Float[Array, "N"], Float[Array, "N H W"]]:
    """Sum over the layers of the weighted squared differences: their means, and enlarged
    (bilinearly) to the pictures' size.
    """
    both = to_unit(jnp.concatenate([pictures, others]))
    scaled = (both - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    weights = [params[f"lin{i}.model.1.weight"][0, :, 0, 0] for i in range(len(_LAYERS))]
    features = zip(*(jnp.split(x, 2) for x in _features(params, scaled)), strict=True)
    return weighed_distance(*features, weights, pictures.shape[1:3])


def weighed_distance(
    features: Sequence[Float[Array, "N ..."]],
    others: Sequence[Float[Array, "N ..."]],
    weights: Sequence[Float[Array, "..."]],
    size: tuple[int, int],
) -> tuple[Float[Array, "N"], Float[Array, "N H W"]]:
    """LPIPS of the layers' features: every place's vector at length 1, squared differences, each
    channel by its weight. The sum over the layers of their means, and of them enlarged to `size`.
    """
    value, total = jnp.zeros(len(features[0])), jnp.zeros((len(features[0]), *size))
    for a, b, weight in zip(features, others, weights, strict=True):
        layer = ((_direction(a) - _direction(b)) ** 2) @ weight  # [N, h, w]
        value += layer.mean((1, 2))
        total += jax.image.resize(layer, total.shape, "linear")
    return value, total


def _direction(x: Float[Array, "N h w C"]) -> Float[Array, "N h w C"]:
    return x / (jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)) + 1e-10)
