"""The parts of the web page, without a browser: what is asked for, sent, made, and refused."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import tarfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALLEST, config_dict, one_line, random_params
from hostile_files import picture, write_all
from PIL import Image, ImageFile

from contextdiff_jax import Pipeline
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.demo_page import limits, uploads
from contextdiff_jax.demo_page.album import Album, is_full
from contextdiff_jax.demo_page.clips import ClipStudio, ClipWish, encoded
from contextdiff_jax.demo_page.guard import HEADERS, Guard
from contextdiff_jax.demo_page.studio import Studio, enlarged
from contextdiff_jax.demo_page.wishes import Wish
from contextdiff_jax.demo_page.worker import Stopped, Worker
from contextdiff_jax.inference.gain import largest_gain, with_gain
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.runtime.pictures import encode_png
from contextdiff_jax.settings import parse

WISH = Wish(prompt="a large red circle", steps=4, guidance=2.0, seed=2**64 - 1)
WATCHED = {"callback": lambda step, x0: None}  # the same program as the page's


@pytest.fixture(scope="module")
def pipeline():
    """A tiny model whose context is half as large as it can be."""
    settings = parse(config_dict(**SMALLEST, **{"context.estimate": "posterior_mean"}))
    params = random_params(settings)
    params["context"]["gamma"][...] = jnp.arctanh(jnp.asarray(0.5))
    return of_run(settings, load_tokenizer(), params)


@pytest.fixture(scope="module")
def studio(pipeline):
    return Studio(pipeline, Worker(), "a test")


# What is asked for.


def test_a_picture_s_text_gives_back_the_wish_that_it_was_made_for(tmp_path):
    """To the last bit of seed and numbers, and in any writing."""
    wish = dataclasses.replace(
        WISH, prompt='a "red" <b>circle</b>, größer 圓', negative="x" * 900, gain=0.35
    )
    png = tmp_path / "a.png"
    png.write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8), wish.metadata))
    assert Wish.of_metadata(uploads.read_metadata(str(png)), WISH) == wish


def test_a_picture_of_the_command_sample_is_restored_too_and_one_without_text_is_not():
    texts = {"prompt": "a cat", "seed": "7", "index": "0", "steps": "9", "context_scale": "0.0"}
    assert Wish.of_metadata(texts, WISH) == dataclasses.replace(
        WISH, prompt="a cat", seed=7, steps=9, gain=0.0
    )
    with pytest.raises(ValueError, match="carries no settings"):
        Wish.of_metadata({"Software": "a camera"}, WISH)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("prompt", "x" * 10_000, "has 10,000 characters; at most 1,000"),
        ("negative", "x" * 10_000, "The negative prompt has 10,000"),
        ("prompt", " \n", "The prompt is empty"),
        ("prompt", None, "The prompt is empty"),
        ("prompt", ["a"], "must be a text"),
        ("prompt", "\ud800", "lone surrogate"),
        ("seed", "-1", "from 0 to 18446744073709551615"),
        ("seed", "1" * 10_000, "from 0 to 18446744073709551615"),
        ("seed", "²", "from 0 to 18446744073709551615"),
        ("steps", 10**9, "from 1 to 100"),
        ("steps", 2.5, "a whole number from 1 to 100, not 2.5"),
        ("steps", float("nan"), "from 1 to 100"),
        ("guidance", "1e300", "from 0 to 20"),
        ("gain", [], "from 0 to 2"),
        ("sampler", "magic", "sampler='magic'"),
        ("sampler", {"a": 1}, "sampler=''"),
    ],
)
def test_what_is_asked_for_beyond_the_bounds_is_one_sentence(name, value, words):
    with pytest.raises(ValueError) as error:
        Wish.read(dataclasses.asdict(WISH) | {name: value})
    assert words in one_line(error) and len(str(error.value)) < 300


# What is sent.


def test_hostile_files_are_refused_in_one_sentence_before_anything_is_decoded(
    tmp_path, monkeypatch
):
    files, loaded = write_all(tmp_path), []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: loaded.append(image.size) or load(image)
    )

    def refusal(read, name):
        with pytest.raises(ValueError) as error:
            read(str(files[name]), (16, 16))
        return one_line(error)

    assert "30000 x 30000 pixels" in refusal(uploads.read_picture, "huge.png")
    for name in ("drawing.svg", "words.png", "long.gif", "list.mp4"):
        assert "a PNG, JPEG or WebP is wanted" in refusal(uploads.read_picture, name)
    assert loaded == []
    assert "damaged or cut off" in refusal(uploads.read_picture, "cut.jpg")
    began = time.process_time()
    assert "more than 300 frames" in refusal(uploads.read_frames, "long.gif")
    assert time.process_time() - began < 2
    assert "can't be read" in refusal(uploads.read_frames, "list.mp4")
    assert "30000 x 30000 pixels" in refusal(uploads.read_frames, "huge.png")
    for name in ("drawing.svg", "words.png", "cut.jpg"):
        assert "The clip can't be read" in refusal(uploads.read_frames, name)
    with pytest.raises(ValueError, match="PNG that was made here"):
        uploads.read_metadata(str(files["cut.jpg"]))


def test_a_film_of_large_frames_is_refused_by_its_header(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "large.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 2048, 1152, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((1152, 2048, 3), np.uint8), format="rgb24")
        film.mux(stream.encode(frame))
        film.mux(stream.encode())
    with pytest.raises(ValueError, match="too large: at most 1920 x 1080"):
        uploads.read_frames(str(tmp_path / "large.mp4"), (16, 16))


def test_a_file_above_the_bound_isn_t_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_UPLOAD", 1000)
    with pytest.raises(ValueError, match="at most 10 MB"):
        uploads.read_picture(picture())


def test_a_picture_is_cut_to_the_model_s_size_and_strokes_are_its_mask():
    data = picture("WEBP", 64)
    assert uploads.read_picture(data, (16, 8)).shape == (16, 8, 3)
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:32, :, 3] = 255
    file = io.BytesIO()
    Image.fromarray(layer).save(file, "PNG")
    mask = uploads.read_strokes([file.getvalue()], (16, 16))
    assert (mask[:7] >= 0.5).all() and (mask[9:] < 0.5).all()
    empty = io.BytesIO()
    Image.fromarray(0 * layer).save(empty, "PNG")
    assert uploads.read_strokes([empty.getvalue()], (16, 16)) is None
    assert uploads.read_strokes([], (16, 16)) is None


def test_a_clip_is_read_up_to_its_eighth_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), (i, i, i)) for i in range(0, 200, 10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    clip = uploads.read_frames(str(tmp_path / "a.gif"), (16, 16))
    assert clip[:, 0, 0, 0].tolist() == list(range(0, 80, 10))
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:3], duration=100)
    assert len(uploads.read_frames(str(tmp_path / "b.gif"), (16, 16))) == 3


# What is made.


def test_the_gain_scales_r_and_its_estimate_and_0_is_none(pipeline):
    x, t = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)), np.full(1, 9)
    ids, mask, _ = pipeline.opened.encode_text(["a red circle"])

    @jax.jit
    def parts(weights):
        model = pipeline.opened.build(weights)
        captions = model.encode(ids, mask)
        prediction, estimate = model.predict(jnp.asarray(x), t, captions)
        return model.relate(jnp.asarray(x), captions, t), estimate, prediction

    whole, half, none = (parts(with_gain(pipeline, f).opened.weights) for f in (1, 0.5, 0))
    assert abs(whole[0]).max() > 0.01 and abs(whole[1]).max() > 0.01
    for i in range(2):
        np.testing.assert_allclose(half[i], 0.5 * whole[i], atol=1e-6)
        np.testing.assert_array_equal(none[i], 0 * whole[i])
    np.testing.assert_array_equal(half[2], whole[2])
    assert largest_gain(pipeline) == pytest.approx(2, rel=1e-4)
    with pytest.raises(ValueError, match=r"context gain=2.1: must lie in 0..2"):
        with_gain(pipeline, 2.1)


def test_a_model_without_a_context_has_no_gain():
    settings = parse(config_dict(**SMALLEST, **{"context.shift": "none"}))
    plain = of_run(settings, load_tokenizer(), random_params(settings))
    assert largest_gain(plain) == 0
    with pytest.raises(ValueError, match="has no context"):
        with_gain(plain, 0.5)


def test_pictures_are_the_pipeline_s_own_with_plain_diffusion_beside_and_seen_on_the_way(
    studio, pipeline, monkeypatch
):
    monkeypatch.setattr("contextdiff_jax.demo_page.studio.BETWEEN", 0)
    updates = list(studio.make(WISH, beside=True))
    steps = [[each.step for each in now] for now in updates]
    assert steps[0] == [None, None] and steps[-1] == [4, 4]
    assert [s[0] for s in steps] == sorted(
        (s[0] for s in steps), key=lambda s: -1 if s is None else s
    )
    made = [np.asarray(Image.open(io.BytesIO(each.png))) for each in updates[-1]]
    for own, gain in zip(made, (1, 0), strict=True):
        other = with_gain(pipeline, gain).text_to_image([WISH.prompt], **WISH.options | WATCHED)
        np.testing.assert_array_equal(own, other[0])
    assert np.abs(made[0].astype(int) - made[1]).mean() > 1
    texts = [Image.open(io.BytesIO(each.png)).text for each in updates[-1]]
    assert [text["context_scale"] for text in texts] == ["1.0", "0.0"]
    assert texts[0]["source"] == "a test" and "strength" not in texts[0]
    # One program for both gains; the second call compiles nothing.
    assert updates[1][0].new_program and not updates[-1][1].new_program


def test_a_picture_to_start_from_and_a_mask_go_the_pipeline_s_ways(studio, pipeline):
    start = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    mask = np.zeros((16, 16), np.float32)
    mask[:8] = 1
    wish = dataclasses.replace(WISH, strength=0.5)
    options = wish.options | {"strength": 0.5} | WATCHED
    ways = {
        None: pipeline.image_to_image([wish.prompt], start[None], **options),
        0: pipeline.inpaint([wish.prompt], start[None], mask[None], **options),
    }
    for given, expected in zip((None, mask), ways.values(), strict=True):
        *_, (last,) = studio.make(wish, start, given)
        assert last.steps == 2
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(last.png))), expected[0])
    assert enlarged(start, 40).shape == (48, 48, 3)


def test_what_the_model_refuses_reaches_the_visitor_and_the_device_is_free_again(studio):
    with pytest.raises(ValueError, match="must lie in 1..50"):
        list(studio.make(dataclasses.replace(WISH, steps=51)))
    assert list(studio.make(WISH))[-1][0].done


# One after the other.


def test_a_visitor_who_leaves_stops_the_job_and_the_next_one_has_the_device():
    worker, seen, ended = Worker(), [], threading.Event()

    def endless(report):
        try:
            while True:
                seen.append(1)
                report(len(seen))
                time.sleep(0.001)
        except Stopped:
            ended.set()
            raise

    first = worker.run(endless)
    assert next(first) == ()
    assert next(first)[0] >= 1
    second = worker.run(lambda report: "made")
    first.close()
    assert ended.wait(5)
    with pytest.raises(StopIteration) as end:
        while True:
            next(second)
    assert end.value.value == "made"


def test_a_job_that_takes_too_long_is_stopped_with_a_sentence():
    def slow(report):
        while True:
            time.sleep(0.01)
            report(1)

    with pytest.raises(ValueError, match="longer than 0 seconds"):
        list(Worker(longest=0.05).run(slow))


def test_an_album_forgets_its_oldest_pictures(tmp_path):
    album = Album(tmp_path / "kept", most=2)
    paths = [album.keep(b"x" * 100) for _ in range(3)]
    assert sorted(map(str, (tmp_path / "kept").iterdir())) == sorted(paths[1:])
    assert is_full(tmp_path, 199) and not is_full(tmp_path, 10_000)


# What is refused before Gradio reads it.


@pytest.mark.parametrize(
    ("method", "path", "headers", "code"),
    [
        ("GET", "/", {}, 200),
        ("POST", "/x", {"content-length": "10"}, 200),
        ("POST", "/x", {"content-length": str(limits.MAX_BODY + 1)}, 413),
        ("POST", "/x", {"content-length": "-1"}, 411),
        ("PUT", "/x", {"transfer-encoding": "chunked"}, 411),
    ],
)
def test_requests_are_bounded_and_browsers_told_to_stay_here(tmp_path, method, path, headers, code):
    sent = answers(Guard(_app, tmp_path), method, path, headers)
    assert sent[0]["status"] == code
    if code == 200:
        assert dict(sent[0]["headers"])[b"content-security-policy"].startswith(
            b"default-src 'self'"
        )
        assert len(sent[0]["headers"]) == len(HEADERS)


def test_an_upload_to_a_full_page_is_refused(tmp_path, monkeypatch):
    (tmp_path / "old").write_bytes(b"x" * 100)
    monkeypatch.setattr(
        "contextdiff_jax.demo_page.guard.is_full", lambda folder: is_full(folder, 9)
    )
    sent = answers(Guard(_app, tmp_path), "POST", "/gradio_api/upload", {"content-length": "1"})
    assert sent[0]["status"] == 507 and b"too many files" in sent[1]["body"]


async def _app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def answers(app, method, path, headers):
    """What an ASGI app sends."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.mark.slow
def test_a_clip_is_tuned_on_inverted_and_edited_and_each_step_is_told(tmp_path, monkeypatch):
    """Of a run that was trained, with the settings of its own folder."""
    with tarfile.open(ROOT / "tests/saved_run/run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    monkeypatch.chdir(ROOT)  # where the paths of the run's config start from
    folder = str(tmp_path / "run")
    clips = ClipStudio(Pipeline.open(folder), folder, Worker(longest=3600))
    assert clips.why_not == "" and clips.draws_shapes and clips.side == 16
    clip, prompt, edit = clips.example(1)
    wish = ClipWish.read(prompt, edit, 0.5, 2, 2, True)
    *said, edited = clips.edit(clip, wish)
    assert list(dict.fromkeys(said))[-4:] == [
        "Compiling the tuning.",
        "Tuning the model on the clip: step 1 of 2.",
        "Tuning the model on the clip: step 2 of 2.",
        "Inverting the clip, and sampling it anew.",
    ]
    assert list(edited.clips) == ["the clip", "its reconstruction", edit]
    assert {each.shape for each in edited.clips.values()} == {(8, 16, 16, 3)}
    assert edited.fidelity > 30
    files = encoded(edited.clips[edit])
    assert files["gif"][:6] == b"GIF89a" and files["mp4"][4:8] == b"ftyp"
