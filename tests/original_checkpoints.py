"""Checkpoints in the original code's names, made of tiny random networks of diffusers."""

from __future__ import annotations

import re

import diffusers
import torch
import transformers
from torch_models import randomised

TEXT = dict(
    vocab_size=56,
    hidden_size=128,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    bos_token_id=54,
    eos_token_id=55,
    pad_token_id=55,
)
LAYERS = {"v1": 1, "v2": 2, "xl": 2}  # of a level
KINDS = tuple(LAYERS)


def networks(kind: str) -> dict[str, torch.nn.Module]:
    """Tiny random networks of the kind's form: what the original's configs fix (heads, groups,
    activations) and shapes don't tell is as there.
    """
    options = {
        "v1": dict(block_out_channels=(32, 64), attention_head_dim=8, cross_attention_dim=128),
        "v2": dict(
            block_out_channels=(64, 128),
            attention_head_dim=[1, 2],
            cross_attention_dim=128,
            use_linear_projection=True,
        ),
        "xl": dict(
            block_out_channels=(64, 128),
            attention_head_dim=[1, 2],
            cross_attention_dim=256,
            use_linear_projection=True,
            transformer_layers_per_block=[1, 2],
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
    }[kind]
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D")
    down = kinds if kind == "xl" else kinds[::-1]
    unet = diffusers.UNet2DConditionModel(
        sample_size={"v1": 64, "v2": 96, "xl": 128}[kind],
        layers_per_block=LAYERS[kind],
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in down[::-1]],
        **options,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        sample_size={"v1": 512, "v2": 768, "xl": 1024}[kind],
        layers_per_block=LAYERS[kind],
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.13025 if kind == "xl" else 0.18215,
    )
    open_clip = TEXT | dict(hidden_act="gelu", pad_token_id=0)
    first = transformers.CLIPTextConfig(**open_clip if kind == "v2" else TEXT)
    made = {"unet": unet, "vae": vae, "text_encoder": transformers.CLIPTextModel(first)}
    if kind == "xl":
        second = transformers.CLIPTextConfig(**open_clip, projection_dim=12)
        made["text_encoder_2"] = transformers.CLIPTextModelWithProjection(second)
    return {name: randomised(module, seed) for seed, (name, module) in enumerate(made.items())}


def original_unet(state: dict, layers: int, levels: int = 2) -> dict:
    """The UNet's tensors by the original's names, written down block by block, as diffusers'
    conversion script does.
    """
    places = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    step = layers + 1
    for i in range(levels):
        for j in range(layers):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{step * i + j + 1}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{step * i + j + 1}.1"
        for j in range(step):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{step * i + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{step * i + j}.1"
        has_attention = any(name.startswith(f"up_blocks.{i}.attentions.") for name in state)
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{step * (i + 1)}.0.op"
        last = f"output_blocks.{step * i + layers}.{2 if has_attention else 1}.conv"
        places[f"up_blocks.{i}.upsamplers.0.conv"] = last
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    named = {}
    for name, tensor in state.items():
        start = next(start for start in places if name.startswith(start + "."))
        rest = name.removeprefix(start + ".")
        if ".resnets." in start:
            rest = inside[rest.split(".")[0]] + "." + rest.split(".")[1]
        named[f"model.diffusion_model.{places[start]}.{rest}"] = tensor
    return named


def original_vae(state: dict, levels: int = 2) -> dict:
    """The autoencoder's; its attention's matrices are 1x1 convolutions there."""
    named = {}
    for name, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        name = name.replace("down_blocks.", "down.").replace("conv_norm_out", "norm_out")
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        name = name.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        if "mid_block.attentions" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(
                "group_norm", "norm"
            )
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        named["first_stage_model." + name] = tensor
    return named


def original_clip(state: dict, prefix: str) -> dict:
    return {
        f"{prefix}text_model.{name.removeprefix('text_model.')}": one for name, one in state.items()
    }


def original_open_clip(state: dict, prefix: str) -> dict:
    """OpenCLIP's names, with q, k and v in one."""
    named, state = {}, {name.removeprefix("text_model."): one for name, one in state.items()}
    for name, tensor in state.items():
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        name = re.sub(r"^encoder\.layers\.", "transformer.resblocks.", name)
        for ours, original in (
            ("layer_norm", "ln_"),
            ("fc1", "c_fc"),
            ("fc2", "c_proj"),
            ("self_attn", "attn"),
            ("final_ln_", "ln_final"),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
        ):
            name = name.replace(ours, original)
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        named[prefix + name] = tensor
    return named | {f"{prefix}logit_scale": torch.tensor(4.6)}


def original(kind: str, parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, with some that are none of the networks'."""
    state = {name: module.state_dict() for name, module in parts.items()}
    tensors = original_unet(state["unet"], LAYERS[kind]) | original_vae(state["vae"])
    if kind == "v1":
        tensors |= original_clip(state["text_encoder"], "cond_stage_model.transformer.")
    elif kind == "v2":
        tensors |= original_open_clip(state["text_encoder"], "cond_stage_model.model.")
    else:
        tensors |= original_clip(state["text_encoder"], "conditioner.embedders.0.transformer.")
        tensors |= original_open_clip(state["text_encoder_2"], "conditioner.embedders.1.model.")
    tensors |= {"alphas_cumprod": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
