"""The compositional checker: exact on what the renderer draws, not fooled by what it did not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from contextdiff_jax.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Object,
    Scene,
    ShapesConfig,
    ShapesSource,
    caption,
    diameter,
    render,
    template,
)
from contextdiff_jax.evaluation.composition import (
    MAX_COLOUR_DISTANCE,
    check,
    composition,
    find_objects,
    min_iou,
)

IMAGE_SIZES = (16, 32, 64)


def _scenes(image_size: int, count: int, num_objects=(1, 3)) -> list[Scene]:
    config = ShapesConfig(
        image_size=image_size,
        split="all",
        num_objects=num_objects,
        backgrounds=tuple(BACKGROUNDS),
        seed=7,
    )
    source = ShapesSource(config)
    return [source.scene(i) for i in range(count)]


def _change(scene: Scene, index: int, **fields) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **fields)
    return dataclasses.replace(scene, objects=tuple(objects))


def _other(value: str, values) -> str:
    names = list(values)
    return names[(names.index(value) + 1) % len(names)]


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_every_rendered_scene_is_read_back_exactly(image_size):
    for scene in _scenes(image_size, 500):
        image = render(scene, image_size)
        assert set(find_objects(image)) == set(scene.objects)
        assert check(image, scene)["exact"]
        result = check(image, caption(scene))
        assert result["exact"] and result["count"]
        assert all(result[name] == 1 for name in ("shape", "colour", "size"))


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_noise_of_ten_grey_levels_changes_no_answer(image_size):
    rng = np.random.default_rng(0)
    for scene in _scenes(image_size, 200):
        image = render(scene, image_size)
        noisy = np.clip(np.round(image + rng.normal(0, 10, image.shape)), 0, 255).astype(np.uint8)
        assert set(find_objects(noisy)) == set(scene.objects)


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_an_object_of_another_colour_shape_or_size_is_not_exact(image_size):
    for scene in _scenes(image_size, 60):
        text, last = caption(scene), len(scene.objects) - 1
        colour = _change(scene, last, colour=_other(scene.objects[last].colour, COLOURS))
        result = check(render(colour, image_size), text)
        assert not result["exact"] and result["colour"] == last / (last + 1)
        assert result["shape"] == result["size"] == 1 and result["count"]
        shape = _change(scene, last, shape=_other(scene.objects[last].shape, SHAPES))
        result = check(render(shape, image_size), text)
        assert not result["exact"] and result["shape"] < 1 and result["count"]
        # A grown object could touch others or leave the picture.
        if scene.objects[last].size == "large":
            shrunk = render(_change(scene, last, size="small"), image_size)
            assert not check(shrunk, text)["exact"] and check(shrunk, text)["size"] < 1


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_a_missing_or_additional_object_is_not_exact(image_size):
    for scene in _scenes(image_size, 60, num_objects=(2, 3)):
        fewer = dataclasses.replace(scene, objects=scene.objects[:-1])
        result = check(render(fewer, image_size), caption(scene))
        assert not result["exact"] and not result["count"] and result["shape"] < 1
        alone = dataclasses.replace(scene, objects=scene.objects[:1], relation=None)
        result = check(render(scene, image_size), caption(alone))
        assert not result["exact"] and not result["count"] and result["shape"] == 1


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_a_moved_object_is_not_exact(image_size):
    """Checked by caption where it names a place, and by scene always."""
    for scene in _scenes(image_size, 150):
        if len(scene.objects) == 2:
            turned = [
                dataclasses.replace(o, centre=tuple(1 - v for v in o.centre)) for o in scene.objects
            ]
            result = check(
                render(dataclasses.replace(scene, objects=tuple(turned)), image_size),
                caption(scene),
            )
            assert not result["exact"] and result["relation"] == 0
            assert result["count"] and result["shape"] == result["colour"] == result["size"] == 1
        elif len(scene.objects) == 1:
            moved = _change(scene, 0, centre=tuple(_far(v) for v in scene.objects[0].centre))
            image = render(moved, image_size)
            assert not check(image, scene)["exact"]
            assert check(image, caption(scene))["exact"] == (scene.position is None)


def _far(value: float) -> float:
    return 0.25 if value > 0.5 else 0.75


def test_specks_are_ignored():
    scene = _scenes(32, 1)[0]
    image = render(scene, 32)
    free = np.argwhere((image == BACKGROUNDS[scene.background]).all(-1))
    image[tuple(free[0])] = image[tuple(free[-1])] = COLOURS["red"]
    assert check(image, caption(scene))["exact"]


def test_a_fringe_of_mixed_colours_belongs_to_its_object():
    scene = Scene(objects=(Object(shape="square", colour="red", size="large", centre=(0.5, 0.5)),))
    image = render(scene, 32)
    top, left = np.argwhere((image == COLOURS["red"]).all(-1))[0]
    image[top : top + 2, left : left + 13] = COLOURS["purple"]  # 26 pixels: no speck by itself
    found = find_objects(image)
    assert [o.triple for o in found] == [("square", "red", "large")]


def test_touching_objects_of_two_colours_are_two_objects():
    image = np.full((32, 32, 3), BACKGROUNDS["dark"], np.uint8)
    image[8:17, 4:13] = COLOURS["red"]
    image[8:17, 13:22] = COLOURS["blue"]
    assert {o.triple for o in find_objects(image)} == {
        ("square", "red", "small"),
        ("square", "blue", "small"),
    }


def test_what_is_no_known_shape_or_colour_is_unknown():
    bar = np.full((32, 32, 3), BACKGROUNDS["dark"], np.uint8)
    bar[10:13, 2:30] = COLOURS["green"]
    assert [(o.shape, o.colour) for o in find_objects(bar)] == [("unknown", "green")]
    white = np.full((32, 32, 3), BACKGROUNDS["dark"], np.uint8)
    white[10:19, 10:19] = 255
    assert [o.triple for o in find_objects(white)] == [("square", "unknown", "small")]
    assert not check(white, "a small red square")["exact"]


def test_a_tree_is_a_triangle_at_16_and_unknown_from_32_on():
    """A triangle of whose upper rows only the middle is there: 0.68 to 0.73 of its pixels."""
    for side, rows, shape in ((16, 5, "triangle"), (32, 8, "unknown"), (64, 14, "unknown")):
        width = diameter("large", side)
        mask = template("triangle", width).copy()
        top, middle = mask[:rows], width // 2
        top[:, :middle] = top[:, middle + 1 :] = False
        image = np.full((side, side, 3), BACKGROUNDS["dark"], np.uint8)
        corner = side // 4
        image[corner : corner + width, corner : corner + width][mask] = COLOURS["blue"]
        whole = template("triangle", width)
        assert min_iou(16) <= (mask & whole).sum() / whole.sum() < min_iou(32)
        assert [o.shape for o in find_objects(image)] == [shape]


def test_a_square_whose_corners_are_round_is_none():
    """The overlap alone wouldn't say so: the template that fits better does."""
    width = diameter("small", 32)
    y, x = (np.minimum(v, width - 1 - v) for v in np.mgrid[:width, :width])
    image = np.full((32, 32, 3), BACKGROUNDS["dark"], np.uint8)
    image[8 : 8 + width, 8 : 8 + width][x + y >= 2] = COLOURS["blue"]
    assert [o.shape for o in find_objects(image)] == ["circle"]


def test_a_picture_without_objects_scores_zero():
    empty = np.full((32, 32, 3), BACKGROUNDS["dark"], np.uint8)
    result = check(empty, "a small red square left of a large blue circle")
    assert result == {
        "exact": False,
        "count": False,
        "shape": 0,
        "colour": 0,
        "size": 0,
        "relation": 0,
    }


def test_random_pixels_are_never_exact():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    assert composition(images, ["a small red square"] * 20)["exact"] == 0


def test_a_size_that_is_not_asked_for_is_not_judged():
    scene = Scene(objects=(Object(shape="circle", colour="cyan", size="large", centre=(0.5, 0.5)),))
    result = check(render(scene, 32), "a cyan circle")
    assert result["exact"] and np.isnan(result["size"])


def test_composition_averages_by_the_number_of_objects():
    scenes = _scenes(32, 40)
    images = np.stack([render(s, 32) for s in scenes])
    images[0] = BACKGROUNDS["dark"]
    result = composition(images, [caption(s) for s in scenes])
    assert result["exact"] == pytest.approx(39 / 40)
    count = len(scenes[0].objects)
    same = sum(len(s.objects) == count for s in scenes)
    assert result[f"exact_{count}"] == pytest.approx(1 - 1 / same)
    assert all(result[f"exact_{n}"] == 1 for n in {1, 2, 3} - {count})


def test_composition_leaves_out_what_no_caption_asks_for():
    scene = Scene(objects=(Object(shape="circle", colour="cyan", size="large", centre=(0.5, 0.5)),))
    result = composition([render(scene, 32)], [caption(scene)])
    assert result == {
        name: 1.0 for name in ("colour", "count", "exact", "exact_1", "shape", "size")
    }


def test_bad_input_is_refused_in_one_line():
    image = np.zeros((32, 32, 3), np.uint8)
    for call in (
        lambda: find_objects(image.astype(np.float32)),
        lambda: find_objects(image[:16]),
        lambda: check(image, "a horse"),
        lambda: composition([], []),
        lambda: composition([image], []),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_palette_leaves_room_for_the_colour_tolerance():
    colours = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > MAX_COLOUR_DISTANCE + 10
