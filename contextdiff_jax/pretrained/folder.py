"""Hugging Face folders of one model (config.json, safetensors) <-> an NNX module; our own are read
as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from contextdiff_jax.pretrained import native
from contextdiff_jax.pretrained.folder_files import FolderTensors, read_json, save_tensors
from contextdiff_jax.pretrained.kinds import (
    Model,
    Options,
    abstract,
    identity_problem,
    shardings_of,
)
from contextdiff_jax.pretrained.names import state_from_torch, state_to_torch
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.hub import find

CONFIG_FILE = "config.json"


def load(model: Model, folder: str | Path, options: Options = Options()) -> nnx.Module:
    """The module in `folder`, Hugging Face's or ours, or of a name of the hub's.

    Raises ValueError, one line with file and field or tensor: a file is missing, damaged or
    refused, the config is of another model or not supported, tensors don't fit it or are not
    finite.
    """
    folder = Path(find(folder))
    if native.is_native(folder):
        return native.load(model, folder, options)
    values = _identified(model, folder)
    if options.described and not any(folder.glob("*.safetensors")):
        return abstract(model, _config(model, folder, values, ()), options)
    tensors = FolderTensors(folder, model.weights_file)
    config = _config(model, folder, values, tensors.keys())
    module = abstract(model, config, options)
    state = state_from_torch(
        tensors,
        module,
        model.rules(config),
        what=str(tensors.source),
        held=options.held,
        shardings=shardings_of(module, options),
        progress=options.progress,
    )
    nnx.update(module, state)
    return module


def read_config(model: Model, folder: str | Path) -> Any:
    """The config of the model in `folder`, of a kind that config.json tells all of (UNet, VAE);
    raises as `load`.
    """
    folder = Path(find(folder))
    if native.is_native(folder):
        return native.read_config(model, folder)
    return _config(model, folder, _identified(model, folder), ())


def _identified(model: Model, folder: Path) -> dict[str, Any]:
    """config.json's values. ValueError if they are of another model."""
    path = folder / CONFIG_FILE
    values = read_json(path, f"a {model.kind} folder of diffusers or transformers")
    problem = identity_problem(model, values)
    if problem:
        raise ValueError(f"{path}: {problem}")
    return values


def _config(model: Model, folder: Path, values: Mapping[str, Any], names: Collection[str]) -> Any:
    try:
        return model.make_config(values, names)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None


def save(
    model: Model, module: nnx.Module, folder: str | Path, config: Mapping[str, Any] | None = None
) -> None:
    """Writes `module` as a Hugging Face folder, in the parameters' own types.

    Args:
      config: config.json's values, if they are known better than from the module (a converted
          folder's).
    """
    folder = Path(folder)
    values = model.to_json(module) if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, values, sort_keys=True)
    save_tensors(state_to_torch(module, model.rules(module.config)), folder / model.weights_file)
