"""Folders of pictures against each other: each picture as the packages prepare it, all of them in
bounded memory, and what is written is what was made.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from contextdiff_jax.evaluation import distances, folders
from contextdiff_jax.evaluation.features import Moments
from contextdiff_jax.evaluation.folders import RESIZES, Looking, Statistics

SIZES = [(40, 56), (64, 64), (299, 299), (331, 300)]


def picture(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def tensor(image):
    return torch.tensor(image).permute(2, 0, 1)[None].float()


def nhwc(found):
    return found[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_resized_as_pytorch_fid_does(size):
    image = picture(size)
    x = F.interpolate(tensor(image), (299, 299), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(RESIZES["pytorch-fid"](image), nhwc(x / 127.5 - 1), atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_resized_as_torch_fidelity_does(size):
    """TensorFlow 1's: place i of the result is i * size / 299 of the picture; by a grid of torch's,
    in which -1 and 1 are the outer places.
    """
    image, axes = picture(size), []
    for side in size:
        places = torch.arange(299, dtype=torch.float64) * (side / 299)
        axes.append(2 * places / (side - 1) - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
    options = dict(mode="bilinear", padding_mode="border", align_corners=True)
    x = F.grid_sample(tensor(image).double(), grid, **options)
    wanted = nhwc((x - 128) / 128)
    np.testing.assert_allclose(RESIZES["torch-fidelity"](image), wanted, atol=2e-4)


def test_pictures_are_resized_as_clean_fid_does():
    """PIL's antialiased bicubic in float: of a picture of 299 itself, and never rounded."""
    image = picture((299, 299))
    np.testing.assert_allclose(RESIZES["clean-fid"](image), (image - 128.0) / 128, atol=1e-6)
    small = picture((64, 64))
    x = F.interpolate(tensor(small), (299, 299), mode="bicubic", align_corners=False)
    inner = slice(8, -8)  # at the border PIL leaves out what torch repeats; a = -0.5 and -0.75
    found = RESIZES["clean-fid"](small)
    assert found.shape == (299, 299, 3) and found.dtype == np.float32
    assert np.abs(found[inner, inner] - nhwc((x - 128) / 128)[inner, inner]).mean() < 0.05
    assert len(np.unique(found)) > 10_000


@pytest.fixture
def looking(monkeypatch):
    """Three features of a picture, by no network; batches of four."""
    monkeypatch.setattr(folders, "_BATCH", 4)

    def prepare(image):
        return image.astype(np.float32).reshape(-1, 3).mean(0) / 255

    return Looking("means", prepare, lambda batch: batch)


@pytest.fixture
def two(tmp_path):
    """Folders of 11 and 9 pictures of several sizes, some in a folder inside."""
    rng = np.random.default_rng(0)
    for name, count, lift in (("samples", 11, 0), ("real", 9, 60)):
        for i in range(count):
            folder = tmp_path / name / ("more" if i % 3 == 0 else "")
            folder.mkdir(parents=True, exist_ok=True)
            image = rng.integers(0, 190, (*rng.integers(5, 12, 2), 3)) + lift
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "samples", tmp_path / "real"


def all_features(folder):
    files = sorted(folder.rglob("*.png"))
    images = [np.asarray(Image.open(file), np.float64) for file in files]
    return np.array([image.reshape(-1, 3).mean(0) / 255 for image in images])


def test_the_distances_are_those_of_all_features_at_once(two, looking):
    found = folders.compare(["kid", "fid"], *map(str, two), {"features": looking})
    x, y = map(all_features, two)
    wanted = distances.frechet_distance(Moments.of(x), Moments.of(y))
    assert list(found) == ["kid", "fid"] and wanted > 0.01
    assert found["fid"].value == pytest.approx(wanted, rel=1e-5)
    assert found["kid"].value == pytest.approx(distances.kid(x, y)[0], rel=1e-4)


def test_statistics_are_taken_up_and_others_are_refused(two, looking, tmp_path):
    file = tmp_path / "real.safetensors"
    first = folders.compare(["fid"], *map(str, two), {"features": looking}, save=file)
    again = folders.compare(["fid"], str(two[0]), str(file), {"features": looking})
    assert first == again and Statistics.load(file).moments.count == 9
    other = Looking("others", looking.prepare, looking.features)
    with pytest.raises(ValueError, match="by means; must be by others"):
        folders.compare(["fid"], str(two[0]), str(file), {"features": other})
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no statistics of pictures"):
        Statistics.load(file)


def test_features_are_kept_up_to_a_number_and_moments_are_of_all(two, looking, monkeypatch):
    monkeypatch.setattr(folders, "KEPT", 5)
    found = folders.look(two[0], looking)
    assert found.kept.shape == (5, 3) and found.moments.count == 11
    rows = {tuple(np.round(row, 5)) for row in all_features(two[0])}
    assert {tuple(np.round(row.astype(float), 5)) for row in found.kept} <= rows


def test_a_folder_without_pictures_and_a_broken_picture_are_one_line(two, looking, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        folders.look(tmp_path / "nowhere", looking)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="0 pictures"):
        folders.look(tmp_path / "empty", looking)
    (two[0] / "bad.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match="bad.png: "):
        folders.look(two[0], looking)
    with pytest.raises(ValueError, match="holds one network's"):
        folders.compare(["fid", "cmmd"], "", "", {}, save=tmp_path / "x.safetensors")
