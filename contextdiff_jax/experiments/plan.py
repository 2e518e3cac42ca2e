"""A plan: which variants, how many seeds, what is asked of each. Its cells are files that say what
they are of.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from contextdiff_jax.pretrained.files import read_json

# Added to data.scene_seed, to which `metrics.splits` adds 1: neither trained on, evaluated on, nor
# a classifier's.
VALIDATION_SCENES = 2
# Fields that say how the same step is computed.
_SAME_RESULTS = ("train.remat", "train.attention")
# Fields younger than finished cells, at the value that does what was done without them.
_AS_BEFORE = {"sample.reuse": 1, "head_width": 0, "time_dependent": False}


def changed(
    config: Mapping[str, Any], changes: Mapping[str, Any], where: str = "config"
) -> dict[str, Any]:
    """A copy with the dotted fields of `changes` set. ValueError, beginning with `where`, for a
    field that isn't there.
    """
    config = copy.deepcopy(dict(config))
    for path, value in changes.items():
        *sections, field = path.split(".")
        section = config
        for name in sections:
            section = section.get(name, {})
        if field not in section:
            raise ValueError(f"{where}: {path} is no field of the config")
        section[field] = value
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment: one config, variants that differ from it, seeds.

    Attributes:
        title: one line for the head of the results' page.
        about: what is asked, in a paragraph.
        kind: the name of a function in `cells.CELLS`: what a cell does.
        config: the base config, as plain values.
        variants: {name: {dotted field: value}}, in the order of the table.
        seeds: seeds 0..n-1 of every variant; `more_seeds` has the n of those that differ.
        baselines: the variants that the others are compared with, seed by seed; a table each.
        options: what the cell's function is told beside the config.
        headline: the scores of the table, {column: path in the cell's scores}, the first one being
            decisive.
    """

    title: str
    about: str
    kind: str
    config: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    headline: Mapping[str, str]
    seeds: int = 3
    more_seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    baselines: tuple[str, ...] = ("none",)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in ("baselines", "more_seeds"):
            for name in getattr(self, field):
                if name not in self.variants:
                    raise ValueError(
                        f"{field}: {name!r} is no variant; they are {', '.join(self.variants)}"
                    )
        for name in self.variants:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"variants: {name!r} names files; letters, digits, and _ . + - only"
                )

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, so that an interrupted plan has whole comparisons."""
        counts = {name: self.more_seeds.get(name, self.seeds) for name in self.variants}
        for seed in range(max(counts.values())):
            for name, count in counts.items():
                if seed < count:
                    yield self.cell(name, seed)

    def cell(self, variant: str, seed: int) -> Cell:
        """ValueError for an unknown variant or field."""
        if variant not in self.variants:
            raise ValueError(f"--variants={variant}: unknown; one of {', '.join(self.variants)}")
        config = changed(
            self.config, {**self.variants[variant], "seed": seed}, f"variants: {variant}"
        )
        if isinstance(config.get("data"), dict):
            config["data"]["seed"] = seed  # the order of the records
        return Cell(variant, seed, config, dict(self.options))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One variant with one seed."""

    variant: str
    seed: int
    config: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.variant}-{self.seed}"

    @property
    def folder(self) -> str:
        """Of its run, within the plan's."""
        return f"{self.name}-{self.config_hash}"

    @property
    def config_hash(self) -> str:
        """Of the config and the options, but for `_SAME_RESULTS` and `_AS_BEFORE`: results of
        another hash are of another experiment.
        """

        def counts(field: str, value: Any) -> bool:
            return field not in _SAME_RESULTS and (field, value) not in _AS_BEFORE.items()

        config = {
            section: {n: v for n, v in values.items() if counts(f"{section}.{n}", v)}
            if isinstance(values, dict)
            else values
            for section, values in self.config.items()
            if isinstance(values, dict) or counts(section, values)
        }
        text = json.dumps([config, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def result(self, folder: pathlib.Path) -> dict[str, Any] | None:
        """The finished cell's file in `folder`; None if there is none, or it is of another config."""
        path = folder / f"{self.name}.json"
        if not path.exists():
            return None
        result = read_json(path, "a cell's results")
        return result if result.get("config_hash") == self.config_hash else None


def load_plan(path: str) -> Plan:
    """`get_plan()` of a Python file. ValueError if there is none."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"--plan={path}: no such file; as in --plan=configs/experiments/shapes.py")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_plan"):
        raise ValueError(f"--plan={path}: has no function get_plan()")
    return module.get_plan()
