"""Folders of a model, or of a whole pipeline (model_index.json), from Hugging Face's format to ours
and back.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from contextdiff_jax.models.backbones import BackboneConfig, kind_of
from contextdiff_jax.pretrained import clip, mmdit, native, t5, unet, vae
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.folder_files import (
    INDEX_FILE,
    PICKLES,
    exists,
    read_json,
    refuse_pointers,
    tokenizer_folder,
)
from contextdiff_jax.pretrained.kinds import Model, Options, identity_problem
from contextdiff_jax.pretrained.scheduler import CONFIG_FILE as SCHEDULER_FILE
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.files import write_json

MODELS = {
    model.kind: model
    for model in (unet.MODEL, mmdit.MODEL, vae.MODEL, clip.TEXT, clip.VISION, t5.MODEL)
}

Report = Callable[[str], None]


def backbone_model(config: BackboneConfig) -> Model:
    """What is particular about the kind of backbone that this config is of. ValueError for one
    that no folder holds.
    """
    kind = kind_of(config)
    check_choice("model.kind", kind, MODELS, "folders")
    return MODELS[kind]


def to_native(
    source: Path, target: Path, options: Options = Options(), report: Report = print
) -> None:
    """A Hugging Face folder, or a single-file checkpoint, in our format; `target` is complete or
    isn't there.

    Raises ValueError for a folder that can't be read, a kind that we don't have, or a target that
    holds something.
    """
    if native.is_native(source):
        raise ValueError(f"--source={source}: is in our format already; --reverse writes it back")
    _convert(source, target, lambda folder: _read_foreign(folder, options), _write_native, report)


def from_native(
    source: Path, target: Path, options: Options = Options(), report: Report = print
) -> None:
    """The inverse of `to_native`: the same tensors, bit for bit, and the same configs."""
    _convert(source, target, lambda folder: _read_native(folder, options), _write_foreign, report)


def copy_folder(source: Path, target: Path, options: Options = Options()) -> None:
    """A copy without pickles; of a pipeline that is a single file, or of a model inside one, the
    folder in diffusers' format. `target` is new or empty.
    """
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*PICKLES), dirs_exist_ok=True)
        return
    read = functools.partial(_read_foreign, options=options)
    _convert(source, target, read, _write_foreign, lambda line: None)


def _convert(source: Path, target: Path, read: Callable, write: Callable, report: Report) -> None:
    if not exists(source):
        raise ValueError(f"--source={source}: no such folder")
    with complete_or_absent(target) as partial:
        if not exists(source / INDEX_FILE):
            report(_one(source, partial, read, write) or _refuse(source))
            return
        for name in _components(source):
            line = _one(source / name, partial / name, read, write)
            if line is None:
                _copy(source / name, partial / name)
            report(f"{name}: {line or 'copied'}")
        write_json(partial / INDEX_FILE, read_json(source / INDEX_FILE, "a pipeline's index"))


def _copy(source: Path, target: Path) -> None:
    """Copies what is no model of ours: a tokenizer, a scheduler."""
    if exists(source) and not source.is_dir():  # the scheduler of a single file
        target.mkdir()
        values = read_json(source / SCHEDULER_FILE, "a pipeline's scheduler folder")
        write_json(target / SCHEDULER_FILE, values)
        return
    folder = tokenizer_folder(source)
    refuse_pointers(folder)
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*PICKLES))


def _one(source: Path, target: Path, read: Callable, write: Callable) -> str | None:
    """Converts one model and says what it was; None for a folder that holds none of ours."""
    start = time.time()
    found = read(source)
    if found is None:
        return None
    model, module, config = found
    write(model, module, target, config)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
    return (
        f"{model.kind}, {len(sizes)} tensors, {sum(sizes) / 1e6:.1f} M parameters, "
        f"{time.time() - start:.1f} s"
    )


def _read_foreign(
    folder: Path, options: Options
) -> tuple[Model, nnx.Module, Mapping[str, Any]] | None:
    if not exists(folder / folders.CONFIG_FILE):
        return None
    values = read_json(folder / folders.CONFIG_FILE, "a model's config")
    fitting = [model for model in MODELS.values() if identity_problem(model, values) is None]
    if len(fitting) > 1:
        kinds = " and ".join(model.kind for model in fitting)
        raise ValueError(
            f"{folder / folders.CONFIG_FILE}: may be {kinds}; convert a folder of one of them"
        )
    if not fitting:
        return None
    module = folders.load(fitting[0], folder, options)
    own = fitting[0].to_json(module)
    # Of a whole T5 we keep the encoder: its config.json would promise more than there is.
    same = all(values.get(field) == own.get(field) for field in ("_class_name", "architectures"))
    return fitting[0], module, values if same else own


def _read_native(
    folder: Path, options: Options
) -> tuple[Model, nnx.Module, Mapping[str, Any]] | None:
    if not native.is_native(folder):
        return None
    values = native.description(folder)
    check_choice(f"{folder / native.MODEL_FILE}: kind", values["kind"], MODELS)
    model = MODELS[values["kind"]]
    config = read_json(folder / native.CONFIG_FILE, "the config.json of the Hugging Face folder")
    return model, native.load(model, folder, options), config


def _write_native(
    model: Model, module: nnx.Module, folder: Path, config: Mapping[str, Any]
) -> None:
    native.save(model, module, folder, config)


def _write_foreign(
    model: Model, module: nnx.Module, folder: Path, config: Mapping[str, Any]
) -> None:
    folders.save(model, module, folder, config)


def _refuse(source: Path) -> str:
    if source.is_file():
        read_json(source / INDEX_FILE, "a folder")  # says which files are read
    raise ValueError(
        f"--source={source}: holds no model of ours ({', '.join(MODELS)}) and no {INDEX_FILE}"
    )


def _components(source: Path) -> list[str]:
    """The pipeline's folders, as its index names them."""
    index = read_json(source / INDEX_FILE, "a pipeline's index")
    names = [
        name
        for name, value in index.items()
        if isinstance(value, list) and value and value[0] is not None
    ]
    for name in names:
        if not exists(source / name) and not tokenizer_folder(source / name).is_dir():
            raise ValueError(f"{source / name}: no such folder, though {INDEX_FILE} names it")
    return names


@contextlib.contextmanager
def complete_or_absent(target: Path, what: str = "--target") -> Iterator[Path]:
    """A folder beside `target` to write to, which takes its name when all is written; `what`: the
    name of `target` in an error.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{what}={target}: exists already; name a new folder")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.replace(target)
