"""Every field with its default for a small model. Other configs start from here and say what
differs.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from contextdiff_jax.parallel.mesh import RULES
from contextdiff_jax.settings import default_config, default_model

# What differs from the defaults of the dataclasses in contextdiff_jax/settings/. Those of `model`
# are diffusers', so that a folder's config.json means the same here: a Stable Diffusion, where this
# is a UNet of 2.5 M parameters on pixels.
DIFFERENCES = {
    "seed": 0,  # of its own it has none: a run states it
    "model.in_channels": 3,
    "model.out_channels": 3,
    "model.block_out_channels": (32, 64, 128),
    "model.layers_per_block": 1,
    "model.down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "model.up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "model.attention_head_dim": 4,
    "model.cross_attention_dim": 128,
    "model.norm_num_groups": 16,
    # All of the table, so that each can be set by a flag; '' is nothing, 'data,fsdp' is both.
    **{f"mesh.rules.{name}": axes for name, axes in RULES.items()},
}


def backbone(kind: str, **fields: Any) -> ConfigDict:
    """The section `model` of another kind of backbone: diffusers' defaults, with `fields`."""
    section = ConfigDict(default_model(kind))
    section.update(fields)
    return with_placeholders(section)


def with_placeholders(section: ConfigDict) -> ConfigDict:
    """The section, whose fields that are None a flag may set."""
    for field in [field for field, value in section.items() if value is None]:
        section[field] = placeholder(object)
    return section


def get_config() -> ConfigDict:
    """The defaults, with `DIFFERENCES`."""
    config = ConfigDict(default_config())
    config.update_from_flattened_dict(DIFFERENCES)
    with_placeholders(config.model)
    return config
