"""Saving of an opened model, and uploading it: `Pipeline.save` and `Pipeline.push_to_hub`.

    pipeline.save("shapes", dtype="float16")           # a folder: Pipeline.open("shapes")
    pipeline.push_to_hub("ORG/shapes", license="mit")  # anywhere: Pipeline.open("ORG/shapes")

A run becomes our own folder (`runs.saved`), a Stable Diffusion folder a copy of itself without its
pickles.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from contextdiff_jax.inference.opened import Opened
from contextdiff_jax.models.lora import merge_lora
from contextdiff_jax.pretrained.conversion import complete_or_absent, copy_folder
from contextdiff_jax.runs import saved
from contextdiff_jax.runs.card import folder_card
from contextdiff_jax.runs.saved import Description
from contextdiff_jax.runtime import hub
from contextdiff_jax.settings import Settings


def save(opened: Opened, folder: str | os.PathLike, **options: Any) -> None:
    """Writes the model as a folder; it is complete or isn't there.

    Args:
      options: `dtype` of a run's stored parameters (`float32`, `float16`, `bfloat16`); `card`, a
        file that becomes README.md's text in the place of the one that is made; `license`, its name
        in the card; `name`, the model's in the card.

    Raises ValueError, one line, for a folder that holds something, a model with a guide, and a type
    that can't hold the parameters.
    """
    if opened.guide is not None:
        raise ValueError("save: a model with a guide (autoguidance) is two; save each by itself")
    if opened.write is None:
        raise ValueError("save: this model came from no folder and no run")
    opened.write(opened.weights, Path(folder), **options)


def push_to_hub(
    opened: Opened,
    name: str,
    *,
    message: str = "",
    private: bool | None = None,
    token: str | None = None,
    **options: Any,
) -> str:
    """Uploads what `save` writes, and gives the address of the commit.

    Args:
      name: `ORG/NAME`, which is made if there is none, or a branch of it, `ORG/NAME@BRANCH`.
      message: of the commit. private, token: as of huggingface_hub; by default the repository is
        public, and the token the one that `hf auth login` stored.
      options: as of `save`.

    Raises ValueError, one line, for what `save` or the hub refuses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        save(opened, folder, **{"name": name.removeprefix(hub.SCHEME)} | options)
        text = message or f"{opened.source or 'a model'}, by contextdiff_jax"
        return hub.upload(folder, name, text, private=private, token=token)


def write_run(
    settings: Settings,
    description: Description,
    weights: tuple[PyTree, ...],
    target: Path,
    **options: Any,
) -> None:
    """`Opened.write` of a run: its parameters with LoRA's products in them, all that it reads."""
    saved.save(settings, merge_lora(weights[0]), target, description, **options)


def write_folder(
    source: str,
    weights: tuple[PyTree, ...],
    target: Path,
    *,
    dtype: str | None = None,
    card: str | os.PathLike | None = None,
    license: str | None = None,
    name: str = "",
) -> None:
    """`Opened.write` of a Stable Diffusion folder: a copy, with a card if it has none."""
    if not source or not Path(source).exists():
        raise ValueError(f"save: {source or 'its folder'} is no longer there")
    if dtype is not None:
        raise ValueError(f"dtype={dtype!r}: a Stable Diffusion folder is copied as it is")
    with complete_or_absent(target, "folder") as partial:
        copy_folder(Path(source), partial)
        readme = partial / saved.CARD_FILE
        if card is not None:
            readme.write_text(saved.read_card(card))
        elif not readme.exists():
            readme.write_text(folder_card(name or target.name, license))
