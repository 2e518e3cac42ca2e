"""Tiny torch models and random LoRA layers of them: as they are trained, and as files hold them."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from diffusers import UNet2DConditionModel
from torch_models import randomised

UNET = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=12,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
TEXT = dict(
    vocab_size=30, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3
)
ALPHA = 3.0


def save_models(folder):
    """Folders of the UNet and the text encoder, and their torch models."""
    unet = randomised(UNet2DConditionModel(sample_size=8, **UNET))
    text = randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)))
    unet.save_pretrained(folder / "unet")
    text.save_pretrained(folder / "text")
    return folder, unet, text


def targets(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every dense and convolutional layer."""
    return {
        n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    }


def random_lora(model: torch.nn.Module, rank: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """layer -> (down, up), convolutions with their kernel in down."""
    rng = np.random.default_rng(0)
    pairs = {}
    for name, layer in targets(model).items():
        weight = layer.weight
        down = rng.standard_normal((rank, *weight.shape[1:])) / weight[0].numel() ** 0.5
        up = rng.standard_normal((weight.shape[0], rank, *(1,) * (weight.ndim - 2))) / rank**0.5
        pairs[name] = down.astype(np.float32), up.astype(np.float32)
    return pairs


def hooked(model: torch.nn.Module, pairs, scale: float):
    """Adds scale up(down(x)) to every layer's output, as LoRA is trained."""

    def hook(down, up):
        def add(layer, inputs, output):
            down_there, up_there = torch.tensor(down), torch.tensor(up)
            if isinstance(layer, torch.nn.Linear):
                inner = torch.nn.functional.linear(inputs[0], down_there)
                return output + scale * torch.nn.functional.linear(inner, up_there)
            inner = torch.nn.functional.conv2d(
                inputs[0], down_there, stride=layer.stride, padding=layer.padding
            )
            return output + scale * torch.nn.functional.conv2d(inner, up_there)

        return add

    return [
        layer.register_forward_hook(hook(*pairs[name])) for name, layer in targets(model).items()
    ]


def kohya(pairs, start: str) -> dict[str, np.ndarray]:
    tensors = {}
    for name, (down, up) in pairs.items():
        stem = start + name.replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": np.float32(ALPHA),
        }
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}
