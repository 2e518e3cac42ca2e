"""LoRA weights (Hu et al., 2021) in kohya's and diffusers' names: read, merged into a network,
written.

A layer's weight W becomes W + scale (alpha / rank) up @ down, with down [R, I, ...] and up [O, R,
...] in torch's layout, where a convolution's down has the kernel and its up is 1x1.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from contextdiff_jax.models.clip import CLIPText
from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.pretrained import clip, mmdit, unet
from contextdiff_jax.pretrained.adapters import AdapterSettings
from contextdiff_jax.pretrained.folder_files import (
    PICKLES,
    LazyTensor,
    open_tensors,
    read_json,
    save_tensors,
)
from contextdiff_jax.pretrained.ldm import ldm_name
from contextdiff_jax.pretrained.lora_layer import LoraLayer
from contextdiff_jax.pretrained.names import Entry, name_map
from contextdiff_jax.runtime.fields import check_choice

# Component of a pipeline -> how kohya begins its names. The first text encoder has another name
# beside a second.
KOHYA = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_transformer_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
STYLES = ("diffusers", "kohya")
_MODELS = {UNet: unet.MODEL, MMDiT: mmdit.MODEL, CLIPText: clip.TEXT}
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# How ComfyUI and LyCORIS begin the names, beside kohya's and diffusers' (`unet.`, ...).
_STARTS = {
    "unet": ("lycoris_", "diffusion_model.", "model.diffusion_model."),
    "transformer": (),
    "text_encoder": ("text_encoders.clip_l.transformer.",),
    "text_encoder_2": ("text_encoders.clip_g.transformer.",),
}
# How files call the matrices, as endings of their names: kohya's, PEFT's (which may name the
# adapter), diffusers' three.
_PARTS = {
    "down": r"(\.lora_down|\.lora_A(\.[^.]+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight$",
    "up": r"(\.lora_up|\.lora_B(\.[^.]+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight$",
    "mid": r"\.lora_mid\.weight$",
    "alpha": r"(([._]lora|\.lora_linear_layer)(\.down)?)?\.alpha$",
}
# Layers of Stable Diffusion 3's transformer, and of a text encoder, that say no component.
_TRANSFORMER = (
    r"(transformer_blocks|pos_embed|time_text_embed|context_embedder|norm_out|proj_out)\b"
)
_TEXT = r"(text_model\.)?(encoder\.layers|embeddings|final_layer_norm|text_projection)\b"


# Component -> torch name of the layer (without `text_model.`) -> change.
Lora = dict[str, dict[str, LoraLayer]]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A layer of a file: its matrices, its component ("" if it says no more than that it is a text
    encoder's), its name without the component, and whether that name is PEFT's own.
    """

    component: str
    layer: str
    bare: bool
    parts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def load_lora(path: str | Path, modules: Mapping[str, nnx.Module]) -> Lora:
    """The changes that a LoRA file holds for `modules`.

    Args:
      path: a safetensors file in kohya's names (also those of the original Stable Diffusion code,
          which kohya has for XL), in ComfyUI's, diffusers' or PEFT's; or the folder of a PEFT
          adapter. Beside PEFT's names the strength is in adapter_config.json or the metadata.
      modules: {"unet": UNet (or "transformer": MMDiT), "text_encoder": CLIPText, "text_encoder_2":
          CLIPText} or some of them; the file's layers of other components are not returned. An
          adapter of a text encoder alone doesn't say of which: it is that of the two that it fits.

    Raises:
      ValueError: one line with file and tensor or setting, for a damaged file, a layer that the
          modules don't have, one of another kind (LoHa, DoRA), one that is incomplete or has
          another shape, settings that make it another change, and a file without any for `modules`.
    """
    path = _file(Path(path))
    file = open_tensors(path)
    stored = _read(path, file)
    entries = {component: _entries(module) for component, module in modules.items()}
    names = {component: _names(entries[component], module) for component, module in modules.items()}
    text = _text_component(path, stored, entries, names)
    own = {"" for one in stored if one.bare and one.component in ("", *modules)}
    settings = _settings(path, file, own | modules.keys())
    lora: Lora = {}
    problems = []
    for one in stored:
        component = one.component or text
        if component not in modules:
            continue
        name = names[component].get(_flat(one.layer))
        if name is None or not {"down", "up"} <= one.parts.keys():
            why = "unknown layer" if name is None else "lacks up or down"
            problems.append(f"{component} {one.layer}: {why}")
            continue
        told = settings.get("" if one.bare else component)
        layer = _layer(one, told, entries[component][name])
        if isinstance(layer, str):
            problems.append(f"{component} {one.layer}: {layer}")
        elif not _same(lora.setdefault(component, {}).setdefault(name, layer), layer):
            problems.append(f"{component} {one.layer}: is there twice, with other values")
    if problems:
        raise ValueError(f"{path}: {len(problems)} layers do not fit: " + "; ".join(problems))
    if not lora:
        held = sorted({one.component or "a text encoder" for one in stored})
        raise ValueError(
            f"{path}: holds no layers for {', '.join(modules)}; it has {', '.join(held) or 'none'}"
        )
    return lora


def merge_lora(
    module: UNet | MMDiT | CLIPText, layers: Mapping[str, LoraLayer], scale: float = 1.0
) -> None:
    """Adds `scale` times the changes to the parameters of `module`, in place, in float32 and then
    their own type.

    Args:
      layers: one component of what `load_lora` returns. scale: 1 is as trained; the negative takes
          it back.
    """
    entries = _entries(module)
    flat = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
    changed: dict[tuple, np.ndarray] = {}
    for name, layer in layers.items():
        if name not in entries:
            raise ValueError(f"{name}: the network has no such layer")
        entry = entries[name]
        problem = layer.shape_problem(entry.torch_shape)
        if problem:
            raise ValueError(f"{name}: {problem}")
        delta = entry.from_torch(layer.delta().reshape(entry.torch_shape))
        if entry.layer is None:
            changed[entry.path] = delta
        else:  # of an array of all layers that are alike
            zeros = np.zeros(flat[entry.path].shape, np.float32)
            changed.setdefault(entry.path, zeros)[entry.layer] = delta
    for path, delta in changed.items():
        value = flat[path].get_value()
        added = (value.astype(jnp.float32) + scale * delta).astype(value.dtype)
        changed[path] = flat[path].replace(added)
    nnx.update(module, nnx.from_flat_state(changed))


def save_lora(lora: Lora, path: str | Path, style: str = "diffusers") -> None:
    """Writes one file. `style`: "diffusers" (PEFT's names; alpha is folded into up) or "kohya"."""
    check_choice("style", style, STYLES)
    tensors = {}
    for component, layers in lora.items():
        for name, layer in layers.items():
            # These lie outside text_model.
            whole = component in ("unet", "transformer") or name == "text_projection"
            name = name if whole else f"text_model.{name}"
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
            # diffusers reads this one by its original name only.
            name = name.replace("add_embedding.linear_1", "label_emb.0.0")
            name = name.replace("add_embedding.linear_2", "label_emb.0.2")
            stem = first + name.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
            tensors[f"{stem}.alpha"] = np.array(layer.alpha, layer.down.dtype)
    save_tensors(
        {name: np.array(tensor, order="C") for name, tensor in tensors.items()}, Path(path)
    )


def _file(path: Path) -> Path:
    """The file to read: `path`, or the one in a folder that PEFT or diffusers wrote."""
    if path.is_dir():
        theirs = path / "pytorch_lora_weights.safetensors"
        path = theirs if theirs.is_file() else path / ADAPTER_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected LoRA weights in safetensors format")
    if any(path.match(pattern) for pattern in PICKLES):
        raise ValueError(
            f"{path}: refused, a pickle can run any code when it is read; convert it to safetensors"
        )
    return path


def _read(path: Path, file: safetensors.safe_open) -> list[_Stored]:
    """The layers as the file has them."""
    stored: dict[tuple, _Stored] = {}
    unknown = []
    for name in sorted(file.keys()):
        part, stem = _part(name)
        if part is None:
            unknown.append(name)
            continue
        tensor = np.asarray(LazyTensor(file, name, path))
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError(f"{path}: {name}: holds NaN or infinity")
        key = _component(stem)
        parts = stored.setdefault(key, _Stored(*key)).parts
        if not np.array_equal(parts.setdefault(part, tensor), tensor):
            raise ValueError(f"{path}: {name}: is there twice, with other values")
    if unknown:
        kinds = "only LoRA's up, down, mid and alpha are read, not LoHa, LoKr or DoRA"
        more = f" and {len(unknown) - 9} more" if len(unknown) > 9 else ""
        raise ValueError(
            f"{path}: {len(unknown)} tensors are unknown ({kinds}): {', '.join(unknown[:9])}{more}"
        )
    return list(stored.values())


def _part(name: str) -> tuple[str | None, str]:
    """("down", "up", "mid" or "alpha", the layer's name as the file has it)."""
    for part, ending in _PARTS.items():
        if match := re.search(ending, name):
            return part, name[: match.start()]
    return None, name


def _component(stem: str) -> tuple[str, str, bool]:
    """(component, layer, whether the name is PEFT's own) of a file's layer name."""
    stem = stem.removeprefix("base_model.model.")
    for component, starts in KOHYA.items():
        for start in (*starts, f"{component}.", *_STARTS[component]):
            if stem.startswith(start):
                return component, stem.removeprefix(start).removeprefix("base_model.model."), False
    if re.match(_TRANSFORMER, stem):
        return "transformer", stem, True
    return "" if re.match(_TEXT, stem) else "unet", stem, True


def _text_component(
    path: Path, stored: list[_Stored], entries: Mapping[str, dict], names: Mapping[str, dict]
) -> str:
    """The text encoder that the layers without a component belong to: the only one, or the only
    one that has them all, in their shapes.
    """
    layers = [one for one in stored if not one.component]
    found = [component for component in entries if component.startswith("text_encoder")]

    def fits(component: str, one: _Stored) -> bool:
        name = names[component].get(_flat(one.layer))
        return name is not None and not isinstance(_layer(one, None, entries[component][name]), str)

    if layers and len(found) > 1:
        found = [one for one in found if all(fits(one, layer) for layer in layers)]
        if len(found) != 1:
            raise ValueError(
                f"{path}: is of a text encoder and fits "
                f"{' and '.join(found) or 'neither of the two'}; give `modules` with the one that "
                "it is for"
            )
    return found[0] if found else ""


def _settings(
    path: Path, file: safetensors.safe_open, wanted: Set[str]
) -> dict[str, AdapterSettings]:
    """PEFT's settings of the `wanted` components in the metadata, and, if "" is wanted, those for
    layers in its own names, from the metadata or the file beside.
    """
    try:
        told = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        items = dict(told).items()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: lora_adapter_metadata: not a JSON object ({error})") from None
    values: dict[str, dict] = {}
    for name, value in items:
        component, _, field = name.rpartition(".")
        values.setdefault(component, {})[field] = value
    settings = {
        component: AdapterSettings(f"{path}: metadata", own)
        for component, own in values.items()
        if component in wanted
    }
    beside = path.with_name(ADAPTER_CONFIG)
    if "" in wanted - settings.keys() and (beside.is_file() or path.name == ADAPTER_FILE):
        own = read_json(beside, "the settings of a PEFT adapter, with its lora_alpha")
        settings[""] = AdapterSettings(str(beside), own)
    return settings


def _layer(one: _Stored, settings: AdapterSettings | None, entry: Entry) -> LoraLayer | str:
    """The change, or why it isn't one of the layer that `entry` is."""
    down, up, mid = (one.parts.get(part) for part in ("down", "up", "mid"))
    if down is None or up is None:
        return "lacks up or down"
    if min(down.ndim, up.ndim) < 2 or not len(down):
        return f"up {up.shape}, down {down.shape}; must be matrices"
    rank = len(down)
    if mid is not None:  # LoCon's decomposed kernel: mid [R, R, ...] between up and a 1x1 down
        if mid.shape[:2] != (rank, rank) or down.size != rank * down.shape[1]:
            return f"mid {mid.shape}, down {down.shape}; must be {rank} by {rank}, and 1x1"
        kernel, inner = np.asarray(mid, np.float32), np.asarray(down, np.float32)
        down = np.einsum("pr...,ri->pi...", kernel, inner.reshape(rank, -1))
    alpha = one.parts.get("alpha")
    if alpha is None:
        alpha = np.float32(rank if settings is None else settings.alpha(one.layer, rank))
    if alpha.size != 1:
        return f"alpha {alpha.shape}; must be one number"
    layer = LoraLayer(down, up, float(alpha.astype(np.float32).item()))
    return layer.shape_problem(entry.torch_shape) or layer


def _same(layer: LoraLayer, other: LoraLayer) -> bool:
    return layer is other or np.array_equal(layer.delta(), other.delta())


def _flat(layer: str) -> str:
    """kohya's form of a name, to which diffusers' old ones are brought too: the attention
    processors', `to_out` of the UNet, and the UNet's `to_q` in the text encoder.
    """
    name = layer.removeprefix("text_model.").replace(".processor.", ".").replace(".", "_")
    name = name.removeprefix("text_model_")
    name = re.sub(r"(self_attn)_to_([qkv]|out)$", r"\1_\2_proj", name)
    return re.sub(r"to_out$", "to_out_0", name)


def _entries(module: UNet | MMDiT | CLIPText) -> dict[str, Entry]:
    """torch name of a layer, without `text_model.`, -> its weight's entry."""
    model = _MODELS.get(type(module))
    if model is None:
        names = " and ".join(kind.__name__ for kind in _MODELS)
        raise ValueError(f"{type(module).__name__}: LoRA is for {names}")
    entries = name_map(module, model.rules(module.config))
    weights = {name: entry for name, entry in entries.items() if name.endswith(".weight")}
    return {
        name.removesuffix(".weight").removeprefix("text_model."): entry
        for name, entry in weights.items()
    }


def _names(layers: Iterable[str], module: UNet | MMDiT | CLIPText) -> dict[str, str]:
    """Flat names -> names of the layers."""
    names = {name.replace(".", "_"): name for name in layers}
    if isinstance(module, UNet):
        original = {ldm_name(name, module.config): name for name in layers}
        names |= {
            name.replace(".", "_"): ours for name, ours in original.items() if name is not None
        }
    return names
