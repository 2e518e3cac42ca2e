"""The name map between diffusers' `UNet2DConditionModel` folders and `contextdiff_jax.models.unet.UNet`.

A parameter's path is its torch name, but for three rules: the leaf is `weight` for our `kernel` and `scale`;
`to_out` and the feed-forward's projections sit inside torch lists (`_RENAMES`); and arrays change layout:
convolutions OIHW <-> HWIO, linear layers transposed, and our matrices that torch stores as 1x1 convolutions
(O, I, 1, 1): `conv_shortcut`, and `proj_in`, `proj_out` without `use_linear_projection`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from contextdiff_jax.models.unet import ContextHead, UNet, UNetConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_RENAMES = {"to_out": "to_out.0", "ff.proj_in": "ff.net.0.proj", "ff.proj_out": "ff.net.2"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """One parameter: where it is here, its shape there, and the layout change in both directions."""

    path: tuple
    torch_shape: tuple[int, ...]
    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _name_map(unet: UNet) -> dict[str, _Entry]:
    """torch name -> entry, for every parameter of `unet` (concrete or abstract)."""
    entries = {}
    for path, param in nnx.to_flat_state(nnx.state(unet, nnx.Param)):
        module = ".".join(map(str, path[:-1]))
        for ours, theirs in _RENAMES.items():
            if module == ours or module.endswith("." + ours):
                module = module.removesuffix(ours) + theirs
        entries[f"{module}.{_LEAVES[path[-1]]}"] = _entry(path, tuple(param.shape), unet.config)
    return entries


def _entry(path: tuple, shape: tuple[int, ...], config: UNetConfig) -> _Entry:
    pointwise = path[-2] == "conv_shortcut" or (
        path[-2] in ("proj_in", "proj_out") and "ff" not in path and not config.use_linear_projection
    )
    if len(shape) == 4:  # HWIO <-> OIHW
        change = dict(
            torch_shape=(shape[3], shape[2], shape[0], shape[1]),
            from_torch=lambda w: w.transpose(2, 3, 1, 0),
            to_torch=lambda w: w.transpose(3, 2, 0, 1),
        )
    elif len(shape) == 2 and pointwise:  # IO <-> OI11
        change = dict(
            torch_shape=(*shape[::-1], 1, 1),
            from_torch=lambda w: w[:, :, 0, 0].T,
            to_torch=lambda w: w.T[:, :, None, None],
        )
    elif len(shape) == 2:  # IO <-> OI
        change = dict(torch_shape=shape[::-1], from_torch=np.transpose, to_torch=np.transpose)
    else:
        change = dict(torch_shape=shape, from_torch=np.asarray, to_torch=np.asarray)
    return _Entry(path=path, **change)


def unet_state_from_torch(state_dict: Mapping[str, np.ndarray], unet: UNet) -> nnx.State:
    """The parameters of `unet` from a diffusers state dict, for `nnx.update(unet, state)`.

    Args:
      state_dict: torch names -> arrays in torch layout, any float type; cast to the parameters' own types.
      unet: gives names, shapes and types; may be abstract (`nnx.eval_shape`).

    Raises:
      ValueError: one line with every missing, unknown and wrongly shaped tensor.
    """
    entries = _name_map(unet)
    problems = [f"{name}: missing" for name in sorted(entries.keys() - state_dict.keys())]
    problems += [f"{name}: unknown" for name in sorted(state_dict.keys() - entries.keys())]
    for name in sorted(entries.keys() & state_dict.keys()):
        shape, wanted = tuple(state_dict[name].shape), entries[name].torch_shape
        if shape != wanted:
            problems.append(f"{name}: shape {shape}, the config asks for {wanted}")
    if problems:
        raise ValueError(f"UNet weights: {len(problems)} tensors do not fit: " + "; ".join(problems))
    params = dict(nnx.to_flat_state(nnx.state(unet, nnx.Param)))
    flat = {}
    for name, entry in entries.items():
        param = params[entry.path]
        flat[entry.path] = param.replace(jnp.asarray(entry.from_torch(state_dict[name]), param.dtype))
    return nnx.from_flat_state(flat)


def unet_state_to_torch(unet: UNet) -> dict[str, np.ndarray]:
    """The inverse of `unet_state_from_torch`: torch names -> contiguous arrays in torch layout."""
    params = dict(nnx.to_flat_state(nnx.state(unet, nnx.Param)))
    return {
        name: np.ascontiguousarray(entry.to_torch(np.asarray(jax.device_get(params[entry.path][...]))))
        for name, entry in _name_map(unet).items()
    }


def load_unet(
    folder: str | Path,
    *,
    new_context_head: nnx.Rngs | None = None,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype = jnp.float32,
) -> UNet:
    """A UNet from a local diffusers folder: `config.json` and `diffusion_pytorch_model.safetensors`.

    Args:
      folder: the UNet's folder (a pipeline's `unet/`), or one that `save_unet` wrote.
      new_context_head: adds a context head, freshly initialised (it outputs 0), to a network without one.
      dtype: of the products. param_dtype: of the parameters, whatever type the file has.

    Raises:
      ValueError: a file is missing or damaged, the config is not supported, or tensors do not fit it.
    """
    folder = Path(folder)
    config = UNetConfig.from_dict(_read_config(folder / CONFIG_FILE))
    policy = dict(dtype=dtype, param_dtype=param_dtype)
    # Abstract first: the random initialisation of a large network would cost more than reading the file.
    unet = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0), **policy))
    nnx.update(unet, unet_state_from_torch(_read_weights(folder / WEIGHTS_FILE), unet))
    if new_context_head is not None:
        if config.context_head:
            raise ValueError(f"{folder}: has a context head already; new_context_head is for one without")
        unet.config = dataclasses.replace(config, context_head=True)
        unet.context_head = nnx.data(ContextHead(unet.config, rngs=new_context_head, **policy))
    return unet


def save_unet(unet: UNet, folder: str | Path) -> None:
    """Writes `unet` as a diffusers folder, which `load_unet` reads back exactly (and so does diffusers).

    Weights that are in the folder are replaced only when the new ones are complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "UNet2DConditionModel", **unet.config.to_dict()}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    partial = folder / (WEIGHTS_FILE + ".partial")
    safetensors.numpy.save_file(unet_state_to_torch(unet), partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS_FILE)


def _read_config(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a diffusers UNet folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the UNet's weights in safetensors format")
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
