"""The attribute classifier: what it takes for attributes, that it learns them, and its file."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command

from contextdiff_jax.data import DataConfig
from contextdiff_jax.evaluation.features import extract
from contextdiff_jax.evaluation.networks import classifier as c
from contextdiff_jax.evaluation.subject import classifier_source, feature_fns, splits
from contextdiff_jax.models.pixels import to_unit

# Without LLVM's optimisations XLA:CPU (jaxlib 0.10.2) gives NaN for some gradients of this network;
# with them none was seen.
pytestmark = pytest.mark.usefixtures("optimised")


def coloured(count, seed):
    """Noisy pictures of one colour, with bright rows, dark columns, both or neither: two attributes
    easy to see.
    """
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        colour, row, column = rng.integers(3), rng.integers(2), rng.integers(2)
        image = np.full((16, 16, 3), 40) + rng.integers(0, 20, (16, 16, 3))
        image[..., colour] += 120
        if row:
            image[:4] = 250
        if column:
            image[:, :4] = 0
        images.append(image.astype(np.uint8))
        labels.append({"colour": ("rgb"[colour],), "marks": ("row",) * row + ("column",) * column})
    return np.stack(images), labels


@pytest.fixture(scope="module")
def trained():
    images, labels = coloured(400, 0)
    return c.train_classifier(images, labels, steps=80, batch_size=32)


def accuracy(model, images, labels):
    answers = c.correct(extract(feature_fns(model)["logits"], images), labels, model.attributes)
    return {name: values.mean() for name, values in answers.items()}


def test_it_learns_attributes_of_one_and_of_several_values(trained):
    images, labels = coloured(100, 1)
    assert {a.name: a.multiple for a in trained.attributes} == {"colour": False, "marks": True}
    right = accuracy(trained, images, labels)
    assert right["colour"] > 0.95 and right["marks"] > 0.9
    # Pictures that don't belong to the labels get chance, so the figure is not of the labels alone.
    wrong = accuracy(trained, np.roll(images, 1, axis=0), labels)
    assert wrong["colour"] < 0.6 and wrong["marks"] < 0.5


def test_features_are_what_the_answers_are_made_of_and_have_unit_scale(trained):
    fns = feature_fns(trained)
    images, _ = coloured(50, 2)
    features = extract(fns["features"], images, batch_size=16)
    logits = np.maximum(features, 0) @ np.asarray(trained.out.kernel[...]) + np.asarray(
        trained.out.bias[...]
    )
    np.testing.assert_allclose(extract(fns["logits"], images), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose((features**2).mean(1), 1, rtol=1e-2)


def test_the_distance_of_pictures_is_that_of_their_layers_directions(trained):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 2, 16, 16, 3)).astype(np.uint8)
    values, maps = c.feature_distance(trained)(a, b)
    wanted = []
    for x, y in zip(*(trained.layers(to_unit(jnp.asarray(p))) for p in (a, b)), strict=True):
        x, y = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in map(np.asarray, (x, y)))
        wanted.append(((x - y) ** 2).sum(-1).mean((1, 2)))
    np.testing.assert_allclose(values, np.mean(wanted, 0), rtol=1e-4)
    assert maps.shape == (2, 16, 16) and 0 < maps.min() and maps.max() < 2
    assert c.feature_distance(trained)(a, a)[1].max() < 1e-9


def test_a_saved_classifier_gives_the_same_answers(trained, tmp_path):
    c.save_classifier(trained, tmp_path, {"accuracy": {}})
    loaded = c.load_classifier(tmp_path)
    images, _ = coloured(20, 3)
    assert loaded.attributes == trained.attributes and loaded.image_size == 16
    ours, theirs = (extract(feature_fns(model)["logits"], images) for model in (loaded, trained))
    np.testing.assert_array_equal(ours, theirs)


def test_a_folder_without_or_with_another_classifier_is_refused_in_one_line(trained, tmp_path):
    with pytest.raises(
        ValueError, match="holds no classifier.*train one with contextdiff_jax.train_classifier"
    ):
        c.load_classifier(tmp_path)
    c.save_classifier(trained, tmp_path, {})
    report = json.loads((tmp_path / c.REPORT_FILE).read_text())
    report["attributes"].append({"name": "more", "values": ["a", "b"], "multiple": False})
    (tmp_path / c.REPORT_FILE).write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"out\.\w+: \(.*\), classifier.json asks for \("):
        c.load_classifier(tmp_path)
    (tmp_path / c.WEIGHTS_FILE).write_bytes((tmp_path / c.WEIGHTS_FILE).read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        c.load_classifier(tmp_path)


def test_labels_are_read_from_scenes_and_from_metadata():
    first, second = (
        dict(shape="circle", colour="red", size="small"),
        dict(shape="cross", colour="red", size="large"),
    )
    scene = {"objects": [first, second], "relation": "above"}
    assert c.read_labels(scene) == {
        "shape": ("circle", "cross"),
        "colour": ("red",),
        "size": ("large", "small"),
    }
    record = {"vendor": "noto", "skin_tone": None, "width": 64}
    assert c.read_labels(record) == {"vendor": ("noto",), "skin_tone": ("none",)}


def test_attributes_are_the_fields_with_a_few_frequent_values():
    rows = [
        {"style": "ab"[i % 2], "name": f"name {i}", "same": "x", "tone": "cd"[i % 3 == 0]}
        for i in range(1000)
    ]
    rows[5]["tone"] = "rare"
    attributes = c.choose_attributes([c.read_labels(row) for row in rows])
    assert {a.name: a.values for a in attributes} == {
        "style": ("a", "b"),
        "tone": ("c", "d", "other"),
    }
    with pytest.raises(ValueError, match="no attribute of its records has 2 to 64 frequent"):
        c.choose_attributes([{"same": ("x",)}] * 10)


def test_answers_are_right_only_if_every_value_is():
    attributes = (c.Attribute("one", ("a", "b"), False), c.Attribute("many", ("x", "y"), True))
    labels = [
        {"one": ("a",), "many": ("x", "y")},
        {"one": ("b",), "many": ("x",)},
        {"one": ("b",), "many": ()},
        {"one": ("never seen",), "many": ("y",)},
    ]
    logits = np.array([[2, 1, 3, 3], [2, 1, 3, 3], [0, 1, -1, -2], [0, 1, -1, 2]], float)
    right = c.correct(logits, labels, attributes)
    np.testing.assert_array_equal(right["one"], [1, 0, 1, np.nan])
    np.testing.assert_array_equal(right["many"], [1, 0, 1, 1])


def test_the_judge_of_scenes_learns_every_combination_from_scenes_that_are_not_evaluated():
    data = DataConfig(image_size=16, num_objects=(1, 1))
    source, heldout = classifier_source(data), splits(data)["held-out combinations"]
    triples = {source.scene(i).objects[0].triple for i in range(2000)}
    assert {heldout.scene(i).objects[0].triple for i in range(300)} <= triples
    assert source.config.seed not in {s.config.seed for s in splits(data).values()} | {
        data.scene_seed
    }


def test_the_command_writes_a_classifier_and_says_how_good_it_is(tmp_path):
    done = command(
        "train_classifier",
        "--config=configs/base.py",
        f"--workdir={tmp_path}",
        "--steps=20",
        "--num=120",
        "--batch_size=16",
        tiny=True,
        env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / c.REPORT_FILE).read_text())
    assert (
        {a["name"] for a in report["attributes"]}
        == {"shape", "colour", "size"}
        == set(report["accuracy"])
    )
    assert report["pictures"] == 108 and report["pictures_kept_aside"] == 12
    for name, estimate in report["accuracy"].items():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert f"{name}: {100 * estimate['value']:.1f}% right" in done.stdout
    assert c.load_classifier(tmp_path).image_size == 16
