"""A cell's trained model: from its run, which is begun or gone on with where it isn't finished."""

from __future__ import annotations

import pathlib

from jaxtyping import PyTree

from contextdiff_jax.experiments.plan import Cell
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.workdir import held
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.settings import parse
from contextdiff_jax.training.loop import train


def trained_params(cell: Cell, folder: pathlib.Path) -> PyTree:
    """The averaged weights of the cell's run in `folder`. RunError if its training was stopped."""
    settings = parse(cell.config)
    with held(folder):
        step = int(train(settings, cell.config, folder).step)
    if step < settings.train.steps:
        raise RunError(f"{cell.name}: stopped while training; the same command goes on from there")
    return load_run(str(folder)).params
