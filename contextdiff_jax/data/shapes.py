"""Procedural captioned scenes: the embedded data set and the compositional benchmark.

A scene holds one to three objects, each with a shape, a colour, a size and a place; two objects
also stand in a relation. Everything lies on the pixel grid and is drawn without anti-aliasing, with
free pixels around every object, so that `contextdiff_jax.evaluation.composition` can read a scene
back from its pixels exactly.

Captions:
    one object      a large red circle | a small blue square at the top left
    two objects     a small blue square left of a large green triangle
    three objects   a small red circle, a large blue cross and a small green square

Held-out combinations: a fixed share of the (shape, colour, size) triples never occurs in split
`train`, though every value of every attribute does. Every scene of split `heldout` contains at
least one of them, so a model that is right there composes attributes that it has never seen
together.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import re
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from contextdiff_jax.runtime.fields import check_choice

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (229, 57, 53),
    "green": (56, 160, 72),
    "blue": (38, 98, 232),
    "yellow": (253, 216, 53),
    "purple": (158, 52, 190),
    "cyan": (52, 210, 222),
}
SIZES = {"small": 0.27, "large": 0.40}  # width as a share of the picture's, see `diameter`
BACKGROUNDS = {"dark": (33, 37, 43), "light": (222, 224, 228)}
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
SPLITS = ("all", "train", "heldout")
MIN_IMAGE_SIZE = 16  # below it, small circles and small crosses have the same pixels

Triple = tuple[str, str, str]
_TRIPLES = tuple(itertools.product(SHAPES, COLOURS, SIZES))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Object:
    """One object, drawn, found, or asked for. In a requirement, None means that anything will do.

    `centre` is (x, y) in [0, 1], from the left and from the top.
    """

    shape: str
    colour: str
    size: str | None = None
    centre: tuple[float, float] | None = None

    @property
    def triple(self) -> tuple[str, str, str | None]:
        """(shape, colour, size)."""
        return self.shape, self.colour, self.size

    @property
    def position(self) -> str | None:
        """The ninth of the picture that holds the centre, such as `top left`."""
        return None if self.centre is None else position_of(self.centre)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's content, or (from `parse_caption`) what a caption asks for.

    `relation` is that of the first object to the second. `position` is set where the caption states
    it.
    """

    objects: tuple[Object, ...]
    relation: str | None = None
    position: str | None = None
    background: str = "dark"

    def as_dict(self) -> dict[str, Any]:
        """The scene as JSON-able values."""
        objects = [
            {**dataclasses.asdict(o), "centre": o.centre and list(o.centre), "position": o.position}
            for o in self.objects
        ]
        return {
            "objects": objects,
            "relation": self.relation,
            "position": self.position,
            "background": self.background,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """A distribution of scenes.

    Attributes:
        num_objects: fewest and most objects in a scene, within 1..3; drawn uniformly.
        image_size: pixels a side, at least 16.
        length: number of scenes in an epoch.
        split: `train`, `heldout` or `all`.
        seed: another seed gives other scenes (the held-out combinations stay).
        heldout_fraction: share of the (shape, colour, size) triples that `train` never shows, in
            [0, 0.5].
        backgrounds: names in `BACKGROUNDS`, drawn uniformly.
        position_fraction: share of the captions of one object that also state its place.
        reading_order: share of the captions of two objects that are turned, if need be, so as to
            begin with the left or the upper one, as people do; the others begin with either.
    """

    num_objects: tuple[int, int] = (1, 3)
    image_size: int = 32
    length: int = 100_000
    split: str = "train"
    seed: int = 0
    heldout_fraction: float = 0.125
    backgrounds: tuple[str, ...] = ("dark",)
    position_fraction: float = 0.5
    reading_order: float = 0.0

    def __post_init__(self):
        low, high = self.num_objects
        if not 1 <= low <= high <= 3:
            raise ValueError(f"num_objects={self.num_objects}: (fewest, most) must lie within 1..3")
        if self.image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"image_size={self.image_size}: must be at least {MIN_IMAGE_SIZE}")
        if self.length < 1:
            raise ValueError(f"length={self.length}: must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        check_choice("split", self.split, SPLITS)
        if not 0 <= self.heldout_fraction <= 0.5:
            raise ValueError(f"heldout_fraction={self.heldout_fraction}: must lie in [0, 0.5]")
        if self.split == "heldout" and not heldout_triples(self.heldout_fraction):
            raise ValueError(
                f"heldout_fraction={self.heldout_fraction}: holds out nothing for split='heldout'"
            )
        for name in ("position_fraction", "reading_order"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, 1]")
        unknown = set(self.backgrounds) - set(BACKGROUNDS)
        if unknown or not self.backgrounds:
            raise ValueError(
                f"backgrounds={self.backgrounds}: must be some of {', '.join(BACKGROUNDS)}"
            )


@functools.lru_cache
def heldout_triples(fraction: float) -> tuple[Triple, ...]:
    """The (shape, colour, size) triples that split `train` never shows; decided by `fraction`
    alone.

    They are spread evenly, so that every value, and every pair of values, still occurs in `train`.
    """
    order = [_TRIPLES[i] for i in np.random.default_rng(2402_16627).permutation(len(_TRIPLES))]
    chosen: list[Triple] = []

    def crowding(triple: Triple) -> tuple[int, int]:
        shared = [sum(a == b for a, b in zip(triple, other, strict=True)) for other in chosen]
        return sum(n == 2 for n in shared), sum(shared)

    for _ in range(round(fraction * len(order))):
        best = min(order, key=crowding)
        order.remove(best)
        chosen.append(best)
    return tuple(chosen)


@functools.lru_cache
def _allowed_triples(fraction: float) -> dict[str, tuple[Triple, ...]]:
    heldout = heldout_triples(fraction)
    train = tuple(t for t in _TRIPLES if t not in heldout)
    return {"train": train, "heldout": heldout, "all": _TRIPLES}


def position_of(centre: tuple[float, float]) -> str:
    """Name of the ninth of the picture that holds `centre` (x, y in [0, 1])."""
    column, row = (min(int(3 * v), 2) for v in centre)
    return POSITIONS[row][column]


def relation_of(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Relation of `first` to `second` (centres): along the axis on which they differ most."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def diameter(size: str, image_size: int) -> int:
    """Width and height in pixels of an object of this size; odd, so that it has a central pixel."""
    return 2 * int(SIZES[size] * image_size / 2) + 1


@functools.lru_cache
def template(shape: str, width: int) -> Bool[np.ndarray, "d d"]:
    """The pixels of a shape of an odd `width`; read-only, cached."""
    check_choice("shape", shape, SHAPES)
    radius = width // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    if shape == "circle":
        mask = x**2 + y**2 <= (width / 2) ** 2
    elif shape == "square":
        mask = np.ones((width, width), bool)
    elif shape == "triangle":
        mask = np.abs(x) <= (y + radius) // 2
    else:  # a cross
        half_arm = round((width / 3 - 1) / 2)  # the odd arm width nearest to a third
        mask = (np.abs(x) <= half_arm) | (np.abs(y) <= half_arm)
    mask.setflags(write=False)
    return mask


def corner(obj: Object, image_size: int) -> tuple[int, int]:
    """(left, top) pixel of an object's box."""
    width = diameter(obj.size, image_size)
    left, top = (int(np.floor(v * image_size - width / 2 + 0.5)) for v in obj.centre)
    return left, top


def _draw_triples(rng: np.random.Generator, count: int, config: ShapesConfig) -> list[Triple]:
    """Distinct triples: with two equal objects a relation would say nothing."""
    allowed = _allowed_triples(config.heldout_fraction)
    pool = allowed["train" if config.split == "train" else "all"]
    triples: list[Triple] = []
    if config.split == "heldout":
        triples.append(allowed["heldout"][rng.integers(len(allowed["heldout"]))])
    while len(triples) < count:
        triple = pool[rng.integers(len(pool))]
        if triple not in triples:
            triples.append(triple)
    # The held-out object must not always be the one that is named first.
    if config.split == "heldout":
        slot = rng.integers(count)
        triples[0], triples[slot] = triples[slot], triples[0]
    return triples


def _place(
    rng: np.random.Generator, widths: list[int], image_size: int
) -> list[tuple[int, int]] | None:
    """(left, top) of each box, uniform over the places still free; None if one finds no place."""
    margin, gap = image_size // 32, max(1, image_size // 16)
    boxes: list[tuple[int, int]] = []
    for width in widths:
        places = image_size - 2 * margin - width + 1
        free = np.ones((places, places), bool)
        for (left, top), other in zip(boxes, widths, strict=False):
            reach = width + gap - 1
            rows = slice(max(top - margin - reach, 0), max(top - margin + other + gap, 0))
            columns = slice(max(left - margin - reach, 0), max(left - margin + other + gap, 0))
            free[rows, columns] = False
        choices = np.flatnonzero(free)
        if not choices.size:
            return None
        row, column = divmod(int(choices[rng.integers(choices.size)]), places)
        boxes.append((column + margin, row + margin))
    return boxes


def sample_scene(rng: np.random.Generator, config: ShapesConfig) -> Scene:
    """Draws a scene of `config.split`; objects keep apart by at least image_size / 16 pixels."""
    size = config.image_size
    low, high = config.num_objects
    triples = _draw_triples(rng, int(rng.integers(low, high + 1)), config)
    background = config.backgrounds[rng.integers(len(config.backgrounds))]
    widths = [diameter(triple[2], size) for triple in triples]
    # A bad first place can leave no room for the rest; the corners always do, so this ends.
    while True:
        boxes = _place(rng, widths, size)
        if boxes is None:
            continue
        centres = [
            ((x + w / 2) / size, (y + w / 2) / size)
            for (x, y), w in zip(boxes, widths, strict=True)
        ]
        if len(centres) != 2:
            break
        dx, dy = (abs(a - b) for a, b in zip(*centres, strict=True))
        if abs(dx - dy) >= 1.5 / 16:  # on the diagonal, the relation's name would be arbitrary
            break
    objects = tuple(
        Object(shape=shape, colour=colour, size=size_name, centre=centre)
        for (shape, colour, size_name), centre in zip(triples, centres, strict=True)
    )
    relation = relation_of(*centres) if len(objects) == 2 else None
    if relation in ("right of", "below") and rng.random() < config.reading_order:
        objects, relation = objects[::-1], relation_of(*centres[::-1])
    stated = len(objects) == 1 and rng.random() < config.position_fraction
    position = objects[0].position if stated else None
    return Scene(objects=objects, relation=relation, position=position, background=background)


def render(scene: Scene, image_size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a scene, later objects over earlier ones.

    Raises:
        ValueError: for an object that has no size or centre, or that does not lie within the
            picture.
    """
    image = np.empty((image_size, image_size, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background]
    for obj in scene.objects:
        if obj.size is None or obj.centre is None:
            raise ValueError(f"{obj}: size and centre are needed to draw an object")
        mask = template(obj.shape, diameter(obj.size, image_size))
        left, top = corner(obj, image_size)
        if min(left, top) < 0 or max(left, top) + len(mask) > image_size:
            raise ValueError(f"{obj}: does not lie within a picture of {image_size} pixels a side")
        image[top : top + len(mask), left : left + len(mask)][mask] = COLOURS[obj.colour]
    return image


def caption(scene: Scene) -> str:
    """The scene in words (see the module's docstring); the inverse of `parse_caption`."""
    names = [" ".join(filter(None, ("a", o.size, o.colour, o.shape))) for o in scene.objects]
    if scene.relation is not None:
        return f"{names[0]} {scene.relation} {names[1]}"
    if scene.position is not None:
        return f"{names[0]} at the {scene.position}"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


_OBJECT = re.compile(rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
_RELATION = re.compile(rf"(.+) ({'|'.join(RELATIONS)}) (.+)")
_POSITION = re.compile(rf"(.+) at the ({'|'.join(sum(POSITIONS, ()))})")


def _parse_object(text: str, whole: str) -> Object:
    match = _OBJECT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"caption={whole!r}: {text!r} is not 'a [size] colour shape' with sizes "
            f"{', '.join(SIZES)}; colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}"
        )
    size, colour, shape = match.groups()
    return Object(shape=shape, colour=colour, size=size)


def parse_caption(text: str) -> Scene:
    """The scene that a caption asks for, without centres, and without sizes where none is named.

    Case and outer white space do not count.

    Raises:
        ValueError: if the text is not of a form that `caption` writes (the size may be left out).
    """
    words = " ".join(text.lower().split())
    if match := _RELATION.fullmatch(words):
        objects = tuple(_parse_object(match[i], text) for i in (1, 3))
        return Scene(objects=objects, relation=match[2])
    if match := _POSITION.fullmatch(words):
        return Scene(objects=(_parse_object(match[1], text),), position=match[2])
    parts = re.split(r", | and ", words)
    if len(parts) > 3:
        raise ValueError(f"caption={text!r}: names {len(parts)} objects; at most 3 are allowed")
    return Scene(objects=tuple(_parse_object(part, text) for part in parts))


class ShapesSource:
    """Random access to `config.length` scenes; scene i is a pure function of (seed, split, i).

    Records: `image` uint8 [H, W, 3], `caption` str, `attributes` (`Scene.as_dict`).
    """

    def __init__(self, config: ShapesConfig):
        self.config = config

    def __len__(self) -> int:
        return self.config.length

    def scene(self, index: int) -> Scene:
        """Scene number `index`, in 0..len - 1; IndexError outside."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: must lie in 0..{len(self) - 1}")
        entropy = (self.config.seed, SPLITS.index(self.config.split), index)
        return sample_scene(np.random.default_rng(entropy), self.config)

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        return {
            "image": render(scene, self.config.image_size),
            "caption": caption(scene),
            "attributes": scene.as_dict(),
        }
