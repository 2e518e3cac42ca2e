"""Settings of a tiny model's editing."""

from __future__ import annotations

from conftest import SMALLEST, config_dict, mmdit_dict

from contextdiff_jax.configs.edit_shapes import video_sections
from contextdiff_jax.editing.settings import parse_edit


def edit_settings(kind="unet", **changes):
    """A tiny model's editing config with changes as "section.field": value; `kind`: of its
    backbone. The second edit asks for the source.
    """
    own = {
        name: value
        for name, value in changes.items()
        if name.split(".")[0] not in ("video", "edit")
    }
    config = mmdit_dict(**own) if kind == "mmdit" else config_dict(**SMALLEST | own)
    sections = video_sections()
    sections["video"] |= dict(prompt="a red circle", edit_prompts=("a blue circle", "a red circle"))
    sections["edit"] |= dict(steps=5)
    for name, value in changes.items():
        section, field = name.split(".")
        if section in sections:
            sections[section][field] = value
    return parse_edit(config | sections)
