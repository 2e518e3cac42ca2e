"""LoRA weights (Hu et al., 2021) in kohya's and diffusers' names: read, merged into a network,
written.

A layer's weight W becomes W + scale (alpha / rank) up @ down, with down [R, I, ...] and up [O, R,
...] in torch's layout, where a convolution's down has the kernel and its up is 1x1.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.pretrained import clip, unet
from contextdiff_jax.pretrained.files import open_tensors, save_tensors
from contextdiff_jax.pretrained.ldm import ldm_name
from contextdiff_jax.pretrained.names import Entry, name_map

# Component of a pipeline -> how kohya begins its names. The first text encoder has another name
# beside a second.
KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
STYLES = ("diffusers", "kohya")
# How files call the matrices, as endings of their names.
_PARTS = {
    "down": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight",
             ".lora_linear_layer.down.weight", "_lora.down.weight"),
    "up": (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight",
           ".lora_linear_layer.up.weight", "_lora.up.weight"),
    "alpha": (".alpha",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraLayer:
    """One layer's change: down [R, I, ...], up [O, R, ...] and alpha, the numerator of its scale."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]

    def delta(self) -> np.ndarray:
        """(alpha / rank) up @ down as a float32 matrix [O, I * ...]."""
        up, down = (np.asarray(w, np.float32) for w in (self.up, self.down))
        return (self.alpha / self.rank) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))


Lora = dict[
    str, dict[str, LoraLayer]
]  # component -> torch name of the layer (without `text_model.`) -> change


def load_lora(path: str | Path, modules: Mapping[str, nnx.Module]) -> Lora:
    """The changes that a LoRA file holds for `modules`.

    Args:
      path: a safetensors file in kohya's names (also those of the original Stable Diffusion code,
          which kohya has
        for XL) or in diffusers', PEFT's or older.
      modules: {"unet": UNet, "text_encoder": CLIPText, "text_encoder_2": CLIPText} or some of them;
          the file's
        layers of other components are not returned.

    Raises:
      ValueError: one line with file and tensor, for a damaged file, a layer that the modules don't
          have, one of
        another kind (LoHa, DoRA), one that is incomplete or has another shape, and a file without
        any for `modules`.
    """
    path = Path(path)
    raw, alphas = _read(path)
    entries = {component: _entries(module) for component, module in modules.items()}
    names = {component: _names(entries[component], module) for component, module in modules.items()}
    lora: Lora = {}
    problems = []
    for (component, key), parts in raw.items():
        if component not in modules:
            continue
        name = names[component].get(_flat(key))
        if name is None or not {"down", "up"} <= parts.keys():
            problems.append(
                f"{component} {key}: " + ("unknown layer" if name is None else "lacks up or down")
            )
            continue
        rank = parts["down"].shape[0]
        alpha = np.asarray(parts.get("alpha", alphas.get(component, rank)), np.float32)
        layer = LoraLayer(parts["down"], parts["up"], alpha.item())
        problem = _shape_problem(layer, entries[component][name])
        if problem:
            problems.append(f"{component} {key}: {problem}")
        lora.setdefault(component, {})[name] = layer
    if problems:
        raise ValueError(f"{path}: {len(problems)} layers do not fit: " + "; ".join(problems))
    if not lora:
        raise ValueError(f"{path}: holds no layers for {', '.join(modules)}")
    return lora


def merge_lora(
    module: UNet | CLIPText, layers: Mapping[str, LoraLayer], scale: float = 1.0
) -> None:
    """Adds `scale` times the changes to the parameters of `module`, in place, in float32 and then
    their own type.

    Args:
      layers: one component of what `load_lora` returns. scale: 1 is as trained; the negative takes
          it back.
    """
    entries = _entries(module)
    flat = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    changed = {}
    for name, layer in layers.items():
        if name not in entries:
            raise ValueError(f"{name}: the network has no such layer")
        entry = entries[name]
        problem = _shape_problem(layer, entry)
        if problem:
            raise ValueError(f"{name}: {problem}")
        param = flat[entry.path]
        delta = entry.from_torch(layer.delta().reshape(entry.torch_shape))
        value = param.get_value()
        changed[entry.path] = param.replace(
            (value.astype(jnp.float32) + scale * delta).astype(value.dtype)
        )
    nnx.update(module, nnx.from_flat_state(changed))


def save_lora(lora: Lora, path: str | Path, style: str = "diffusers") -> None:
    """Writes one file. `style`: "diffusers" (PEFT's names; alpha is folded into up) or "kohya"."""
    if style not in STYLES:
        raise ValueError(f"style={style!r}: unknown; one of {', '.join(STYLES)}")
    tensors = {}
    for component, layers in lora.items():
        for name, layer in layers.items():
            name = name if component == "unet" else f"text_model.{name}"
            if style == "diffusers":
                factor = layer.alpha / layer.rank
                up = (
                    layer.up
                    if factor == 1
                    else (layer.up.astype(np.float32) * factor).astype(layer.up.dtype)
                )
                tensors |= {
                    f"{component}.{name}.lora_A.weight": layer.down,
                    f"{component}.{name}.lora_B.weight": up,
                }
                continue
            first = KOHYA[component][
                1 if component == "text_encoder" and "text_encoder_2" in lora else 0
            ]
            stem = first + name.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
            tensors[f"{stem}.alpha"] = np.array(layer.alpha, layer.down.dtype)
    save_tensors(
        {name: np.array(tensor, order="C") for name, tensor in tensors.items()}, Path(path)
    )


def _read(path: Path) -> tuple[dict[tuple[str, str], dict[str, np.ndarray]], dict[str, float]]:
    """(component, layer) -> its parts, and the alphas of whole components (PEFT keeps them in the
    metadata).
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected LoRA weights in safetensors format")
    file = open_tensors(path)
    raw: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    unknown = []
    for name in file.keys():
        part, stem = _part(name)
        if part is None:
            unknown.append(name)
            continue
        tensor = file.get_tensor(name)
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError(f"{path}: {name}: holds NaN or infinity")
        raw.setdefault(_component(stem), {})[part] = tensor
    if unknown:
        kinds = "only LoRA's up, down and alpha are read, not LoHa, LoKr or DoRA"
        raise ValueError(
            f"{path}: {len(unknown)} tensors are unknown ({kinds}): {', '.join(sorted(unknown))}"
        )
    return raw, _metadata_alphas(path, file)


def _part(name: str) -> tuple[str | None, str]:
    """("down", "up" or "alpha", the layer's name as the file has it)."""
    for part, endings in _PARTS.items():
        for ending in endings:
            if name.endswith(ending):
                return part, name.removesuffix(ending)
    return None, name


def _component(stem: str) -> tuple[str, str]:
    """(component, layer) of a file's layer name; one without a component is the UNet's."""
    for component, starts in KOHYA.items():
        for start in (*starts, f"{component}."):
            if stem.startswith(start):
                stem = stem.removeprefix(start)
                return component, re.sub(
                    r"^text_model[._]", "", stem
                ) if component != "unet" else stem
    return "unet", stem.removeprefix("base_model.model.")


def _metadata_alphas(path: Path, file: safetensors.safe_open) -> dict[str, float]:
    values = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for name, value in values.items():
        if value and name.endswith((".alpha_pattern", ".use_rslora", ".use_dora")):
            raise ValueError(f"{path}: {name}={value!r} in its metadata: not supported")
    return {
        name.removesuffix(".lora_alpha"): float(v)
        for name, v in values.items()
        if name.endswith(".lora_alpha")
    }


def _flat(key: str) -> str:
    """kohya's form of a name, to which diffusers' old `attn1.processor.to_q` and `to_out` are
    brought too.
    """
    key = key.replace(".processor.", ".").replace(".", "_")
    return re.sub(r"to_out$", "to_out_0", key)


def _entries(module: UNet | CLIPText) -> dict[str, Entry]:
    """torch name of a layer, without `text_model.`, -> its weight's entry."""
    if isinstance(module, UNet):
        entries = name_map(module, unet.MODEL.rules(module.config))
    elif isinstance(module, CLIPText):
        entries = name_map(module, clip.TEXT.rules(module.config))
    else:
        raise ValueError(f"{type(module).__name__}: LoRA is for UNet and CLIPText")
    weights = {name: entry for name, entry in entries.items() if name.endswith(".weight")}
    return {
        name.removesuffix(".weight").removeprefix("text_model."): entry
        for name, entry in weights.items()
    }


def _names(layers: Iterable[str], module: UNet | CLIPText) -> dict[str, str]:
    """Flat names -> names of the layers."""
    names = {name.replace(".", "_"): name for name in layers}
    if isinstance(module, UNet):
        original = {ldm_name(name, module.config): name for name in layers}
        names |= {
            name.replace(".", "_"): ours for name, ours in original.items() if name is not None
        }
    return names


def _shape_problem(layer: LoraLayer, entry: Entry) -> str | None:
    shape = entry.torch_shape
    fits = (
        layer.up.shape[0] == shape[0]
        and layer.up.size == shape[0] * layer.rank
        and layer.down.size == layer.rank * math.prod(shape[1:])
    )
    return (
        None
        if fits
        else f"up {layer.up.shape}, down {layer.down.shape}; the layer's weight is {shape}"
    )
