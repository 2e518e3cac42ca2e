"""Decoding: crops and sizes, and that a picture comes out as a viewer shows it."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from small_data import encode_picture

from contextdiff_jax.benchmarks.source_layouts import make_pictures
from contextdiff_jax.data import DataConfig, make_source
from contextdiff_jax.data.decoding import UNDECODABLE, decode, open_picture, picture_size, shown
from contextdiff_jax.data.kept_arrays import kept_array

# -------------------- crops and sizes


def test_a_random_crop_moves_over_the_longer_side_only_and_the_centre_is_the_middle():
    ramp = np.broadcast_to(np.arange(96)[None, :, None], (32, 96, 3))  # the level is the column
    data = encode_picture(ramp)
    assert np.abs(decode(data, (32, 32))[:, 0, 0].astype(int) - 32).max() <= 1
    assert np.abs(decode(data, (32, 32), (0.9, 0.0))[:, 0, 0].astype(int)).max() <= 1
    assert np.abs(decode(data, (32, 32), (0.0, 1.0))[:, -1, 0].astype(int) - 95).max() <= 1


def test_random_crops_change_with_the_epoch_and_come_again_with_the_seed(tmp_path):
    (tmp_path / "0.png").write_bytes(
        encode_picture(np.random.default_rng(0).integers(0, 255, (16, 160, 3)))
    )
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n')
    shared = {"source": "folder", "path": str(tmp_path), "image_size": 16, "crop": "random"}
    source = make_source(DataConfig(**shared, seed=1))
    images = [source.record(0, epoch)["image"] for epoch in range(4)]
    assert len({image.tobytes() for image in images}) == 4
    np.testing.assert_array_equal(
        make_source(DataConfig(**shared, seed=1)).record(0, 2)["image"], images[2]
    )
    assert (make_source(DataConfig(**shared, seed=2)).record(0, 2)["image"] != images[2]).any()


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 40), (63, 47), (200, 200)])
def test_pictures_of_any_shape_come_out_at_the_very_size_asked_for(size):
    for shape in ((48, 64), (64, 48), (1, 300), (300, 2), (525, 700)):
        image = decode(encode_picture(np.full((*shape, 3), 77)), size)
        assert image.shape == (*size, 3) and (image == 77).all()


@pytest.mark.parametrize(("height", "width"), [(512, 512), (525, 700), (1024, 768)])
def test_reduced_jpeg_decoding_is_the_full_decoding_to_40_decibels(height, width):
    ((data, _),) = make_pictures(1, height, width, seed=height)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    side, (left, top) = (
        min(height, width),
        ((width - min(height, width)) / 2, (height - min(height, width)) / 2),
    )
    box = (left, top, left + side, top + side)
    expected = np.asarray(picture.resize((256, 256), Image.Resampling.LANCZOS, box=box)).astype(
        float
    )
    error = np.mean((decode(data, (256, 256)) - expected) ** 2)
    assert 10 * np.log10(255**2 / error) > 40


# -------------------- what a viewer shows


RED, GREEN, BLUE, GREY = (230, 20, 20), (20, 200, 20), (20, 20, 230), (128, 128, 128)


# EXIF orientation -> colours at the corners (upper left, upper right, lower left, lower right) of a
# picture that is stored as red, green, blue, grey: the table of the standard, CIPA DC-008.
CORNERS = {
    1: (RED, GREEN, BLUE, GREY),
    2: (GREEN, RED, GREY, BLUE),
    3: (GREY, BLUE, GREEN, RED),
    4: (BLUE, GREY, RED, GREEN),
    5: (RED, BLUE, GREEN, GREY),
    6: (BLUE, RED, GREY, GREEN),
    7: (GREY, GREEN, BLUE, RED),
    8: (GREEN, GREY, RED, BLUE),
}


QUARTERS = np.repeat(np.repeat(np.uint8([[RED, GREEN], [BLUE, GREY]]), 32, 0), 48, 1)  # 64 x 96


def _saved(pixels, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _corners(image) -> np.ndarray:
    return image[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_every_orientation_is_shown_upright(kind):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    for orientation, corners in CORNERS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = _saved(QUARTERS, kind, exif=exif, **options)
        height, width = (64, 96) if orientation < 5 else (96, 64)
        assert picture_size(data) == (height, width)
        viewer = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(np.asarray(shown(open_picture(data))), np.asarray(viewer))
        np.testing.assert_array_equal(decode(data, (height, width)), np.asarray(viewer))
        small = decode(data, (height // 4, width // 4))  # a JPEG is decoded at a quarter
        assert np.abs(_corners(small) - corners).max() < 12, orientation


def test_a_portrait_photograph_that_is_stored_lying_is_in_the_portrait_bucket(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(_saved(QUARTERS, "JPEG", exif=exif))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n')
    source = make_source(DataConfig(source="folder", path=str(tmp_path)))
    stale = kept_array(  # as it was kept before orientations were read
        str(tmp_path), "", "sizes", source.cache_key(), lambda: (np.uint16([[64, 96]]), {})
    )
    assert stale[0].tolist() == [[64, 96]] and source.picture_sizes().tolist() == [[96, 64]]
    assert np.abs(_corners(source.record(0, size=(48, 32))["image"]) - CORNERS[6]).max() < 12


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_picture_with_damaged_exif_is_shown_as_it_is_stored(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = _saved(QUARTERS, kind, exif=exif)
        assert picture_size(data) == (64, 96)
        assert np.abs(_corners(decode(data, (64, 96))) - CORNERS[1]).max() < 12


RAMP = (np.arange(64, dtype=np.uint16) * 1024)[None].repeat(4, 0)


@pytest.mark.parametrize(
    ("pixels", "kind", "options", "expected"),
    [
        (RAMP, "PNG", {}, RAMP >> 8),
        (RAMP, "TIFF", {}, RAMP >> 8),
        (RAMP.astype(">u2"), "TIFF", {}, RAMP >> 8),
        (RAMP, "TIFF", {"tiffinfo": {262: 0}}, (65535 - RAMP) >> 8),  # white is 0
        (RAMP, "JPEG2000", {}, RAMP >> 8),
        (RAMP, "PPM", {}, RAMP >> 8),
        (RAMP // 256, "PPM", {}, RAMP >> 16),  # dark, but of 16 bits
        (RAMP.astype(np.int32), "TIFF", {}, RAMP >> 8),
        ((RAMP >> 8).astype(np.int32), "TIFF", {}, RAMP >> 8),
        ((RAMP / 65535).astype(np.float32), "TIFF", {}, np.rint(RAMP / 257)),
        ((RAMP >> 8).astype(np.float32), "TIFF", {}, RAMP >> 8),
    ],
)
def test_deep_grey_comes_out_as_the_grey_that_it_is(pixels, kind, options, expected):
    image = decode(_saved(pixels, kind, **options), (4, 64))
    np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize("values", [RAMP * 1e6, RAMP / 60000, RAMP / -65535, RAMP * np.nan])
def test_grey_of_an_unknown_scale_is_refused_with_its_values(values):
    with pytest.raises(ValueError, match=r"grey values from .* must be fractions in 0..1"):
        decode(_saved(values.astype(np.float32), "TIFF"), (4, 64))


def test_every_kind_of_transparency_lies_on_white():
    grey = (RAMP >> 8).astype(np.uint8)
    clear = np.repeat((grey == 40)[..., None], 3, -1)
    alpha = np.where(grey == 40, 0, 255).astype(np.uint8)
    expected = np.where(clear, 255, grey[..., None])
    palette = Image.fromarray(grey).convert("P")
    files = [
        _saved(np.dstack([grey, alpha])),
        _saved(np.dstack([grey, grey, grey, alpha]), "WEBP", lossless=True),
        _saved(grey, transparency=40),
        _saved(np.dstack([grey] * 3), transparency=(40, 40, 40)),
        _saved(RAMP, transparency=40 << 8),
    ]
    for kind in ("PNG", "GIF"):
        file = io.BytesIO()
        palette.save(file, kind, transparency=40)
        files.append(file.getvalue())
    for data in files:
        np.testing.assert_array_equal(decode(data, (4, 64)), expected)


def test_the_limit_of_pixels_is_the_configs_and_pillows_is_off(tmp_path, monkeypatch):
    """195 million pixels, as a scanned map has, are decoded at a size near the wanted one."""
    data = _saved(np.full((13000, 15000), 90, np.uint8), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**26)  # near Pillow's own
    assert picture_size(data) == (13000, 15000) and (decode(data, (8, 8)) == 90).all()
    (tmp_path / "a.png").write_bytes(_saved(QUARTERS))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    config = DataConfig(source="folder", path=str(tmp_path), max_pixels=64 * 96)
    assert make_source(config)[0]["image"].shape == (32, 32, 3)
    small = make_source(dataclasses.replace(config, max_pixels=64 * 96 - 1))
    with pytest.raises(ValueError, match=r"96 x 64 pixels; 1 to 6143 are read \(data.max_pixels"):
        small[0]
    with pytest.raises(ValueError, match="data.max_pixels=0: must be at least 1"):
        make_source(dataclasses.replace(config, max_pixels=0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_a_picture_that_is_cut_off_is_never_given_out(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as tfds may leave it
    data = _saved(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), kind)
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(UNDECODABLE):
            decode(data[: int(share * len(data))], (64, 64))
