"""Distances and intervals against formulas in float64, written independently."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ON_EIGHT, ROOT
from references import gaussian_kernel, mmd2
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from contextdiff_jax.evaluation import distances, edit_scores, intervals
from contextdiff_jax.evaluation.features import Moments, extract

RTOL = 1e-9


def two_sets(n=60, m=80, width=7, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width))
    return rng.normal(size=(n, width)) @ mix, 0.4 + 1.3 * rng.normal(size=(m, width)) @ mix


def reference_fid(x, y):
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T))
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(
        np.cov(x.T) + np.cov(y.T) - 2 * np.real(root)
    )


def cubic(p, q):
    return (p @ q / len(p) + 1) ** 3


@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["centred", "far from 0"])
def test_moments_of_any_partition_merge_to_those_of_the_whole(offset):
    x = np.random.default_rng(1).normal(size=(300, 5)) + offset
    for cuts in ([1, 2, 200], [150], [299], list(range(7, 300, 7))):
        parts = [Moments.of(part) for part in np.split(x, cuts)]
        left = right = None
        for part in parts:
            left = part if left is None else left.merge(part)
        for part in reversed(parts):
            right = part if right is None else part.merge(right)
        for merged in (left, right):
            assert merged.count == 300
            np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
            # The naive sum of products would have no correct digit at 1e6.
            np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=1e-7, atol=1e-7)


def test_frechet_distance_is_the_closed_form_of_diagonal_gaussians():
    mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([1.0, 4.0, 0.0]), np.array([9.0, 1.0, 2.0])
    first, second = (Moments(11, m, 10 * np.diag(v)) for m, v in ((0 * mean, a), (mean, b)))
    expected = np.sum(mean**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert distances.frechet_distance(first, second) == pytest.approx(expected, rel=RTOL)


def test_fid_equals_the_matrix_square_root_formula():
    x, y = two_sets()
    assert distances.fid(x, y).value == pytest.approx(reference_fid(x, y), rel=RTOL)
    assert distances.fid(x, x).value == pytest.approx(0, abs=1e-9)
    assert distances.fid(x, y).value > 1


class Features(torch.nn.Module):
    """A network, as torchmetrics calls it: here the "pictures" are the features."""

    num_features = 7

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_fid_and_kid_equal_torchmetrics():
    x, y = two_sets(n=90, m=70)
    metrics = {
        "fid": FrechetInceptionDistance(feature=Features()),
        "kid": KernelInceptionDistance(feature=Features(), subsets=1, subset_size=70),
    }
    for metric in metrics.values():
        metric.update(torch.tensor(y), real=True)
        metric.update(torch.tensor(x[:70]), real=False)
    fid, (kid, _) = (metric.compute() for metric in metrics.values())
    assert distances.fid(x[:70], y).value == pytest.approx(float(fid), rel=1e-6)
    assert distances.mmd2(x[:70], y, distances.polynomial_kernel).value == pytest.approx(
        float(kid), rel=1e-6
    )
    assert distances.kid(x[:70], y, subsets=1, subset_size=70)[0] == pytest.approx(
        float(kid), rel=1e-6
    )


def test_fid_of_fewer_pictures_than_features_is_finite_and_right():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 20)), rng.normal(size=(9, 20)) + 1
    # tr (C1 C2)^1/2 through the Gram matrix of the centred rows: another route, without any square
    # root of a matrix.
    cx, cy = ((a - a.mean(0)) / np.sqrt(len(a) - 1) for a in (x, y))
    shared = scipy.linalg.svdvals(cx @ cy.T).sum()
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(cx**2) + np.sum(cy**2) - 2 * shared
    assert distances.fid(x, y).value == pytest.approx(expected, rel=1e-6)


def test_mmd_equals_the_double_sum(monkeypatch):
    x, y = two_sets(n=23, m=31)
    monkeypatch.setattr(distances, "_BLOCK", 10)  # several blocks, the last one partly filled
    for kernel, k in (
        (distances.polynomial_kernel, cubic),
        (distances.gaussian_kernel, gaussian_kernel),
    ):
        for unbiased in (True, False):
            expected = mmd2(x, y, k, unbiased)
            assert distances.mmd2(x, y, kernel, unbiased).value == pytest.approx(expected, rel=RTOL)
    assert mmd2(x, y, cubic, True) != pytest.approx(mmd2(x, y, cubic, False), rel=1e-3)


def test_cmmd_is_a_thousand_times_the_biased_gaussian_mmd_of_unit_vectors():
    x, y = two_sets(n=20, m=25)
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y)]
    assert distances.cmmd(x, y).value == pytest.approx(
        1000 * mmd2(*unit, gaussian_kernel, False), rel=1e-7
    )
    assert distances.cmmd(3 * x, y).value == pytest.approx(distances.cmmd(x, y).value, rel=RTOL)
    assert distances.cmmd(x, x).value == pytest.approx(0, abs=1e-9)


def test_kid_over_subsets_estimates_all_pairs():
    x, y = two_sets(n=80, m=80)
    whole = distances.mmd2(x, y, distances.polynomial_kernel).value
    mean, std = distances.kid(x, y, subsets=3, subset_size=80)  # each subset is everything
    assert mean == pytest.approx(whole, rel=RTOL) and std == pytest.approx(0, abs=1e-9 * whole)
    mean, std = distances.kid(x, y, subsets=400, subset_size=40)
    assert std > 0 and abs(mean - whole) < 4 * std / 20


def test_the_intervals_of_distances_tell_equal_from_different():
    rng = np.random.default_rng(5)
    x, same, other = (
        rng.normal(size=(150, 6)),
        rng.normal(size=(150, 6)),
        rng.normal(size=(150, 6)) + 0.6,
    )
    near = distances.mmd2(x, same, distances.polynomial_kernel, resamples=200)
    far = distances.mmd2(x, other, distances.polynomial_kernel, resamples=200)
    assert near.low < 0 < near.high and far.low > near.high and far.low < far.value < far.high
    for pair in ((x, same), (x, other)):
        estimate = distances.fid(*pair, resamples=30)
        assert estimate.low < distances.fid(*pair).value < estimate.high
    assert distances.fid(x, other, resamples=30).low > distances.fid(x, same, resamples=30).high


def test_the_interval_of_mmd_has_the_spread_of_fresh_draws():
    rng = np.random.default_rng(6)
    draws = [(rng.normal(size=(60, 3)), rng.normal(size=(60, 3)) + 0.8) for _ in range(150)]
    values = [distances.mmd2(x, y, distances.polynomial_kernel).value for x, y in draws]
    estimates = [
        distances.mmd2(x, y, distances.polynomial_kernel, resamples=60) for x, y in draws[:40]
    ]
    reach = np.mean([(e.high - e.low) / 2 for e in estimates])
    assert reach == pytest.approx(1.96 * np.std(values), rel=0.35)


def test_precision_and_recall_equal_a_loop_over_all_pairs(monkeypatch):
    monkeypatch.setattr(distances, "_BLOCK", 7)
    x, y = two_sets(n=24, m=30, width=3)
    for k in (1, 3):

        def inside(points, centres, k=k):
            others = [[o for j, o in enumerate(centres) if j != i] for i in range(len(centres))]
            radii = [
                sorted(np.linalg.norm(c - o) for o in rest)[k - 1]
                for c, rest in zip(centres, others, strict=True)
            ]
            return [
                any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True))
                for p in points
            ]

        precision, recall = distances.precision_recall(x, y, k)
        assert precision.tolist() == inside(x, y) and recall.tolist() == inside(y, x)
        assert 0 < precision.mean() < 1 or 0 < recall.mean() < 1
    precision, recall = distances.precision_recall(x, x + 1e4)
    assert not precision.any() and not recall.any()
    assert all(np.all(part) for part in distances.precision_recall(x, x))


def test_copies_of_one_picture_have_precision_without_recall():
    real = np.random.default_rng(2).normal(size=(50, 4))
    precision, recall = distances.precision_recall(np.repeat(real[:1], 50, axis=0), real)
    assert precision.all() and recall.mean() < 0.1


def test_clip_score_is_100_cosine_and_never_negative():
    image, text = (
        np.array([[3.0, 4.0], [4.0, 3.0], [1.0, 0.0]]),
        np.array([[3.0, 4.0], [3.0, 4.0], [-2.0, 0.1]]),
    )
    np.testing.assert_allclose(distances.clip_score(image, text), [100, 96, 0])


def test_mean_interval_is_the_normal_one_for_many_values_and_leaves_out_nan():
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 3.0, size=4000)
    estimate = intervals.mean_interval(np.concatenate([values, [np.nan] * 500]))
    reach = 1.96 * values.std() / np.sqrt(4000)
    assert estimate.value == pytest.approx(values.mean(), rel=RTOL)
    assert estimate.high - estimate.value == pytest.approx(reach, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(reach, rel=0.1)


def test_mean_interval_holds_the_truth_in_19_of_20_draws():
    rng = np.random.default_rng(1)
    held = [
        e.low <= 0.3 <= e.high
        for e in (intervals.mean_interval(rng.random(80) < 0.3, 500) for _ in range(300))
    ]
    assert 0.9 < np.mean(held) < 0.985


def test_bad_input_is_refused_in_one_line():
    x, y = two_sets()
    for call in (
        lambda: intervals.mean_interval(np.array([np.nan])),
        lambda: distances.mmd2(x[:1], y, distances.polynomial_kernel),
        lambda: distances.precision_recall(x[:3], y),
        lambda: distances.fid(x[:1], y),
        lambda: extract(lambda a: a, []),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)


EIGHT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from contextdiff_jax.evaluation.features import extract
images = np.random.default_rng(0).integers(0, 256, (13, 4, 4, 3), dtype=np.uint8)
shapes = []
def fn(x):
    shapes.append((x.shape[0], len(x.sharding.device_set)))
    return jnp.stack([x.astype(jnp.float32).mean((1, 2, 3)), x[:, 0, 0, 0].astype(jnp.float32)], -1)
features = extract(fn, images, batch_size=5)
print(json.dumps([features.tolist(), shapes]))
"""


def test_features_in_padded_batches_over_8_devices_are_each_picture_s_own():
    environment = os.environ | {
        **ON_EIGHT,
        "JAX_PLATFORMS": "cpu",
    }
    out = subprocess.run(
        [sys.executable, "-c", EIGHT],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    features, shapes = json.loads(out.stdout)
    images = np.random.default_rng(0).integers(0, 256, (13, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        features, np.stack([images.mean((1, 2, 3)), images[:, 0, 0, 0]], -1), rtol=1e-6
    )
    assert shapes == [[8, 8], [8, 8]]


BAD = {
    "fid": distances.fid,
    "kid": distances.kid,
    "mmd2": lambda x, y: distances.mmd2(x, y, distances.polynomial_kernel),
    "cmmd": distances.cmmd,
    "precision_recall": distances.precision_recall,
    "clip_score": lambda x, y: distances.clip_score(x, y[: len(x)]),
    "cosines": lambda x, y: distances.cosines(x, y[: len(x)]),
    "moments": lambda x, y: (Moments.of(x), Moments.of(y)),
}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("which", [0, 1])
def test_features_that_are_not_finite_are_refused_and_counted(name, value, which):
    """One picture of 60 with a nan gave a precision of 0.95, and fell out of the CLIP score."""
    sets = two_sets()
    sets[which][17, 3] = value
    with pytest.raises(ValueError, match="1 of (60|80) rows hold values .* the first is row 17"):
        BAD[name](*sets)


def test_networks_and_means_that_are_not_finite_are_refused():
    rows = np.ones((5, 3), np.float32)
    with pytest.raises(ValueError, match="logits: 5 of 5 rows"):
        extract(lambda batch: batch * np.nan, rows, label="logits")
    with pytest.raises(ValueError, match="image: row 2 is all 0"):
        distances.cosines(rows * (np.arange(5) != 2)[:, None], rows)
    with pytest.raises(ValueError, match="infinite"):
        intervals.mean_interval([1.0, np.inf, np.nan])
    clip = np.zeros((1, 16, 16, 3), np.uint8)
    for metric in (edit_scores.psnr, edit_scores.ssim):
        with pytest.raises(ValueError, match="not finite"):
            metric(np.where(clip == 0, np.nan, clip), clip)
