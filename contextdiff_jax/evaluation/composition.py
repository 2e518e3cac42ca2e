"""Does a picture of the `shapes` data set show what its caption says? Decided from the pixels
alone.

    1. Each pixel takes the nearest colour of the palette and the picture's background; a pixel far
      from all
       of these is foreground of unknown colour.
    2. Connected foreground pixels are a blob. A blob with one dominant colour is one object (the
      off-colour
       fringe of a generated picture belongs to it); other blobs are split by colour. Specks are
       ignored.
    3. An object's shape and size are those of the renderer's own template that overlaps it best
      (IoU),
       within a pixel or so of its place; below `min_iou` its shape is `unknown`.

Pictures from the renderer are read back exactly, also under noise (see the tests).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from contextdiff_jax.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    diameter,
    parse_caption,
    relation_of,
    template,
)

UNKNOWN = "unknown"
# Of a found object with its template, by the picture's side: the least from this side on. At 0.6 a
# tree passes as a triangle; at 16x16 a single wrong pixel of a small cross costs a tenth.
MIN_IOU = {0: 0.6, 32: 0.8}
MAX_COLOUR_DISTANCE = 90.0  # Euclidean, in 0..255; the palette's colours are more than 100 apart
DOMINANT_SHARE = 0.7  # of a blob's pixels: one object
CENTRE_TOLERANCE = 1 / 16  # of the picture's side, where a scene says where its objects are
_MAX_MATCHED = 6  # objects beyond the largest so many are only counted
_COLOUR_NAMES = (*COLOURS, UNKNOWN)
_NOTHING = -1  # the background, in maps of colour indices


def _nearest_colours(image: UInt8[np.ndarray, "H W 3"]) -> Int[np.ndarray, "H W"]:
    """Index of each pixel's colour in `_COLOUR_NAMES`; `_NOTHING` where it is the background's."""
    pixels = image.astype(np.float32)
    palette = np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.float32)
    distances = np.linalg.norm(
        pixels[:, :, None] - palette, axis=-1
    )  # [H, W, backgrounds + colours]
    # The background is the one that covers most; another counts as a colour that is not in the
    # palette.
    nearest = distances.argmin(-1)
    background = np.bincount(nearest.ravel(), minlength=len(palette))[: len(BACKGROUNDS)].argmax()
    distances = np.concatenate(
        [distances[:, :, len(BACKGROUNDS) :], distances[:, :, [background]]], axis=-1
    )
    nearest = distances.argmin(-1)
    labels = np.where(nearest == len(COLOURS), _NOTHING, nearest)
    return np.where(distances.min(-1) > MAX_COLOUR_DISTANCE, len(COLOURS), labels)


def _parts(
    labels: Int[np.ndarray, "H W"], min_area: float
) -> Iterator[tuple[int, Bool[np.ndarray, "H W"]]]:
    """(colour index, mask) of each object."""
    blobs, count = ndimage.label(labels != _NOTHING)
    for number, box in enumerate(ndimage.find_objects(blobs, count), start=1):
        mask = np.zeros(labels.shape, bool)
        mask[box] = blobs[box] == number
        area = mask.sum()
        if area < min_area:
            continue
        shares = np.bincount(labels[mask], minlength=len(_COLOUR_NAMES)) / area
        if shares.max() >= DOMINANT_SHARE:
            yield int(shares.argmax()), mask
            continue
        for colour in np.flatnonzero(shares):
            pieces, _ = ndimage.label(mask & (labels == colour))
            areas = np.bincount(pieces.ravel())[1:]
            for piece in np.flatnonzero(areas >= min_area) + 1:
                yield int(colour), pieces == piece


def _overlap(
    mask: Bool[np.ndarray, "H W"], shape_mask: Bool[np.ndarray, "d d"], left: int, top: int
) -> float:
    """IoU of a mask with a template whose box starts at (left, top), which may reach out of the
    picture.
    """
    height, width = mask.shape
    size = len(shape_mask)
    inside = mask[max(top, 0) : top + size, max(left, 0) : left + size]
    shape_inside = shape_mask[max(-top, 0) : height - top, max(-left, 0) : width - left]
    intersection = np.count_nonzero(inside & shape_inside)
    return intersection / (np.count_nonzero(mask) + np.count_nonzero(shape_mask) - intersection)


def min_iou(image_size: int) -> float:
    """The least overlap with a template by which an object has its shape."""
    return MIN_IOU[max(side for side in MIN_IOU if side <= image_size)]


def _fit(mask: Bool[np.ndarray, "H W"]) -> Object:
    """The template that fits a mask best, as an object of unknown colour."""
    image_size = len(mask)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    middle_x, middle_y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    reach = max(1, image_size // 32)
    steps = range(-reach, reach + 1)
    best_iou, best = -1.0, None
    for size in SIZES:
        width = diameter(size, image_size)
        left, top = round(middle_x - width / 2), round(middle_y - width / 2)
        for shape, dx, dy in itertools.product(SHAPES, steps, steps):
            iou = _overlap(mask, template(shape, width), left + dx, top + dy)
            if iou > best_iou:
                centre = (left + dx + width / 2) / image_size, (top + dy + width / 2) / image_size
                best_iou, best = iou, Object(shape=shape, colour=UNKNOWN, size=size, centre=centre)
    if best_iou >= min_iou(image_size):
        return best
    centre = float(middle_x) / image_size, float(middle_y) / image_size
    return Object(shape=UNKNOWN, colour=UNKNOWN, size=UNKNOWN, centre=centre)


def find_objects(image: np.ndarray) -> list[Object]:
    """The objects in a square picture, uint8 [S, S, 3], the largest first.

    What has no known shape (or colour) has shape and size (or colour) `unknown`.

    Raises:
        ValueError: if the picture is not uint8 [S, S, 3].
    """
    image = np.asarray(image)
    if (
        image.ndim != 3
        or image.shape[0] != image.shape[1]
        or image.shape[2] != 3
        or image.dtype != np.uint8
    ):
        raise ValueError(f"image={image.dtype}{list(image.shape)}: must be uint8 [S, S, 3]")
    smallest = min(
        np.count_nonzero(template(shape, diameter("small", len(image)))) for shape in SHAPES
    )
    found = []
    for colour, mask in _parts(_nearest_colours(image), min_area=smallest / 2):
        fit = _fit(mask)
        name = _COLOUR_NAMES[colour]
        found.append(
            (mask.sum(), Object(shape=fit.shape, colour=name, size=fit.size, centre=fit.centre))
        )
    return [obj for _, obj in sorted(found, key=lambda item: -item[0])]


def _place_matches(wanted: Scene, matched: Sequence[Object | None]) -> list[bool]:
    """Whether each statement about places holds: the relation, the position, every centre."""
    answers = []
    if wanted.relation is not None:
        known = None not in matched[:2]
        answers.append(
            known and relation_of(matched[0].centre, matched[1].centre) == wanted.relation
        )
    if wanted.position is not None:
        answers.append(matched[0] is not None and matched[0].position == wanted.position)
    for target, obj in zip(wanted.objects, matched, strict=True):
        if target.centre is not None:
            close = (
                obj is not None
                and np.abs(np.subtract(target.centre, obj.centre)).max() <= CENTRE_TOLERANCE
            )
            answers.append(bool(close))
    return answers


def _compare(wanted: Scene, matched: Sequence[Object | None]) -> dict[str, float]:
    """Share of what is asked for that holds, by attribute; nan where nothing is asked for."""

    def share(answers: list[bool]) -> float:
        return sum(answers) / len(answers) if answers else float("nan")

    pairs = list(zip(wanted.objects, matched, strict=True))
    shares = {
        name: share(
            [
                obj is not None and getattr(obj, name) == getattr(target, name)
                for target, obj in pairs
            ]
        )
        for name in ("shape", "colour")
    }
    sized = [(target, obj) for target, obj in pairs if target.size is not None]
    shares["size"] = share([obj is not None and obj.size == target.size for target, obj in sized])
    shares["relation"] = share(_place_matches(wanted, matched))
    return shares


def _quality(shares: dict[str, float]) -> tuple[float, float]:
    """A matching's rank: by what the objects are; by where they are only between equals."""
    known = {name: 0.0 if np.isnan(value) else value for name, value in shares.items()}
    return known["shape"] + known["colour"] + known["size"], known["relation"]


def check(image: UInt8[np.ndarray, "S S 3"], wanted: str | Scene) -> dict[str, float | bool]:
    """Compares a picture with a caption, or with a scene (then the objects' centres count too).

    The objects found are matched with those asked for so that as many shapes, colours and sizes as
    possible are right, and of equally good matchings, places. So a swapped pair is a wrong
    relation, not two wrong objects.

    Returns:
        `exact`: all of the following hold, and nothing else is in the picture.
        `count`: the number of objects is right.
        `shape`, `colour`, `size`: share of the objects asked for that are there with the right one.
        `relation`: share of the statements about places (relation, position, centres) that hold.
        A share is nan if nothing of its kind is asked for.

    Raises:
        ValueError: for a caption that `parse_caption` refuses, or a picture that `find_objects`
            does.
    """
    wanted = parse_caption(wanted) if isinstance(wanted, str) else wanted
    found = find_objects(image)
    candidates: list[Object | None] = [*found[:_MAX_MATCHED], *[None] * len(wanted.objects)]
    # Distinct, in order.
    matchings = dict.fromkeys(itertools.permutations(candidates, len(wanted.objects)))
    results = [_compare(wanted, matched) for matched in matchings]
    best = max(results, key=_quality)
    count = len(found) == len(wanted.objects)
    exact = count and all(v == 1 for v in best.values() if v == v)
    return {"exact": exact, "count": count, **best}


def judge(
    images: Sequence[UInt8[np.ndarray, "S S 3"]] | UInt8[np.ndarray, "N S S 3"],
    captions: Sequence[str],
) -> dict[str, Float[np.ndarray, "N"]]:
    """`check` of every picture and its caption, an array a name; nan where the caption asks for
    nothing of the kind.

    Beside the names of `check`, each also by the number of objects asked for (`exact_2`), and
    `exact` by what is asked for (`exact circle`). Only what occurs.

    Raises:
        ValueError: if there are no pictures, or not as many as captions, or a caption is refused.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(
            f"images={len(images)}, captions={len(captions)}: must be equally many, and at least "
            "one"
        )
    values: dict[str, Float[np.ndarray, "N"]] = {}

    def note(name: str, index: int, value: float) -> None:
        if value == value:  # not nan
            values.setdefault(name, np.full(len(images), np.nan))[index] = value

    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        wanted = parse_caption(text)
        result = check(image, wanted)
        for name, value in result.items():
            note(name, i, float(value))
            note(f"{name}_{len(wanted.objects)}", i, float(value))
        words = {word for o in wanted.objects for word in (o.shape, o.colour, o.size) if word}
        for word in words | ({wanted.relation} if wanted.relation else set()):
            note(f"exact {word}", i, float(result["exact"]))
    return {name: values[name] for name in sorted(values)}


def composition(
    images: Sequence[UInt8[np.ndarray, "S S 3"]] | UInt8[np.ndarray, "N S S 3"],
    captions: Sequence[str],
) -> dict[str, float]:
    """Means of `check` over pictures and their captions.

    Returns:
        `exact`, `count`, `shape`, `colour`, `size`, `relation` (means over the pictures that ask
        for it), and `exact_1`, `exact_2`, `exact_3`: `exact` by the number of objects asked for.
        Only what occurs.

    Raises:
        ValueError: as `judge`.
    """
    return {
        name: float(np.nanmean(values))
        for name, values in judge(images, captions).items()
        if is_main(name)
    }


def is_main(name: str) -> bool:
    """Whether one of `judge`'s names is a headline: all but attributes by number of objects and
    `exact` by value.
    """
    return name.startswith("exact_") or not any(c in name for c in " _")
