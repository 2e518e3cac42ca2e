"""A single-file checkpoint of Stable Diffusion 1.x, 2.x or XL, in the original code's names, as the
folder that it would be in diffusers' format.

FILE/unet, FILE/vae, FILE/text_encoder, FILE/scheduler and FILE/model_index.json are paths inside
it. Sizes are read off the tensors' shapes; what shapes don't tell is as in the original's
configs: 8 heads (1.x) or heads of 64 channels, 32 groups, the schedule. If the file lies in a
pipeline's folder (beside model_index.json), that folder's configs are read. EMA weights beside
others are not read, as in diffusers.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from contextdiff_jax.pretrained.ldm import diffusers_name, open_clip_name, vae_name
from contextdiff_jax.pretrained.one_file import (
    ChangedTensor,
    LazyTensor,
    open_tensors,
)
from contextdiff_jax.runtime.texts import read_object

LOGGER = logging.getLogger(__name__)
INDEX_FILE = "model_index.json"  # of a pipeline's folder
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
# Component -> prefixes of the text encoders: in transformers' names and in OpenCLIP's.
_TEXT = {
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
}
_OPEN_CLIP = {
    "text_encoder": ("cond_stage_model.model.",),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
# Of Stable Diffusion 2's 24 layers the last is not used.
_UNUSED = r"^(transformer\.resblocks\.23\.|text_projection$|logit_scale$|attn_mask$)"
Tensors = dict[str, LazyTensor | ChangedTensor]


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """The parts of a file, in diffusers' names, and which kind it is: "v1", "v2" or "xl"."""

    kind: str
    unet: Tensors
    vae: Tensors
    texts: dict[str, Tensors]
    layers: tuple[int, ...]  # of the UNet's levels on the way down
    v_prediction: bool
    zero_snr: bool

    @property
    def parts(self) -> dict[str, Tensors]:
        """The parts that the file holds, by the pipeline's names."""
        found = {"unet": self.unet, "vae": self.vae, **self.texts}
        return {part: tensors for part, tensors in found.items() if tensors}


def split(path: Path) -> tuple[Path, str] | None:
    """(the single file, the path inside it, "" for itself), or None for a path outside of any."""
    for parent in (path, *path.parents):
        if parent.suffix == ".safetensors" and parent.is_file():
            return parent, "" if parent == path else path.relative_to(parent).as_posix()
    return None


def has(file: Path, inside: str) -> bool:
    """Whether the file's folder would have the file or folder `inside`."""
    if not inside:
        return True
    part, _, rest = inside.partition("/")
    known = {INDEX_FILE: "", "scheduler": "scheduler_config.json"}
    known |= dict.fromkeys(_open(file, file.stat().st_mtime_ns).parts, "config.json")
    return part in known and rest in ("", known[part])


def tensors(file: Path, inside: str) -> Tensors:
    """A model's tensors, by diffusers' names. ValueError for one that the file doesn't hold."""
    found = _open(file, file.stat().st_mtime_ns).parts.get(inside)
    if not found:
        raise ValueError(f"{file}: holds no {inside or 'model of that kind'}")
    return found


def values(file: Path, inside: str) -> dict[str, Any]:
    """The values of JSON file `inside`. ValueError for a file of another kind, or without it."""
    checkpoint = _open(file, file.stat().st_mtime_ns)
    if not has(file, inside) or not inside.endswith(".json"):
        parts = ", ".join(f"{file.name}/{part}" for part in checkpoint.parts)
        raise ValueError(f"{file}: holds no {inside}; its models are {parts}")
    if file.with_name(INDEX_FILE).is_file() and inside != INDEX_FILE:
        if (beside := file.parent / inside).is_file():
            return read_object(beside, "the config of a single file's part")
    part = inside.split("/")[0]
    make = {INDEX_FILE: _index, "scheduler": _scheduler, "unet": _unet_config, "vae": _vae_config}
    try:
        return make[part](checkpoint) if part in make else _text_config(checkpoint, part)
    except KeyError as error:
        raise ValueError(f"{file}: its {part} lacks {error.args[0]}") from None


@functools.lru_cache(maxsize=2)
def _open(file: Path, changed: int) -> _Checkpoint:
    """`changed`: the file's time, for the cache."""
    stored = open_tensors(file)
    names = sorted(stored.keys())
    _check_kind(file, names)
    lazy = {name: LazyTensor(stored, name, file) for name in names}

    def below(*prefixes: str) -> dict[str, LazyTensor]:
        return {
            name.removeprefix(prefix): tensor
            for prefix in prefixes
            for name, tensor in lazy.items()
            if name.startswith(prefix)
        }

    unet, layers = _unet(below(_UNET))
    texts = {part: _clip(below(*prefixes)) for part, prefixes in _TEXT.items()}
    xl = any(name.startswith("conditioner.") for name in names)
    for part, prefixes in _OPEN_CLIP.items():
        texts[part] = texts.get(part) or _open_clip(below(*prefixes), whole=xl)
    open_clip = any(name.startswith(_OPEN_CLIP["text_encoder"]) for name in names)
    kind = "xl" if xl else "v2" if open_clip else "v1"
    return _Checkpoint(
        kind=kind,
        unet=unet,
        vae=_vae(below(_VAE)),
        texts={part: found for part, found in texts.items() if found},
        layers=layers,
        v_prediction=_predicts_v(file, kind, lazy, stored.metadata() or {}),
        zero_snr="ztsnr" in lazy,
    )


def _check_kind(file: Path, names: list[str]) -> None:
    """Raises ValueError unless the file is one of ours, and says what it is where it can."""
    if any("lora" in name for name in names):
        problem = "is a LoRA file"
    elif any("joint_blocks." in name for name in names):
        problem = "is of Stable Diffusion 3, which is read from its diffusers folder"
    elif f"{_UNET}input_blocks.0.0.weight" not in names:
        problem = f"lacks {_UNET}input_blocks.0.0.weight; its first tensor is {names[:1]}"
    elif any(name.startswith("conditioner.embedders.0.model.") for name in names):
        problem = "is XL's refiner"
    elif "edm_mean" in names:
        problem = "is Playground 2.5 (edm_mean)"
    else:
        return
    raise ValueError(
        f"{file}: {problem}; of single files, checkpoints of Stable Diffusion 1.x, 2.x and XL's "
        "base are read"
    )


def _unet(found: Mapping[str, LazyTensor]) -> tuple[Tensors, tuple[int, ...]]:
    """The UNet's tensors (those of unknown names under their own), and its levels' layers."""
    layers = [0]
    for block in range(1, 1 + _count(found, r"^input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in found:
            layers.append(0)
        elif f"input_blocks.{block}.0.in_layers.2.weight" in found:
            layers[-1] += 1
    named = {}
    for name, tensor in found.items():
        stem, _, leaf = name.rpartition(".")
        ours = diffusers_name(stem, layers)
        named[f"{ours}.{leaf}" if ours else _UNET + name] = tensor
    return named, tuple(layers)


def _vae(found: Mapping[str, LazyTensor]) -> Tensors:
    levels = _count(found, r"^decoder\.up\.(\d+)\.")
    named: Tensors = {}
    for name, tensor in found.items():
        if name.startswith(("loss.", "model_ema.")):  # of its training
            continue
        ours = vae_name(name, levels)
        is_dense = ".attentions." in ours and len(tensor.shape) > 2
        named[ours] = ChangedTensor(tensor, _without_kernel) if is_dense else tensor
    return named


def _without_kernel(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(weight.shape[:2])


def _clip(found: Mapping[str, LazyTensor]) -> Tensors:
    """transformers' names, which some writers shorten."""
    return {f"text_model.{name.removeprefix('text_model.')}": one for name, one in found.items()}


def _open_clip(found: Mapping[str, LazyTensor], *, whole: bool) -> Tensors:
    named: Tensors = {}
    for name, tensor in found.items():
        if re.search(r"^(logit_scale|attn_mask)$" if whole else _UNUSED, name):
            continue
        ours = open_clip_name(name)
        if ".in_proj." in ours:
            for i, letter in enumerate("qkv"):
                part = functools.partial(_third, index=i)
                named[ours.replace("in_proj", f"{letter}_proj")] = ChangedTensor(tensor, part)
        elif name == "text_projection":
            named[ours] = ChangedTensor(tensor, np.transpose)
        else:
            named[ours] = tensor
    return named


def _third(weight: np.ndarray, index: int) -> np.ndarray:
    width = len(weight) // 3
    return weight[index * width : (index + 1) * width]


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that the names have where the pattern says; 0 for none."""
    numbers = [int(match.group(1)) for name in names if (match := re.search(pattern, name))]
    return max(numbers, default=-1) + 1


def _predicts_v(file: Path, kind: str, lazy: Mapping[str, LazyTensor], told: Mapping) -> bool:
    """Whether the network predicts v: as the file says; else as its kind does. Of Stable Diffusion
    2, whose 512-pixel base predicts epsilon, a norm's biases tell them apart, as in ComfyUI.
    """
    said = told.get("modelspec.prediction_type")
    if "v_pred" in lazy or said in ("v", "epsilon"):
        return "v_pred" in lazy or said == "v"
    norm = lazy.get(f"{_UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias")
    if kind != "v2" or lazy[f"{_UNET}input_blocks.0.0.weight"].shape[1] != 4:
        return False
    v = norm is None or float(np.std(np.asarray(norm, np.float32))) > 0.09
    LOGGER.warning(
        "%s: doesn't say what it predicts; taken as Stable Diffusion 2 with %s prediction",
        *(file, "v" if v else "epsilon"),
    )
    return v


def _index(checkpoint: _Checkpoint) -> dict[str, Any]:
    xl = "XL" if checkpoint.kind == "xl" else ""
    inpaint = "Inpaint" if checkpoint.unet["conv_in.weight"].shape[1] == 9 else ""
    index = {
        "_class_name": f"StableDiffusion{xl}{inpaint}Pipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    for part in checkpoint.texts:
        projected = "WithProjection" if "text_projection.weight" in checkpoint.texts[part] else ""
        index[part] = ["transformers", f"CLIPTextModel{projected}"]
        index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if xl:
        return index | {"force_zeros_for_empty_prompt": True}
    return index | {"safety_checker": [None, None], "feature_extractor": [None, None]}


def _scheduler(checkpoint: _Checkpoint) -> dict[str, Any]:
    zero = checkpoint.zero_snr
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if checkpoint.v_prediction else "epsilon",
        "clip_sample": False,
        "rescale_betas_zero_snr": zero,
        "set_alpha_to_one": zero,
        "steps_offset": 0 if zero else 1,
        "timestep_spacing": "trailing" if zero else "leading",
    }


def _unet_config(checkpoint: _Checkpoint) -> dict[str, Any]:
    unet, layers = checkpoint.unet, checkpoint.layers
    levels = range(len(layers))
    channels = [unet[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels]
    depths = [_depth(unet, rf"^down_blocks\.{i}\.attentions\.0") for i in levels]
    middle = _depth(unet, r"^mid_block\.attentions\.0")
    dense = len(unet["mid_block.attentions.0.proj_in.weight"].shape) == 2
    # The middle has the last level's; a level without attention may say anything.
    told = [depth or 1 for depth in depths[:-1]] + [middle]
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": _side(checkpoint) // 8,
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": unet["conv_out.weight"].shape[0],
        "block_out_channels": channels,
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in depths],
        "up_block_types": [f"{'CrossAttn' if depth else ''}UpBlock2D" for depth in depths[::-1]],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else list(layers),
        "transformer_layers_per_block": told[0] if len(set(told)) == 1 else told,
        "cross_attention_dim": _block(unet, "attn2.to_k.weight").shape[1],
        "use_linear_projection": dense,
        "attention_head_dim": [max(1, width // 64) for width in channels] if dense else 8,
    }
    if checkpoint.kind == "xl":
        read = unet["add_embedding.linear_1.weight"].shape[1]
        pooled = checkpoint.texts.get("text_encoder_2", {}).get("text_projection.weight")
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": read,
            "addition_time_embed_dim": (read - (pooled.shape[0] if pooled else 1280)) // 6,
        }
    return config


def _depth(unet: Tensors, place: str) -> int:
    return _count(unet, place + r"\.transformer_blocks\.(\d+)\.")


def _block(unet: Tensors, name: str) -> LazyTensor | ChangedTensor:
    return unet[f"mid_block.attentions.0.transformer_blocks.0.{name}"]


def _side(checkpoint: _Checkpoint) -> int:
    """The side of the pictures that its kind was trained on, in pixels."""
    return {"v1": 512, "v2": 768 if checkpoint.v_prediction else 512, "xl": 1024}[checkpoint.kind]


def _vae_config(checkpoint: _Checkpoint) -> dict[str, Any]:
    vae = checkpoint.vae
    levels = _count(vae, r"^encoder\.down_blocks\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae["encoder.conv_in.weight"].shape[1],
        "out_channels": vae["decoder.conv_out.weight"].shape[0],
        "latent_channels": vae["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [
            vae[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)
        ],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": _count(vae, r"^encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in vae,
        "sample_size": _side(checkpoint),
        "scaling_factor": 0.13025 if checkpoint.kind == "xl" else 0.18215,
    }


def _text_config(checkpoint: _Checkpoint, part: str) -> dict[str, Any]:
    text = checkpoint.texts[part]
    vocabulary, width = text["text_model.embeddings.token_embedding.weight"].shape
    projection = text.get("text_projection.weight")
    open_clip = checkpoint.kind == "v2" or part == "text_encoder_2"
    config = {
        "architectures": ["CLIPTextModel" + ("" if projection is None else "WithProjection")],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": text["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(text, r"^text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if open_clip else vocabulary - 1,
    }
    return config if projection is None else config | {"projection_dim": projection.shape[0]}
