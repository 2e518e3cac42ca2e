"""Our folder of a trained model, complete in itself: the form of `Pipeline.save`, of the models
that ship with the package, and of repositories on the hub.

    config.json         model_type, format, step, which weights, and `config`: the run's
    model.safetensors   the parameters by dotted path, in float32, float16 or bfloat16
    tokenizer.json      the captions'; or tokenizer/, of a pretrained text encoder
    vae/, text_encoder/, clip/   the frozen networks that the run reads, in diffusers' format
    README.md, LICENSE  the card, and its licence

It is read wherever a run's folder is. Paths in `config` that the folder holds are relative to it;
those of the machine that trained are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from contextdiff_jax.data.tokenizer import BUNDLED, pipeline_parts
from contextdiff_jax.pretrained.conversion import complete_or_absent, copy_folder
from contextdiff_jax.pretrained.folder_files import (
    INDEX_FILE,
    FolderTensors,
    read_json,
    save_tensors,
)
from contextdiff_jax.pretrained.pipeline_folder import encoder_names, is_pipeline, read_index
from contextdiff_jax.runs.card import make_card
from contextdiff_jax.runtime.fields import check_choice, check_section
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.settings import Settings, to_config

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
# Files for people, which may be written before the model is, and stay.
_FOR_PEOPLE = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
MODEL_TYPE, FORMAT = "contextdiff_jax", 1
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Fields of the config that name what the folder holds, and its name there.
HELD = {
    ("data", "tokenizer"): "tokenizer",
    ("latent", "vae"): "vae",
    ("text", "pretrained"): "text_encoder",
    ("context", "clip"): "clip",
}
# ... and those that name what only the machine that trained has.
_LEFT_OUT = (("train", "init_from"), ("distill", "teacher"), ("model", "pretrained"))
_DATA = ("path", "metadata", "heldout_metadata", "index_folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """What a saved model says of itself beside its config.

    Attributes:
      step: of the training. weights: `ema` or `params`.
    """

    step: int = 0
    weights: str = "ema"


UNTRAINED = Description()


def is_saved(values: Mapping[str, Any]) -> bool:
    """Whether config.json's values are of such a folder."""
    return values.get("model_type") == MODEL_TYPE


def save(
    settings: Settings,
    params: PyTree,
    target: str | os.PathLike,
    description: Description,
    *,
    dtype: str = "float32",
    card: str | os.PathLike | None = None,
    license: str | None = None,
    name: str = "",
) -> None:
    """Writes the model; `target` is complete or isn't there. A card and a licence that lie in it
    already stay.

    Args:
      params: LoRA's merged.
      dtype: of the stored parameters, a name in `DTYPES`.
      card: a file that becomes README.md's text; None: it is made.
      license: its name in the card, as the hub has it (`mit`); None: none is named.
      name: of the model in the card; empty: the folder's own.

    Raises ValueError, one line, for a target that holds something, a type that can't hold a
    parameter, and a frozen network that can't be read.
    """
    check_choice("dtype", dtype, DTYPES)
    target = Path(target)
    tensors = {path: _stored(path, value, dtype) for path, value in _flat(params).items()}
    with _beside_a_card(target) as partial:
        save_tensors(tensors, partial / WEIGHTS_FILE)
        (partial / WEIGHTS_FILE).chmod(0o644)  # safetensors gives others no right to read it
        config = _portable(to_config(settings), _copy_held(settings, partial))
        values = {"model_type": MODEL_TYPE, "format": FORMAT, **vars(description)}
        write_json(partial / CONFIG_FILE, {**values, "config": config})
        count = sum(value.size for value in tensors.values())
        facts = {"step": description.step, "parameters": count, "dtype": dtype}
        text = read_card(card)
        text = make_card(settings, name or target.name, facts, license=license, text=text)
        if card is not None or not (partial / CARD_FILE).exists():
            (partial / CARD_FILE).write_text(text)


@contextlib.contextmanager
def _beside_a_card(target: Path) -> Iterator[Path]:
    """`complete_or_absent`, of a target that may hold what is `_FOR_PEOPLE`."""
    names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if not names or not set(names) <= set(_FOR_PEOPLE):
        with complete_or_absent(target, "folder") as partial:
            yield partial
        return
    aside = target.with_name(f"{target.name}.cards")
    shutil.rmtree(aside, ignore_errors=True)
    target.rename(aside)
    try:
        with complete_or_absent(target, "folder") as partial:
            shutil.copytree(aside, partial, dirs_exist_ok=True)
            yield partial
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def read_config(folder: Path, values: Mapping[str, Any]) -> tuple[dict[str, Any], Description]:
    """The run's config, with paths to what `folder` holds, of config.json's values; and the rest.

    Raises ValueError for a later format, and a path that leads out of the folder.
    """
    file = folder / CONFIG_FILE
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{file}: format={values.get('format')!r}: of another version; this one reads {FORMAT}"
        )
    config, step = values.get("config"), values.get("step")
    if not isinstance(config, dict) or type(step) is not int:
        raise ValueError(f"{file}: lacks config or step; not as Pipeline.save wrote it")
    for section in {section for section, _ in (*HELD, *_LEFT_OUT)}:
        check_section(section, config.get(section, {}))
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    for section, field in (*_LEFT_OUT, ("data", "index_folder")):  # whoever wrote it
        config.get(section, {}).pop(field, None)
    for section, field in HELD:
        name = config.get(section, {}).get(field)
        if not name:
            continue
        if not isinstance(name, str) or not _is_inside(name):
            raise ValueError(f"{file}: {section}.{field}={name!r}: must lie in the folder")
        config[section][field] = str(folder / name)
    return config, Description(step=step, weights=str(values.get("weights", "ema")))


def read_params(folder: Path, wanted: PyTree) -> PyTree:
    """The parameters, each of the shape, the type and in the place that `wanted` says.

    Raises ValueError, with file and names, for one that is missing, unknown or of another shape, or
    whose values are not finite.
    """
    tensors = FolderTensors(folder, WEIGHTS_FILE)
    shapes = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(wanted)}
    wrong = [
        name
        for name in sorted(shapes.keys() | tensors.keys())
        if name not in shapes
        or name not in tensors
        or tensors[name].shape != tuple(shapes[name].shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{tensors.source}: {', '.join(wrong[:5])}{more}: missing, unknown or of another shape"
        )

    def read(path: tuple, leaf: nnx.Param) -> nnx.Param:
        name, abstract = ".".join(map(str, path)), leaf.get_value()
        value = np.asarray(tensors[name]).astype(abstract.dtype)
        if not np.isfinite(value).all():
            raise ValueError(f"{tensors.source}: {name}: holds NaN or infinity")
        return leaf.replace(jax.device_put(value, abstract.sharding))

    flat = nnx.to_flat_state(wanted)
    return nnx.from_flat_state((path, read(path, leaf)) for path, leaf in flat)


def _flat(params: PyTree) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(jax.device_get(leaf.get_value()), order="C")
        for path, leaf in nnx.to_flat_state(params)
    }


def _stored(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = value.astype(DTYPES[dtype])
    if np.isfinite(value).all() and not np.isfinite(stored.astype(np.float32)).all():
        raise ValueError(
            f"dtype={dtype!r}: can't hold {name}, of up to {np.abs(value).max():.3g}; "
            "take 'bfloat16' or 'float32'"
        )
    return stored


def _copy_held(settings: Settings, target: Path) -> dict[tuple[str, str], str]:
    """Copies the tokenizer and the frozen networks; {field of the config: its name there}."""
    held = {}
    for (section, field), name in HELD.items():
        source = getattr(getattr(settings, section), field)
        if field == "tokenizer":
            held[section, field] = _copy_tokenizer(Path(source or BUNDLED), target, name)
        elif source:
            _copy_network(Path(source), target / name)
            held[section, field] = name
    return held


def _copy_network(source: Path, target: Path) -> None:
    """A model's folder; of a pipeline, by which several text encoders are named, those and their
    tokenizers, which say how long a text is.
    """
    target.mkdir()
    if not is_pipeline(source):
        return copy_folder(source, target)
    for name in (*encoder_names(read_index(source)), *pipeline_parts(source)):
        (target / name).mkdir()
        copy_folder(source / name, target / name)
    write_json(target / INDEX_FILE, read_json(source / INDEX_FILE, "a pipeline's index"))


def _copy_tokenizer(source: Path, target: Path, name: str) -> str:
    """A file, a tokenizer's folder, or the folders of several with the index that names them."""
    if not source.is_dir():
        shutil.copyfile(source, target / f"{name}.json")
        return f"{name}.json"
    parts = pipeline_parts(source)
    for part in parts:
        (target / name / part).mkdir(parents=True)
        copy_folder(source / part, target / name / part)
    if not parts:
        (target / name).mkdir()
        copy_folder(source, target / name)
    elif (source / INDEX_FILE).is_file():
        shutil.copyfile(source / INDEX_FILE, target / name / INDEX_FILE)
    return name


def _portable(config: dict[str, Any], held: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """The config without the paths of this machine; what was copied by its name in the folder."""
    for section, field in _LEFT_OUT:
        config[section][field] = ""
    for field in _DATA:
        if os.path.isabs(config["data"][field]):
            config["data"][field] = ""
    for (section, field), name in held.items():
        config[section][field] = name
    config["train"]["trainable"] = "full"  # its network is here, whatever was trained of it
    return config


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_card(card: str | os.PathLike | None) -> str | None:
    """The text of a card's file, None for none. ValueError for one that can't be read."""
    if card is None:
        return None
    try:
        return Path(card).read_text()
    except OSError as error:
        raise ValueError(f"card={card}: can't be read ({error.strerror})") from None
