"""A plan: which variants, how many seeds, what is asked of each.

A finished cell is a line of the plan's file, with all settings that it was made with. It counts as
done for a plan whose settings are the same. A field that the line or the plan doesn't name has its
default, so a config may get new fields without making finished experiments those of another one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from contextdiff_jax import configs
from contextdiff_jax.experiments.finished import read_finished
from contextdiff_jax.experiments.toy_config import ToyConfig
from contextdiff_jax.runtime.fields import check_choice, defaults
from contextdiff_jax.settings import default_config

# The defaults of what a plan's config is of, by the plan's kind.
CONFIGS = {
    "pictures": default_config,
    "estimates": default_config,
    "toy": functools.partial(defaults, ToyConfig),
}
# What `data.Source.others` is told, to which `subject.splits` adds 1: scenes neither trained on,
# evaluated on, nor a classifier's.
VALIDATION_SCENES = 2
# Defaults that have changed since the first cells were made. A cell's name and a line that lacks
# the field still mean these.
FIRST_DEFAULTS = {"context.max_gain": 1.0, "data.num_objects": [1, 3]}
# Fields that say how the same step is computed.
_SAME_RESULTS = ("train.remat", "train.attention", "train.unroll", "train.tpu_scoped_memory")


def changed(
    config: Mapping[str, Any], changes: Mapping[str, Any], where: str = "config"
) -> dict[str, Any]:
    """Return a copy with the dotted fields of `changes` set.

    ValueError, beginning with `where`, for a field that isn't there.
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
        verdict: what came out, in three lines that need nothing else; written when it is known.
        kind: one of `CONFIGS`: which settings `config` has, and which function in `cells.CELLS`
            runs a cell.
        config: the base config, as plain values.
        variants: {name: {dotted field: value}}, in the order of the table.
        seeds: seeds 0..n-1 of every variant; `more_seeds` has the n of those that differ.
        baselines: the variants that the others are compared with, seed by seed; a table each.
        options: what the cell's function is told beside the config.
        headline: the scores of the table, {column: path in the cell's scores}, the first one being
            decisive.
        curves: scores by sampler and number of evaluations, {title: path with {} for the label of
            `options["samplers"]`, which is then "NAME, NUMBER"}: a plot and a table each.
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
    curves: Mapping[str, str] = dataclasses.field(default_factory=dict)
    verdict: str = ""

    def __post_init__(self):
        check_choice("kind", self.kind, CONFIGS)
        for field in ("baselines", "more_seeds"):
            for name in getattr(self, field):
                check_choice(field, name, self.variants)
        for name in self.variants:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(
                    f"variants: {name!r} names files; letters, digits, and _ . + - only"
                )

    def cells(self) -> Iterator[Cell]:
        """Yield the plan's cells seed by seed: an interrupted plan has whole comparisons."""
        counts = {name: self.more_seeds.get(name, self.seeds) for name in self.variants}
        for seed in range(max(counts.values())):
            for name, count in counts.items():
                if seed < count:
                    yield self.cell(name, seed)

    def cell(self, variant: str, seed: int) -> Cell:
        """Return one cell. ValueError for an unknown variant or field."""
        check_choice("--variants", variant, self.variants)
        config = changed(
            self.config, {**self.variants[variant], "seed": seed}, f"variants: {variant}"
        )
        if isinstance(config.get("data"), dict):
            config["data"]["seed"] = seed  # the order of the records
        return Cell(self.kind, variant, seed, config, dict(self.options))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One variant with one seed. `kind`: the plan's."""

    kind: str
    variant: str
    seed: int
    config: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Variant and seed."""
        return f"{self.variant}-{self.seed}"

    @property
    def folder(self) -> str:
        """Name of the run's folder within the plan's: a changed config or option has another."""
        text = json.dumps(self._settings(self.config, self.options), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def made(self, line: Mapping[str, Any]) -> bool:
        """Whether a finished cell's line is of this variant, seed, config and options."""
        return (line["variant"], line["seed"]) == (self.variant, self.seed) and self._settings(
            line["config"], line["options"]
        ) == self._settings(self.config, self.options)

    def result(self, path: pathlib.Path) -> dict[str, Any] | None:
        """The finished cell in the plan's file; None if it isn't there, or is of other settings."""
        return next(filter(self.made, read_finished(path)), None)

    def _settings(self, config: Mapping[str, Any], options: Mapping[str, Any]) -> list[Any]:
        """The fields that differ from their defaults, but for `_SAME_RESULTS`, and the options."""
        config, options = json.loads(json.dumps([config, options]))  # tuples are lists in a line
        known, nothing = _defaults(self.kind), object()
        fields = {
            field: value
            for field, value in flatten_dict(config, sep=".").items()
            if field not in _SAME_RESULTS and value != known.get(field, nothing)
        }
        return [fields, options]


@functools.cache
def _defaults(kind: str) -> dict[str, Any]:
    """{dotted field: default} of a kind's configs, as JSON holds them."""
    found = flatten_dict(json.loads(json.dumps(CONFIGS[kind]())), sep=".")
    if kind == "toy":
        return found
    del found["model.pretrained"]  # is in the names of the first cells, whatever it is
    return found | FIRST_DEFAULTS


def load_plan(path: str) -> Plan:
    """Call `get_plan()` of a Python file, or of a plan of configs/experiments by its name.

    ValueError if there is none.
    """
    try:
        file = configs.find(path, "experiments")
    except ValueError as error:
        raise ValueError(f"--plan={error}") from None
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_plan"):
        raise ValueError(f"--plan={path}: has no function get_plan()")
    return module.get_plan()
