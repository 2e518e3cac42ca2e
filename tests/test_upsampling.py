"""An upsampler's scores beside bicubic's and a baseline's: made-up upsamplers, no network."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest
from command_flags import run as run_command
from conftest import ROOT, SMALLEST, config_dict, one_line
from evaluated_run import Page

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.evaluation import distances, metrics, opening, report, subject, upsampling
from contextdiff_jax.evaluation.upsampling import bicubic, gradient_energy, jpeg, sharpness
from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.models.low_resolution import shrink
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runs.reading import Run
from contextdiff_jax.settings import parse

FACTOR, NUM, ROW = 2, 12, "held-out combinations"
UPSAMPLER = {
    "super_resolution.factor": FACTOR,
    "super_resolution.max_level": 0.6,
    "sample.augmentation": 0.1,
}


@pytest.fixture(scope="module")
def evaluation():
    """A subject whose upsampler is bicubic with grey levels of noise, the more the higher the
    level, and whose baseline is bicubic. Its features are linear in the pixels.
    """
    settings = parse(config_dict(**SMALLEST, **UPSAMPLER))
    matrix = np.random.default_rng(1).standard_normal((16 * 16 * 3, 4)) / 255

    def enlarge(captions, small, first, level):
        assert len(captions) == len(small) and first == 0
        noise = 200 * level * np.random.default_rng(3).standard_normal((len(small), 16, 16, 3))
        return np.clip(bicubic(small, FACTOR) + noise, 0, 255).astype(np.uint8)

    made = subject.Evaluation(
        settings=settings,
        tokenizer=load_tokenizer(),
        graph=model_graph(settings),
        params=None,
        generate=lambda captions, first: pytest.fail("an upsampler's samples aren't of captions"),
        features="judge",
        num=NUM,
        reference=NUM,
        enlarge=enlarge,
        augmentation=0.1,
        baseline=lambda captions, small, first, level: bicubic(small, FACTOR),
        baseline_name="plain",
    )
    made.__dict__.update(
        network=None, feature_fns={"features": lambda x: np.asarray(x).reshape(len(x), -1) @ matrix}
    )
    return made


def changed(evaluation, **fields):
    """The evaluation with its sources, which take a while to be made, and other fields."""
    other = dataclasses.replace(evaluation, **fields)
    kept = ("sources", "network", "feature_fns")
    other.__dict__.update({name: getattr(evaluation, name) for name in kept})
    return other


def perfect(evaluation):
    """... whose upsampler gives the true pictures."""
    return changed(evaluation, enlarge=lambda *_: evaluation.pictures(ROW))


def test_perfect_pictures_have_perfect_scores_and_gain_over_bicubic_what_it_lacks(evaluation):
    scores = metrics.upsampling(perfect(evaluation)).scores
    assert {n: e.value for n, e in scores[ROW].items()} == {
        "psnr": 100.0,
        "ssim": pytest.approx(1),
        "sharpness": 1.0,
    }
    true = evaluation.pictures(ROW)
    theirs = bicubic(shrink(true, FACTOR), FACTOR)
    errors = ((theirs.astype(np.float64) - true) ** 2).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / errors)
    energies = [
        [sum((np.diff(x.astype(float), axis=a) ** 2).mean() for a in (0, 1)) for x in pictures]
        for pictures in (theirs, true)
    ]
    shares = np.divide(*energies)
    assert shares.max() < 0.9  # blurred
    wanted = {"psnr": psnr, "sharpness": shares}
    for name, values in wanted.items():
        assert scores[f"{ROW}, bicubic"][name].value == pytest.approx(values.mean())
        gain = scores[f"{ROW}, minus bicubic"][name]
        ours = {"psnr": 100, "sharpness": 1}[name]
        assert gain.value == pytest.approx(ours - values.mean()) and gain.low > 0
    # the baseline is bicubic here
    for what in ("", "minus "):
        assert scores[f"{ROW}, {what}bicubic"] == scores[f"{ROW}, {what}baseline"]


def test_differences_are_paired_by_picture(evaluation):
    result = metrics.upsampling(evaluation)
    ours, theirs, difference = (
        result.scores[row]["psnr"] for row in (ROW, f"{ROW}, bicubic", f"{ROW}, minus bicubic")
    )
    assert difference.value == pytest.approx(ours.value - theirs.value) and difference.high < 0
    assert "12 pictures shrunk 2 times, enlarged at augmentation 0.1" in result.note
    assert "baseline: plain" in result.note
    equal = changed(evaluation, enlarge=evaluation.baseline)
    same = metrics.upsampling(equal).scores[f"{ROW}, minus baseline"]
    assert set(same.values()) == {(0, 0, 0)}


def test_sharpness_is_1_of_the_true_picture_and_more_of_noise():
    rng = np.random.default_rng(0)
    true = rng.integers(100, 150, (16, 16, 3)).astype(np.uint8)
    noisy = (true + rng.integers(0, 50, true.shape)).astype(np.uint8)
    flat = np.full_like(true, 7)
    assert sharpness(true, true) == 1 and sharpness(noisy, true) > 1.3
    assert sharpness(flat, true) == 0 and np.isnan(sharpness(true, flat))
    steps = np.tile(np.arange(16, dtype=np.uint8)[:, None, None], (1, 16, 3))
    assert gradient_energy(steps) == 1


def test_features_see_what_is_near_the_true_pictures(evaluation):
    both = [metrics.upsampling_features(e).scores for e in (perfect(evaluation), evaluation)]
    best, noisy = both
    assert best[ROW]["feature_distance"] == (0, 0, 0)
    assert best[ROW]["fid"].value == pytest.approx(0, abs=1e-6)
    assert noisy[ROW]["feature_distance"].low > 0.05
    gain = best[f"{ROW}, minus bicubic"]
    for name, estimate in best[f"{ROW}, bicubic"].items():
        assert gain[name].value == pytest.approx(best[ROW][name].value - estimate.value, abs=1e-6)
        assert gain[name].value < 0
    assert "layer_distance" not in best[ROW]  # of a classifier alone
    # the other metrics' samples are the same pictures
    assert metrics.fid(evaluation).scores[ROW] == {"fid": noisy[ROW]["fid"]}


def test_a_classifiers_layers_compare_each_picture_with_its_true_one(evaluation):
    def distance(pictures, others):
        assert len(pictures) <= 16
        return np.abs(np.asarray(pictures, float) - others).mean((1, 2, 3)), None

    judged = changed(evaluation)
    judged.__dict__["layer_distance"] = distance
    scores = metrics.upsampling_features(judged).scores
    true, theirs = evaluation.pictures(ROW)[:], evaluation.samples(ROW)
    values = np.abs(theirs.astype(float) - true).mean((1, 2, 3))
    assert scores[ROW]["layer_distance"].value == pytest.approx(values.mean())
    bicubics = scores[f"{ROW}, bicubic"]["layer_distance"].value
    gain = scores[f"{ROW}, minus bicubic"]["layer_distance"]
    assert gain.value == pytest.approx(values.mean() - bicubics)


def test_a_difference_of_fids_resamples_both_alike():
    rng = np.random.default_rng(0)
    real, first = rng.standard_normal((2, 60, 4))
    second = first + 0.01 * rng.standard_normal(first.shape)
    found = distances.fid_difference(first, second, real, 50)
    apart = distances.fid(first, real, 50), distances.fid(second, real, 50)
    assert found.value == pytest.approx(apart[0].value - apart[1].value)
    assert found.high - found.low < 0.2 * (apart[0].high - apart[0].low)
    same = distances.fid_difference(first, first, real, 5)
    assert same == (0, 0, 0)


def test_the_curve_has_every_level_on_clean_pictures_and_on_a_low_quality_file_s(
    evaluation, tmp_path
):
    judged = changed(evaluation, augmentations=(0.0, 0.1, 0.3))
    metrics.check(["upsampling", "upsampling_features"], judged)
    result = metrics.upsampling(judged)
    curve = result.details["curve"]
    assert list(curve) == ["clean", "JPEG 30"] == list(upsampling.INPUTS)
    for kind, found in curve.items():
        values = [found["by_level"][level]["psnr"].value for level in (0.0, 0.1, 0.3)]
        assert values == sorted(values, reverse=True) and values[0] > values[2] + 1
        assert found["by_level"][0.0] == found["bicubic"]  # no noise: it is bicubic
        lost = found["minus_lowest"][0.3]["psnr"]
        assert lost.value == pytest.approx(values[2] - values[0]) and lost.high < 0
        assert result.scores[f"{ROW}, {kind}, augmentation 0.3 minus 0"]["psnr"] == lost
    assert curve["clean"]["by_level"][0.1] == result.scores[ROW]
    small = judged.small(ROW)
    assert jpeg(small).shape == small.shape and (jpeg(small) != small).any()

    # What is looked at: a row a picture.
    grid, *levels = result.shown.values()
    assert grid.columns == 5 and len(grid.images) == 5 * 8 and len(levels) == 2
    np.testing.assert_array_equal(grid.images[4], judged.pictures(ROW)[0])
    np.testing.assert_array_equal(grid.images[0][::FACTOR, ::FACTOR], small[0])
    assert grid.captions[0] == "small" and grid.captions[1].startswith("bicubic: ")
    facts = {"command": "evaluate", "step": 3}
    page = Page()
    page.feed(report.write_report(tmp_path, {"upsampling": result}, {}, facts, {}).read_text())
    names = ["upsampling.png", *(f"upsampling_{i}.png" for i in range(3))]
    assert page.addresses == names and all((tmp_path / "report" / n).exists() for n in names)
    assert (
        "curve"
        in json.loads(json.dumps(report.as_json({"upsampling": result})))["details"]["upsampling"]
    )


@pytest.mark.parametrize(
    "names, fields, message",
    [
        (["upsampling", "bound"], {}, "--metrics=bound: is of pictures given their captions"),
        (["fid"], {}, "--baseline, --augmentations: are read by --metrics=upsampling,"),
        (["upsampling"], {"augmentations": (0.7,)}, "augmentation=0.7: must be at most 0.6"),
        (["upsampling"], {"augmentations": (1.1,)}, r"augmentation=1.1: must lie in \[0, 1\]"),
        (["upsampling"], {"factor": 0}, "is of a model that enlarges pictures"),
        (["upsampling_features"], {"features": "nowhere"}, "--features=nowhere: no such folder"),
    ],
)
def test_what_an_upsampler_cannot_have_is_refused_before_sampling(
    evaluation, names, fields, message
):
    settings = evaluation.settings
    if "factor" in fields:
        config = dataclasses.replace(settings.super_resolution, factor=fields["factor"])
        settings = dataclasses.replace(settings, super_resolution=config)
    rest = {name: value for name, value in fields.items() if name != "factor"}
    other = dataclasses.replace(evaluation, settings=settings, **rest)
    with pytest.raises(ValueError, match=message) as error:
        metrics.check(names, other)
    one_line(error)


@pytest.fixture
def opened(evaluation, monkeypatch):
    """`open_evaluation` of a run and a baseline whose networks aren't called, and what they are
    asked for.
    """
    asked = []

    def upsample(self, prompts, images, **options):
        asked.append((self.opened.identity.seed, list(prompts), images, options))
        return bicubic(images, FACTOR)

    monkeypatch.setattr(Pipeline, "upsample", upsample)
    monkeypatch.setattr(opening, "replicate", lambda tree: tree)
    settings = evaluation.settings

    def open_it(options=settings.sample, ours=None, **other):
        first, second = (
            Run(settings if ours is None else ours, evaluation.tokenizer, None, 1),
            Run(dataclasses.replace(settings, seed=9, **other), evaluation.tokenizer, None, 1),
        )
        return opening.open_evaluation(
            first, options, seed=4, baseline=second, baseline_name="RUN2", features="", num=3
        )

    return types.SimpleNamespace(open=open_it, asked=asked)


def test_run_and_baseline_enlarge_the_same_pictures_with_the_same_noise(opened, evaluation):
    options = evaluation.settings.sample.changed(augmentation=0.2)
    made = opened.open(options)
    made.__dict__["sources"] = evaluation.sources
    made.samples(ROW)
    upsampling.contestants(made, ROW)
    ours, theirs = opened.asked
    assert (ours[0], theirs[0]) == (0, 9) and ours[1] == theirs[1] == made.captions(ROW)
    np.testing.assert_array_equal(ours[2], shrink(made.pictures(ROW), FACTOR))
    np.testing.assert_array_equal(ours[2], theirs[2])
    assert ours[3] == theirs[3] == {"seed": 4, "first": 0, "augmentation": 0.2}


def test_a_baseline_that_enlarges_otherwise_is_refused_in_one_line(opened, evaluation):
    config = evaluation.settings.super_resolution
    for change, message in (
        ({"factor": 4}, "--baseline=RUN2: has super_resolution.factor=4, the run 2"),
        ({"max_level": 0.05}, "augmentation=0.1: must be at most 0.05"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            opened.open(super_resolution=dataclasses.replace(config, **change))
        one_line(error)
    plain = parse(config_dict(**SMALLEST))
    with pytest.raises(ValueError, match="--augmentation=0.3: is of a model that enl") as error:
        opened.open(plain.sample.changed(augmentation=0.3), plain)
    one_line(error)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--augmentations=0,x"], "--augmentations=0,x: must be numbers"),
        (["--augmentations=0,1.5"], "--augmentations=0,1.5: must be numbers .*lie in"),
        (["--augmentation=-1"], "augmentation=-1.0: must lie in"),
    ],
)
def test_flags_that_are_no_levels_are_refused_in_one_line(arguments, message, tmp_path):
    file = ROOT / "contextdiff_jax/evaluate.py"
    with pytest.raises(ValueError, match=message) as error:
        run_command(file, [f"--workdir={tmp_path}", "--metrics=upsampling", *arguments])
    one_line(error)
