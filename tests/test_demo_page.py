"""The web page in a headless Chromium, end to end."""

from __future__ import annotations

import asyncio
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from demo_browser import PATIENCE, commanded, draw, said, served, visited
from hostile_files import picture, write_all
from PIL import Image

from contextdiff_jax.demo_page.components import Drawings, File, MaskEditor, UploadButton
from contextdiff_jax.demo_page.limits import MAX_STROKES
from contextdiff_jax.demo_page.server import check_password


def test_what_browsers_send_beside_uploads_is_bounded_and_no_address_is_fetched():
    drawings = Drawings(most=2)
    for kind, index, name in (
        ("background", "null", "a"),
        ("composite", "null", "a"),
        ("layer", "1000000000", "a"),
        ("layer", "0", "b"),
        ("layer", "0", "c"),
        ("layer", "0", "d"),
    ):
        drawings.accept(kind, index, name, name.encode())
    assert [drawings.find(name) for name in "abcd"] == [None, None, b"c", b"d"]
    with pytest.raises(ValueError, match="too large"):
        drawings.accept("layer", "0", "e", bytes(MAX_STROKES + 1))
    for component in (File(), UploadButton(), MaskEditor()):
        with pytest.raises(ValueError, match="from uploads alone"):
            asyncio.run(component.async_move_resource_to_block_cache("HTTP://127.0.0.1:9/a.png"))
    assert MaskEditor().preprocess(None) == []


def test_only_the_password_opens_the_page():
    check = check_password("open sesame, größer")
    assert check("anyone", "open sesame, größer") and not check("anyone", "")
    assert not check("open sesame, größer", "open sesame")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("files")) as address:
        yield address


def test_type_click_see_download_and_restore(address, tmp_path):
    """And the browser asks no other host for anything."""
    with visited(address) as (page, foreign):
        page.wait_for_selector("#draw")
        assert "step 9 of tiny" in page.inner_text("#top")
        assert "has 10,000 characters; at most 1,000" in draw(page, "x" * 10_000)
        page.fill("#seed textarea, #seed input", "18446744073709551615")
        assert draw(page, "a large red circle").startswith("Done in")
        assert page.locator("#stage figcaption b").all_inner_texts() == [
            "with context",
            "plain diffusion",
        ]
        pixels = []
        for i in range(2):
            with page.expect_download() as download:
                page.locator("#stage a[download]").nth(i).click()
            download.value.save_as(tmp_path / f"{i}.png")
            with Image.open(tmp_path / f"{i}.png") as image:
                pixels.append(np.asarray(image))
                assert image.text["seed"] == "18446744073709551615"
                assert image.text["prompt"] == "a large red circle"
        assert pixels[0].shape == (16, 16, 3) and (pixels[0] != pixels[1]).any()
        page.fill("#prompt textarea", "something else")
        page.fill("#seed textarea, #seed input", "1")
        plain = page.locator("#gallery button.thumbnail-lg").nth(1)
        assert said(page, plain.click).startswith("Restored the settings of “a large red circle”")
        assert page.input_value("#prompt textarea") == "a large red circle"
        assert page.input_value("#seed textarea, #seed input") == "18446744073709551615"
        assert page.input_value("#gain input[type=number]") == "0"
        assert foreign == []


def choose(page, file, where="#picture-file"):
    """Chooses a file, in the place of the one before."""
    clear = page.locator(f"{where} button[aria-label='Clear']")
    if clear.count():
        clear.click()
    page.set_input_files(f"{where} input[type=file]", file)


@pytest.mark.slow
def test_a_picture_to_start_from_is_masked_and_hostile_ones_are_refused(address, tmp_path):
    files = write_all(tmp_path)
    (tmp_path / "good.png").write_bytes(picture(side=300))
    refusals = {
        "huge.png": "too large: 30000 x 30000 pixels",
        "drawing.svg": "a PNG, JPEG or WebP is wanted",
        "cut.jpg": "damaged or cut off",
        "long.gif": "a PNG, JPEG or WebP is wanted",
    }
    with visited(address) as (page, foreign):
        page.click("#begin label:has-text('a picture')")
        for name, words in refusals.items():
            page.set_input_files("#picture-file input[type=file]", files[name])
            page.wait_for_selector(f"#status .error:has-text('{words}')")
            page.click(
                "#picture-file button[aria-label='Clear'], #picture-file .label-clear-button"
            )
            page.wait_for_selector("#picture-file input[type=file]", state="attached")
        assert "no picture to start from yet" in draw(page, "a large red circle")
        assert said(page, lambda: choose(page, tmp_path / "good.png")).startswith("Draw over")
        assert "Done from your picture" in draw(page, "a large red circle")
        box = page.locator("#editor canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 60, y)
        page.mouse.down()
        page.mouse.move(x + 60, y + 20, steps=8)
        page.mouse.up()
        page.wait_for_timeout(1000)  # the drawing is sent
        for _ in range(2):
            assert "Done by inpainting" in draw(page, "a small blue square")
        assert foreign == []


@pytest.mark.slow
def test_the_command_asks_for_a_password_edits_a_clip_and_stops(tmp_path):
    """The whole way of a run that was trained, by the command itself."""
    files = write_all(tmp_path)
    with tarfile.open(ROOT / "tests/saved_run/run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    run = f"--workdir={tmp_path / 'run'}"
    with commanded(run, CONTEXTDIFF_PASSWORD="open sesame") as address:
        with visited(address) as (page, foreign):
            page.fill("input[type=password]", "wrong")
            page.locator("input:not([type=password])").first.fill("anyone")
            page.click("button:has-text('Login')")
            page.wait_for_selector("text=Incorrect")  # and Gradio empties the form
            page.locator("input:not([type=password])").first.fill("anyone")
            page.fill("input[type=password]", "open sesame")
            page.click("button:has-text('Login')")
            page.wait_for_selector("#draw")
            page.click("role=tab[name='Clips']")
            for name in ("long.gif", "huge.png", "list.mp4"):
                file = files[name]
                said(page, lambda file=file: choose(page, file, "#clip-file"), "#clip-status")
            page.click("#example")
            page.wait_for_selector("#clip-stage img")
            page.set_default_timeout(5 * PATIENCE)
            done = said(page, lambda: page.click("#edit"), "#clip-status")
            assert "gives the clip back at" in done
            assert page.locator("#clip-stage img").count() == 3
            assert foreign == []
