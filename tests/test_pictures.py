"""Grids, PNG metadata, curves."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from contextdiff_jax.runtime.pictures import caption_grid, plot_curves, read_png_metadata, save_png

RED = np.tile(np.uint8([200, 10, 10]), (16, 16, 1))


def test_a_grid_shows_every_picture_enlarged_with_its_caption_under_it():
    images = np.stack([RED, 255 - RED, RED])
    grid = np.asarray(
        caption_grid(
            images, ["a red one", "a much longer caption that must be wrapped twice", ""], columns=2
        )
    )
    assert (grid == RED[0, 0]).all(-1).sum() == 2 * 128 * 128  # two red cells of 128 pixels
    under_first = grid[12 + 128 + 4 : 12 + 128 + 24, 12 : 12 + 128]
    assert (under_first < 100).any() and (under_first > 200).any()  # dark text on white


def test_a_grid_refuses_unequal_counts():
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        caption_grid(RED[None], ["a", "b"])


def test_a_png_carries_how_it_was_made(tmp_path):
    save_png(RED, tmp_path / "a.png", {"prompt": "größer, 大", "seed": 3})
    assert read_png_metadata(tmp_path / "a.png") == {"prompt": "größer, 大", "seed": "3"}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), RED)


def test_the_picture_and_the_mask_of_an_edit_are_read_as_viewers_show_them(tmp_path):
    from contextdiff_jax.pretrained.command import _read

    ramp, exif = np.arange(0, 250, 10, dtype=np.uint8)[None].repeat(8, 0), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(ramp.astype(np.uint16) << 8).save(tmp_path / "deep.png")
    Image.fromarray(ramp > 120).save(tmp_path / "bits.png")
    viewer = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert viewer.shape == (25, 8)
    for mode, flag in (("RGB", "image"), ("L", "mask")):
        for name, expected in (
            ("a", viewer),
            ("deep", ramp),
            ("bits", np.where(ramp > 120, 255, 0)),
        ):
            image = np.asarray(_read(str(tmp_path / f"{name}.png"), mode, None, flag))
            np.testing.assert_array_equal(image if mode == "L" else image[..., 0], expected)
    (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:45])
    with pytest.raises(ValueError, match="--mask=.*cut.png: can't be read as a picture") as error:
        _read(str(tmp_path / "cut.png"), "L", (16, 16), "mask")
    assert "\n" not in str(error.value)


def test_curves_are_drawn_from_the_log_and_change_with_it(tmp_path):
    log, out = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    rows = [
        {"step": i, "loss": 1 / i, "loss_q1": 2 / i, "context_gain": 0.1 * i} for i in range(1, 20)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_curves(log, out)
    first = np.asarray(Image.open(out))
    assert first.std() > 5 and not out.with_name("curves.png.partial").exists()
    log.write_text(
        log.read_text() + json.dumps({"step": 20, "loss": 9.0, "context_gain": 0.5}) + "\n"
    )
    plot_curves(log, out)
    assert not np.array_equal(first, np.asarray(Image.open(out)))
