"""Names of the UNet's, the autoencoder's and the text encoders' layers in the original
latent-diffusion code, which single-file checkpoints and kohya's LoRA files for XL use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from contextdiff_jax.models.unet_config import UNetConfig

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = (
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
# OpenCLIP's names; its `in_proj` holds q, k and v together.
_OPEN_CLIP = (
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.in_proj_", ".self_attn.in_proj."),
    (r"\.attn\.", ".self_attn."),
)


def ldm_name(name: str, config: UNetConfig) -> str | None:
    """The original name of the layer that diffusers calls `name`; None for one that the original
    doesn't have.

    There, blocks are counted through: one a layer and one a downsampling on the way down (after the
    first convolution), one a layer on the way up, where the upsampling belongs to its level's last.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return None
    path, level, part, index, rest = match.groups()
    index = int(index)
    rest = _RESNET.get(rest, rest) if part == "resnets" else rest
    if path == "mid":
        return f"middle_block.{2 * index if part == 'resnets' else 1}.{rest}"
    level = int(level)
    layers = [one.num_layers for one in config.levels()]
    if path == "down":
        block = (
            1 + sum(layers[:level]) + level + (layers[level] if part == "downsamplers" else index)
        )
        places = {"resnets": f"0.{rest}", "attentions": f"1.{rest}", "downsamplers": "0.op"}
        return f"input_blocks.{block}.{places[part]}"
    layers = [count + 1 for count in layers[::-1]]
    block = sum(layers[:level]) + (layers[level] - 1 if part == "upsamplers" else index)
    after = 2 if config.up_block_types[level] == "CrossAttnUpBlock2D" else 1
    places = {"resnets": f"0.{rest}", "attentions": f"1.{rest}", "upsamplers": f"{after}.conv"}
    return f"output_blocks.{block}.{places[part]}"


def diffusers_name(name: str, layers: Sequence[int]) -> str | None:
    """The inverse of `ldm_name`, for a UNet whose levels have so many `layers` on the way down;
    None for a name that isn't one of its layers.
    """
    for ours, original in _OUTSIDE.items():
        if name == original:
            return ours
    match = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)\.(.+)", name)
    if match is None:
        return None
    path, block, rest = match.group(1), int(match.group(2)), match.group(3)
    if path == "middle":
        part = f"attentions.0.{rest}" if block == 1 else f"resnets.{block // 2}.{_resnet(rest)}"
        return f"mid_block.{part}"
    block -= path == "input"  # the first convolution
    levels = list(layers if path == "input" else reversed(layers))
    level = 0
    while level < len(levels) and block > levels[level]:
        block -= levels[level] + 1
        level += 1
    place, _, rest = rest.partition(".")
    if rest == "conv":
        part = "upsamplers.0.conv"
    elif rest == "op":
        part = "downsamplers.0.conv"
    else:
        part = f"attentions.{block}.{rest}" if place == "1" else f"resnets.{block}.{_resnet(rest)}"
    return f"{'down' if path == 'input' else 'up'}_blocks.{level}.{part}"


def _resnet(rest: str) -> str:
    return next((ours for ours, original in _RESNET.items() if original == rest), rest)


def vae_name(name: str, levels: int) -> str:
    """diffusers' name of one of the autoencoder's tensors. The way up is counted from its end."""
    for pattern, replacement in _VAE:
        name = re.sub(pattern, replacement, name)

    def up(match: re.Match) -> str:
        part = "resnets" if match.group(2) == "block" else "upsamplers.0"
        return f".up_blocks.{levels - 1 - int(match.group(1))}.{part}."

    return re.sub(r"\.up\.(\d+)\.(block|upsample)\.", up, name)


def open_clip_name(name: str) -> str:
    """transformers' name of one of OpenCLIP's text tensors; `in_proj` stays one."""
    for pattern, replacement in _OPEN_CLIP:
        name = re.sub(pattern, replacement, name)
    return name
