"""The drawn scenes: splits, captions, rendering, refusals."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from contextdiff_jax.data import (
    DataConfig,
    ShapesConfig,
    ShapesSource,
)
from contextdiff_jax.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    caption,
    diameter,
    heldout_triples,
    parse_caption,
    relation_of,
    render,
    template,
)
from contextdiff_jax.evaluation.subject import splits

TRIPLES = set(itertools.product(SHAPES, COLOURS, SIZES))


def _one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def _triples(split: str, count: int = 1500) -> list[set]:
    source = ShapesSource(ShapesConfig(split=split))
    return [{o.triple for o in source.scene(i).objects} for i in range(count)]


def test_training_scenes_never_show_a_heldout_combination_but_every_other():
    heldout = set(heldout_triples(0.125))
    assert len(heldout) == 6
    assert set().union(*_triples("train")) == TRIPLES - heldout


def test_every_heldout_scene_shows_a_heldout_combination_in_any_place():
    heldout = set(heldout_triples(0.125))
    assert all(triples & heldout for triples in _triples("heldout"))
    source = ShapesSource(ShapesConfig(split="heldout", num_objects=(3, 3)))
    places = [
        [o.triple in heldout for o in source.scene(i).objects].index(True) for i in range(100)
    ]
    assert set(places) == {0, 1, 2}


@pytest.mark.parametrize("fraction", [0.05, 0.125, 0.3, 0.5])
def test_every_pair_of_attribute_values_occurs_in_training(fraction):
    train = TRIPLES - set(heldout_triples(fraction))
    assert len(train) == len(TRIPLES) - round(fraction * len(TRIPLES))
    for first, second in itertools.combinations(range(3), 2):
        assert {(t[first], t[second]) for t in train} == {(t[first], t[second]) for t in TRIPLES}


def test_a_scene_is_a_function_of_seed_split_and_number():
    one, same = ShapesSource(ShapesConfig()), ShapesSource(ShapesConfig())
    list(map(one.scene, range(5)))  # earlier reads must not matter
    assert one.scene(123) == same.scene(123)
    np.testing.assert_array_equal(one[123]["image"], same[123]["image"])
    others = (ShapesConfig(seed=1), ShapesConfig(split="all"))
    assert all(ShapesSource(other).scene(123) != one.scene(123) for other in others)
    assert len({one.scene(i) for i in range(200)}) == 200


@pytest.mark.parametrize("image_size", [16, 32, 64])
def test_objects_keep_apart_within_the_picture(image_size):
    source = ShapesSource(ShapesConfig(image_size=image_size, num_objects=(3, 3), split="all"))
    for i in range(200):
        scene = source.scene(i)
        assert len({o.triple for o in scene.objects}) == 3
        image = render(scene, image_size)
        areas = [template(o.shape, diameter(o.size, image_size)).sum() for o in scene.objects]
        # Nothing hidden, nothing cut off.
        assert (image != BACKGROUNDS["dark"]).any(-1).sum() == sum(areas)
        for a, b in itertools.combinations(scene.objects, 2):
            gap = np.abs(np.subtract(a.centre, b.centre)).max() * image_size
            assert (
                gap - (diameter(a.size, image_size) + diameter(b.size, image_size)) / 2
                >= image_size // 16
            )


def test_templates_of_a_size_all_differ():
    for width in {diameter(size, s) for size in SIZES for s in (16, 32, 64)}:
        assert len({template(shape, width).tobytes() for shape in SHAPES}) == len(SHAPES)


def test_relations_are_true_and_clear_of_the_diagonal():
    source = ShapesSource(ShapesConfig(num_objects=(2, 2)))
    scenes = [source.scene(i) for i in range(300)]
    assert {s.relation for s in scenes} == {"left of", "right of", "above", "below"}
    for scene in scenes:
        (x0, y0), (x1, y1) = (o.centre for o in scene.objects)
        true = {"left of": x1 - x0, "right of": x0 - x1, "above": y1 - y0, "below": y0 - y1}[
            scene.relation
        ]
        assert true == max(abs(x1 - x0), abs(y1 - y0))
        assert abs(abs(x1 - x0) - abs(y1 - y0)) > 1 / 16
        assert scene.relation == relation_of(*(o.centre for o in scene.objects))


def test_captions_read_as_documented():
    def obj(words: str) -> Object:
        size, colour, shape = words.split()
        return Object(shape=shape, colour=colour, size=size)

    red, blue, green = obj("large red circle"), obj("small blue square"), obj("small green cross")
    assert caption(Scene(objects=(red,))) == "a large red circle"
    assert (
        caption(Scene(objects=(blue,), position="top left"))
        == "a small blue square at the top left"
    )
    two = Scene(objects=(blue, red), relation="left of")
    assert caption(two) == "a small blue square left of a large red circle"
    three = "a large red circle, a small blue square and a small green cross"
    assert caption(Scene(objects=(red, blue, green))) == three


def test_the_share_of_captions_that_state_a_place_is_as_asked_and_changes_no_scene():
    sources = [
        ShapesSource(ShapesConfig(num_objects=(1, 1), position_fraction=f))
        for f in (0.0, 0.25, 1.0)
    ]
    captions = [[source[i]["caption"] for i in range(400)] for source in sources]
    stated = [np.mean([" at the " in text for text in texts]) for texts in captions]
    assert stated[0] == 0 and stated[2] == 1 and 0.18 < stated[1] < 0.32
    assert all(text.startswith(plain) for plain, text in zip(captions[0], captions[2], strict=True))
    for i in range(20):
        np.testing.assert_array_equal(sources[0][i]["image"], sources[2][i]["image"])


def test_captions_in_reading_order_are_as_many_as_asked_and_the_pictures_stay():
    sources = [
        ShapesSource(ShapesConfig(num_objects=(2, 2), reading_order=f)) for f in (0.0, 0.8, 1.0)
    ]
    shares = []
    for source in sources:
        scenes = [source.scene(i) for i in range(400)]
        shares.append(np.mean([s.relation in ("left of", "above") for s in scenes]))
        for scene in scenes:
            assert scene.relation == relation_of(*(o.centre for o in scene.objects))
    np.testing.assert_allclose(shares, [0.5, 0.9, 1.0], atol=0.06)
    assert shares[2] == 1
    for i in range(20):
        np.testing.assert_array_equal(sources[0][i]["image"], sources[2][i]["image"])


def test_what_is_judged_has_both_orders_however_the_training_was():
    config = DataConfig(num_objects=(2, 2), reading_order=1.0)
    for source in splits(config).values():
        scenes = [source.scene(i) for i in range(200)]
        assert 0.35 < np.mean([s.relation in ("left of", "above") for s in scenes]) < 0.65


def test_parsing_inverts_captions():
    source = ShapesSource(ShapesConfig(split="all"))
    for i in range(300):
        scene = source.scene(i)
        parsed = parse_caption(source[i]["caption"])
        assert [o.triple for o in parsed.objects] == [o.triple for o in scene.objects]
        assert (parsed.relation, parsed.position) == (scene.relation, scene.position)
        assert caption(parsed) == source[i]["caption"]
    assert parse_caption(" A  red Circle ") == Scene(
        objects=(Object(shape="circle", colour="red"),)
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a horse",
        "a large red",
        "a red circle left of",
        "a red circle at the moon",
        "a red circle and a red circle and a red circle and a red circle",
        "a red circle left of a blue circle at the top",
    ],
)
def test_captions_that_are_not_of_this_world_are_refused(text):
    with pytest.raises(ValueError) as error:
        parse_caption(text)
    assert "caption=" in _one_line(error)


def test_attributes_are_json_and_describe_the_picture():
    record = ShapesSource(ShapesConfig())[5]
    attributes = json.loads(json.dumps(record["attributes"]))
    assert attributes == record["attributes"]
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    for obj in attributes["objects"]:
        x, y = (int(v * 32) for v in obj["centre"])
        assert tuple(record["image"][y, x]) == COLOURS[obj["colour"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_objects": (0, 2)},
        {"num_objects": (1, 4)},
        {"image_size": 8},
        {"length": 0},
        {"split": "test"},
        {"heldout_fraction": 0.6},
        {"split": "heldout", "heldout_fraction": 0.0},
        {"backgrounds": ("pink",)},
        {"seed": -1},
    ],
)
def test_bad_scene_configs_are_refused_with_the_field_and_value(fields):
    with pytest.raises(ValueError) as error:
        ShapesConfig(**fields)
    assert any(_one_line(error).startswith(f"{name}={value!r}") for name, value in fields.items())


def test_objects_that_cannot_be_drawn_are_refused():
    square = {"shape": "square", "colour": "red"}
    for obj in (Object(**square), Object(**square, size="large", centre=(0.0, 0.5))):
        with pytest.raises(ValueError):
            render(Scene(objects=(obj,)), 32)


@pytest.mark.parametrize("index", [-1, 100])
def test_scene_numbers_outside_of_the_epoch_are_refused(index):
    with pytest.raises(IndexError):
        ShapesSource(ShapesConfig(length=100))[index]
