"""Numbers said about edited clips, and the clips whose true edits are known: no model, no JAX."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_data import film

from contextdiff_jax.data.moving_shapes import (
    EDITS,
    frames_of,
    make_moving_shape,
    mask_of,
    write_clip,
)
from contextdiff_jax.data.shapes import caption
from contextdiff_jax.data.video import read_clip
from contextdiff_jax.evaluation import edit_scores as scores
from contextdiff_jax.evaluation.composition import check
from contextdiff_jax.evaluation.true_edits import (
    changed_region,
    paired,
    score_edit,
    score_true_clip,
)


def test_psnr_and_ssim_are_their_definitions():
    clip = film(2)
    noisy = np.clip(
        clip.astype(int) + np.random.default_rng(0).integers(-9, 10, clip.shape), 0, 255
    ).astype(np.uint8)
    mse = ((clip.astype(float) - noisy) ** 2).mean()
    assert scores.psnr(noisy, clip) == pytest.approx(10 * np.log10(255**2 / mse))
    assert scores.psnr(clip, clip) == float("inf")
    where = np.zeros(clip.shape[:3], bool)
    where[:, :5] = True
    assert scores.psnr(noisy, clip, where) == pytest.approx(scores.psnr(noisy[:, :5], clip[:, :5]))
    with pytest.raises(ValueError, match="no pixel"):
        scores.psnr(clip, clip, np.zeros_like(where))
    # One window by hand: the centre of an 11 x 11 neighbourhood.
    place = np.arange(-5, 6)
    kernel = np.exp(-(place**2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    a, b = (c[0, 10:21, 20:31, 1].astype(float) for c in (clip, noisy))
    ma, mb = (kernel * a).sum(), (kernel * b).sum()
    va, vb, cov = (
        (kernel * a * a).sum() - ma**2,
        (kernel * b * b).sum() - mb**2,
        (kernel * a * b).sum() - ma * mb,
    )
    c1, c2 = 6.5025, 58.5225
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert scores.ssim_map(clip[0], noisy[0])[15, 25, 1] == pytest.approx(expected, rel=1e-6)
    assert scores.ssim(clip, clip) == pytest.approx(1)


def test_the_warping_error_follows_the_motion():
    clip = film(4, 64, 96)
    still = ((clip[1:].astype(float) - clip[:-1]) ** 2).mean() / 255**2
    assert scores.warping_error(clip) < 0.05 * still
    flicker = clip.astype(int) + np.array([0, 40, 0, 40])[:, None, None, None]
    assert scores.warping_error(
        np.clip(flicker, 0, 255).astype(np.uint8), clip
    ) > 20 * scores.warping_error(clip)
    assert np.isnan(scores.warping_error(clip[:1]))


@pytest.mark.parametrize("seed", range(6))
def test_moving_shapes_are_what_their_captions_say_and_move(seed):
    moving = make_moving_shape(seed)
    clip = frames_of(moving.scenes, 16)
    assert len(np.unique(clip.reshape(8, -1), axis=0)) >= 3
    for name in EDITS:
        edited = frames_of(moving.edited[name], 16)
        assert caption(moving.edited[name][0]) != moving.prompt
        assert all(
            check(frame, scene)["exact"]
            for frame, scene in zip(edited, moving.edited[name], strict=True)
        )
        outside = ~mask_of(clip, edited)
        np.testing.assert_array_equal(clip[outside], edited[outside])
        assert 0.3 < outside.mean() < 0.98


def test_the_true_edit_has_full_marks_and_the_source_none():
    moving = make_moving_shape(3)
    for name in EDITS:
        right = score_edit(frames_of(moving.edited[name], 16), moving, name)
        assert right == {
            "changed": 1,
            "kept": 1,
            "motion": 1,
            "exact": 1,
            "background_psnr": 100,
            "psnr": 100,
        }
        unedited = score_edit(frames_of(moving.scenes, 16), moving, name)
        assert (
            unedited["changed"] == unedited["exact"] == 0
            and unedited["kept"] == unedited["motion"] == 1
        )
        still = np.repeat(frames_of(moving.edited[name], 16)[:1], 8, axis=0)
        assert score_edit(still, moving, name)["motion"] < 1
        assert score_edit(still, moving, name)["background_psnr"] < 40
        assert score_edit(np.full_like(still, 33), moving, name)["exact"] == 0


def test_paired_differences_have_the_standard_error_of_their_mean():
    row = paired({"x": [1, 2, 4]}, {"x": [0, 2, 1]})["x"]
    assert row["difference"] == pytest.approx(4 / 3)
    assert row["standard_error"] == pytest.approx(np.sqrt(7 / 3) / np.sqrt(3))


def test_the_clip_is_written_with_its_prompts(tmp_path):
    facts = write_clip(tmp_path, seed=3, num_frames=3)
    assert facts == json.loads((tmp_path / "clip.json").read_text())
    assert facts["prompt"] == make_moving_shape(3).prompt
    np.testing.assert_array_equal(
        read_clip(tmp_path / "shape", num_frames=3),
        frames_of(make_moving_shape(3, 3).edited["shape"], 16),
    )


def hand_made_clips():
    """(source, true edit): a square that moves, dark in one and red in the other."""
    source = np.full((3, 32, 32, 3), 255, np.uint8)
    true = source.copy()
    for i in range(3):
        source[i, 8:20, 4 + 3 * i : 16 + 3 * i] = (40, 40, 40)
        true[i, 8:20, 4 + 3 * i : 16 + 3 * i] = (200, 40, 40)
    return source, true


def test_an_edit_that_does_nothing_gains_nothing_and_the_true_one_has_full_marks():
    source, true = hand_made_clips()

    def answers(clip):
        red = (clip[..., 0].astype(int) - clip[..., 1] > 80).any((1, 2))
        return {"colour": red.astype(int), "number": np.zeros(len(clip), int)}

    idle, full = (score_true_clip(c, source, true, answers) for c in (source, true))
    assert idle["gain"] == 0 and idle["attribute"] == 0 and idle["kept_psnr"] == 100
    assert idle["changed_psnr"] == pytest.approx(10 * np.log10(255**2 * 3 / 160**2))
    assert full["attribute"] == 1 and full["psnr"] == full["kept_psnr"] == 100
    assert full["warping_error"] == 0 and full["gain"] == 100 - idle["changed_psnr"]
    half = source.copy()
    half[:2] = true[:2]
    assert score_true_clip(half, source, true, answers)["attribute"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="must differ from the source somewhere"):
        changed_region(source, source)


def test_distances_are_scored_where_the_true_edit_differs_and_elsewhere():
    source, true = hand_made_clips()
    region = changed_region(source, true)

    def distance(pictures, others):  # of the blue channel
        maps = np.abs(pictures[..., 2].astype(float) - others[..., 2])
        return maps.mean((1, 2)), maps

    clip = true.copy()
    clip[..., 2] = np.where(region, 47, 250)
    scores = score_true_clip(clip, source, true, None, {"blue": distance})
    assert (scores["changed_blue"], scores["kept_blue"]) == (7, 5)


def test_pairs_without_an_answer_are_left_out():
    row = paired({"a": [1.0, np.nan, 5.0]}, {"a": [0.0, 2.0, 2.0]})["a"]
    assert (row["first"], row["second"], row["difference"]) == (3.0, 1.0, 2.0)
