"""A trained run read back from its folder, for the commands that use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jaxtyping import PyTree

from contextdiff_jax.data import AnyTokenizer
from contextdiff_jax.models.lora import merge_lora
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.parallel.mesh import make_mesh, state_shardings
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runs import checkpoints, saved, snapshots
from contextdiff_jax.runs.model import init_params
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.hub import find
from contextdiff_jax.settings import Settings, parse

# A run trained on many devices is read on those that are here.
_MESH = {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1}


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings, tokenizer and parameters of a run's newest checkpoint (snapshot of averages), or of
    a saved model.
    """

    settings: Settings
    tokenizer: AnyTokenizer
    params: PyTree
    step: int
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # config.json


def load_run(
    workdir: str,
    weights: str = "ema",
    merged: bool = True,
    ema_length: float | None = None,
    flag: str = "workdir",
) -> Run:
    """Reads DIR/config.json and the newest checkpoint; `weights`: `ema` or `params`; `merged`: LoRA
    into the UNet; `ema_length`: instead of `ema` the average of that length, which the snapshots of
    `train.power_ema` make. Of a model that `Pipeline.save` wrote, its parameters.

    `workdir`: a folder, or a name (`runtime.hub.find`); `flag`: the one that it was given by.
    Raises ValueError for a folder without a run or without a finished checkpoint, and a length that
    its snapshots don't make.
    """
    check_choice("--weights", weights, ("ema", "params"))
    if ema_length is not None and weights != "ema":
        raise ValueError(f"--ema_length={ema_length}: can't be given with --weights={weights}")
    if not workdir:
        raise ValueError(f"--{flag}: missing; name the folder of a trained run")
    folder = epath.Path(find(workdir))
    if not (folder / "config.json").exists():
        raise ValueError(
            f"--{flag}={workdir}: holds no run (no config.json); train one with "
            "contextdiff_jax.train"
        )
    config = read_json(folder / "config.json", "a run's config")
    if saved.is_saved(config):
        return _load_saved(folder, config, weights, ema_length)
    settings = parse(config | {"mesh": _MESH})
    tokenizer = open_tokenizer(settings)
    abstract = jax.eval_shape(lambda: init_params(settings, Undrawn()))
    shardings = state_shardings(make_mesh(settings.mesh), abstract)
    wanted = checkpoints.placed(abstract, shardings)
    if ema_length is None:
        params, step = checkpoints.restore_weights(folder, wanted, weights)
    else:
        kept = settings.train.power_ema
        params, step = snapshots.load_average(folder, wanted, kept, ema_length)
    params = merge_lora(params) if merged else params
    return Run(settings, tokenizer, params, step, config)


def _load_saved(
    folder: epath.Path, values: Mapping[str, Any], weights: str, ema_length: float | None
) -> Run:
    """The model in a folder that `Pipeline.save` wrote, which holds one set of weights."""
    config, description = saved.read_config(folder, values)
    if ema_length is not None:
        raise ValueError(f"--ema_length={ema_length}: {folder} is no run, which alone has it")
    if weights != description.weights:
        raise ValueError(f"--weights={weights}: {folder} holds {description.weights} alone")
    settings = parse(config | {"mesh": _MESH})
    abstract = jax.eval_shape(lambda: init_params(settings, Undrawn()))
    shardings = state_shardings(make_mesh(settings.mesh), abstract)
    params = saved.read_params(folder, checkpoints.placed(abstract, shardings))
    return Run(settings, open_tokenizer(settings), params, description.step, config)
