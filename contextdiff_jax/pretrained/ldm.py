"""Names of the UNet's layers in the original latent-diffusion code, which kohya's LoRA files for XL
use.
"""

from __future__ import annotations

import re

from contextdiff_jax.models.unet_config import UNetConfig

_OUTSIDE = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


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
