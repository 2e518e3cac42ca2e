"""Our folder of one model: Orbax parameters in `params/`, by dotted path; config.json, as it was in
the Hugging Face folder that it came from; and model.json, written last, with the kind and the
module's config.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.pretrained.kinds import Model, Options, abstract, shardings_of
from contextdiff_jax.runtime.files import write_json

CONFIG_FILE = "config.json"
MODEL_FILE = "model.json"
PARAMS_FOLDER = "params"


def is_native(folder: Path) -> bool:
    """Whether `folder` is one of ours."""
    return (folder / MODEL_FILE).is_file()


def description(folder: Path) -> dict[str, Any]:
    """model.json's values, `kind` and `config`. ValueError for what isn't ours."""
    values = read_json(folder / MODEL_FILE, "a folder that contextdiff_jax.convert wrote")
    lacking = sorted({"kind", "config"} - values.keys())
    if lacking:
        raise ValueError(f"{folder / MODEL_FILE}: lacks {', '.join(lacking)}")
    for name, kind in (("kind", str), ("config", dict)):
        if not isinstance(values[name], kind):
            raise ValueError(
                f"{folder / MODEL_FILE}: {name}={values[name]!r}: not as convert wrote it"
            )
    return values


def save(model: Model, module: nnx.Module, folder: Path, source: Mapping[str, Any]) -> None:
    """Writes `module`; the folder is one of ours only when all of it is written."""
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / PARAMS_FOLDER).absolute(), _flat(nnx.state(module, nnx.Param)))
    config = dataclasses.asdict(module.config)
    write_json(folder / CONFIG_FILE, source, sort_keys=True)
    write_json(folder / MODEL_FILE, {"kind": model.kind, "config": config}, sort_keys=True)


def read_config(model: Model, folder: Path) -> Any:
    """The module's config. ValueError if the folder is of another model."""
    values = description(folder)
    if values["kind"] != model.kind:
        raise ValueError(
            f"{folder / MODEL_FILE}: kind={values['kind']!r}: another model; wanted {model.kind!r}"
        )
    config = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values["config"].items()
    }
    try:
        return model.restore_config(**config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / MODEL_FILE}: {error}") from None


def load(model: Model, folder: Path, options: Options) -> nnx.Module:
    """The module in `folder`, whose parameters go straight to their shards. ValueError for a folder
    that is damaged or was copied in part.
    """
    module = abstract(model, read_config(model, folder), options)
    path = (folder / PARAMS_FOLDER).absolute()
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; expected the parameters as Orbax wrote them")
    with ocp.StandardCheckpointer() as checkpointer:
        with _named(path):
            stored = _stored(checkpointer, path)
        wanted = _wanted(module, stored, options, path)
        with _named(path):
            arrays = checkpointer.restore(path, wanted)
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    nnx.update(
        module, nnx.from_flat_state((p, param.replace(arrays[_name(p)])) for p, param in params)
    )
    return module


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says which folder Orbax couldn't read; its errors are of many kinds, TensorStore's are
    `Exception` itself.
    """
    try:
        yield
    except Exception as error:
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path}: can't be read; copied in part? ({why})") from None


def _name(path: tuple) -> str:
    return ".".join(map(str, path))


def _flat(state: nnx.State) -> dict[str, Any]:
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _stored(checkpointer: ocp.StandardCheckpointer, path: Path) -> dict[str, Any]:
    metadata = checkpointer.metadata(path)
    metadata = getattr(metadata, "item_metadata", metadata)
    return dict(getattr(metadata, "tree", metadata))


def _wanted(
    module: nnx.Module, stored: Mapping[str, Any], options: Options, path: Path
) -> dict[str, Any]:
    """Targets for Orbax: the module's shapes, the stored or asked types, the asked shardings."""
    shapes = _flat(nnx.state(module, nnx.Param))
    differing = [
        name
        for name in sorted(shapes.keys() | stored.keys())
        if name not in shapes
        or name not in stored
        or tuple(shapes[name].shape) != tuple(stored[name].shape)
    ]
    if differing:
        raise ValueError(
            f"{path}: {len(differing)} parameters do not fit the config: {', '.join(differing)}"
        )
    tree = shardings_of(module, options)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = dict.fromkeys(shapes, here) if tree is None else _flat(tree)
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape, options.held(stored[name].dtype), sharding=places[name]
        )
        for name, leaf in shapes.items()
    }
