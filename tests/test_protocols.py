"""Protocols of published figures: the captions that are drawn, a curve over guidance that a killed
run goes on with, and folders of other programs.
"""

from __future__ import annotations

import json
import random

import command_flags
import numpy as np
import pytest
from conftest import ROOT
from drawn_pipeline import Drawn
from PIL import Image
from torch_models import clip_model

from contextdiff_jax import Pipeline
from contextdiff_jax.evaluation import distances, folders, protocols
from contextdiff_jax.evaluation.captions import draw_captions
from contextdiff_jax.evaluation.folders import Looking
from contextdiff_jax.evaluation.networks.clip import load_clip
from contextdiff_jax.evaluation.protocols import PROTOCOLS, Protocol
from contextdiff_jax.runtime import host

EVALUATE = ROOT / "contextdiff_jax" / "evaluate.py"
COUNT, SIZE = 7, 12


def coco(path, count=40, order=None):
    """Five captions of each picture, as COCO publishes them."""
    ids = range(100, 100 + count)
    rows = [
        {"image_id": i, "id": 10 * i + k, "caption": f" a cat {i} by {k} trees\n"}
        for i in ids
        for k in range(5)
    ]
    images = [{"id": i, "file_name": f"COCO_{i:012d}.jpg", "height": 480} for i in ids]
    if order is not None:
        random.Random(order).shuffle(rows)
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": rows}))
    return str(path)


def test_coco_s_captions_are_one_a_picture_and_always_the_same(tmp_path):
    drawn = draw_captions(coco(tmp_path / "a.json"))
    assert drawn == draw_captions(coco(tmp_path / "b.json", order=1))
    assert sorted(caption.image_id for caption in drawn) == list(range(100, 140))
    assert [caption.image_id for caption in drawn] != list(range(100, 140))
    for caption in drawn:
        words = caption.text.split()
        assert words[:3] == ["a", "cat", str(caption.image_id)] and caption.text.strip()
        assert caption.file_name == f"COCO_{caption.image_id:012d}.jpg"
    assert len({caption.text.split()[-2] for caption in drawn}) == 5
    assert draw_captions(str(tmp_path / "a.json"), seed=1) != drawn


def test_captions_of_lines_are_read_and_what_is_none_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\na dog\n")
    rows = [{"caption": "a cat"}, {"text": "a dog"}, {"prompt": "a cow"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {c.text for c in draw_captions(str(tmp_path / "a.txt"))} == {"a cat", "a dog"}
    assert {c.text for c in draw_captions(str(tmp_path / "a.jsonl"))} == {
        "a cat",
        "a dog",
        "a cow",
    }
    for name, text, message in (
        ("a.csv", "a", "must end in one of .json, .jsonl, .txt"),
        ("b.jsonl", '{"caption": "a"}\n{"id": 3}\n', "line 2: has no caption; of caption, text"),
        ("b.json", '{"images": []}', r"has no annotations\[\] and images\[\]"),
        ("c.json", '{"images": [], "annotations": [{"id": 1}]}', "annotations that aren't COCO's"),
        ("b.txt", "\n", "holds no captions"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as raised:
            draw_captions(str(tmp_path / name))
        assert "\n" not in str(raised.value)


def test_pictures_are_squared_around_their_centre():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 200
    squared = folders.square(picture, 10)
    assert squared.shape == (10, 10, 3) and (squared[:, 3:-3] == 200).all()
    assert (squared > 150).all()  # the filter reaches over the square's border
    assert folders.square(squared, 10) is squared
    looking = folders.at_size(Looking("means", lambda p: p, lambda batch: batch), 10)
    np.testing.assert_array_equal(looking.prepare(picture), squared)
    assert looking.name == "means, of 10x10"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip_model(folder)
    return folder


@pytest.fixture
def evaluate(monkeypatch, tmp_path, clip_folder):
    """The command on a drawn pipeline, with a small protocol and features of no network."""
    means = Looking("means", lambda p: p.reshape(-1, 3).mean(0).astype(np.float32), lambda b: b)
    monkeypatch.setattr(folders, "by_inception", lambda path, resize: means)
    monkeypatch.setattr(host, "set_compilation_cache", lambda folder: None)
    small = Protocol(count=COUNT, size=SIZE, guidance=(1.0, 2.5))
    monkeypatch.setitem(PROTOCOLS, "small", small)
    rng = np.random.default_rng(0)
    (tmp_path / "real").mkdir()
    for i in range(9):
        image = rng.integers(0, 256, (*rng.integers(13, 20, 2), 3)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "real" / f"{i}.png")

    def run(pipeline, *more):
        monkeypatch.setattr(Pipeline, "open", lambda *_, **__: pipeline)
        captions = coco(tmp_path / "captions.json")
        fixed = ["--protocol=small", f"--captions={captions}", f"--out={tmp_path}/out"]
        fixed += [f"--reference={tmp_path}/real", "--features=FILE", "--batch_size=3"]
        command_flags.run(EVALUATE, [*fixed, *more])

    return run


def test_the_curve_is_fid_and_clip_score_of_the_drawn_captions_pictures(
    evaluate, tmp_path, clip_folder
):
    evaluate(Drawn(), "--model=DIR", f"--clip={clip_folder}", "--steps=3")
    folder = tmp_path / "out" / "protocols" / "small"
    curve = json.loads((folder / "curve.json").read_text())
    assert [point["guidance"] for point in curve["points"]] == [1.0, 2.5] and curve["num"] == COUNT
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    captions = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    texts = [caption.text for caption in draw_captions(str(tmp_path / "captions.json"))][:COUNT]
    assert [row["caption"] for row in captions] == texts
    point, files = curve["points"][1], sorted((folder / "guidance_2.5").glob("*.png"))
    pictures = np.stack([np.asarray(Image.open(file)) for file in files])
    assert pictures.shape == (COUNT, SIZE, SIZE, 3)  # of 4 pixels before
    clip = load_clip(clip_folder)
    wanted = distances.clip_score(clip.embed_images(pictures), clip.embed_captions(texts))
    assert point["clip_score"][0] == pytest.approx(wanted.mean(), rel=1e-5)
    real = [np.asarray(Image.open(tmp_path / "real" / f"{i}.png")) for i in range(9)]
    means = [
        np.stack([image.reshape(-1, 3).mean(0) for image in images])
        for images in (pictures, [folders.square(image, SIZE) for image in real])
    ]
    assert point["fid"][0] == pytest.approx(distances.fid(*means).value, rel=1e-4)
    assert (folder / "guidance_1" / "made.json").exists() and "9 pictures" in curve["reference"]


def test_a_killed_curve_goes_on_and_more_captions_go_on_with_those_of_fewer(
    evaluate, tmp_path, monkeypatch
):
    looked, look_at = [], folders.look_at
    monkeypatch.setattr(folders, "look_at", lambda *a, **k: looked.append(1) or look_at(*a, **k))
    with pytest.raises(KeyboardInterrupt):
        evaluate(Drawn(fails_at=4), "--model=DIR")
    again = Drawn()
    evaluate(again, "--model=DIR")  # three batches of the first scale are there, one of the second
    assert [first for first, _ in again.calls] == [3, 6]
    assert [options["guidance"] for _, options in again.calls] == [2.5, 2.5]
    assert len(looked) == 3  # the reference once, each scale once
    curve = tmp_path / "out" / "protocols" / "small" / "curve.json"
    before = json.loads(curve.read_text())["points"]
    nothing = Drawn()
    evaluate(nothing, "--model=DIR", "--guidance_scales=2.5,1")
    assert not nothing.calls and len(looked) == 3
    assert json.loads(curve.read_text())["points"] == before
    monkeypatch.setitem(PROTOCOLS, "small", Protocol(count=40, size=SIZE, guidance=(1.0,)))
    with pytest.raises(ValueError, match="holds other pictures, captions is"):
        evaluate(Drawn(), "--model=DIR")  # a draw of 40 isn't one of 7
    few, more = Drawn(), Drawn()
    evaluate(few, "--model=DIR", "--num=6", f"--out={tmp_path}/b")
    evaluate(more, "--model=DIR", "--num=12", f"--out={tmp_path}/b")
    assert [first for first, _ in few.calls + more.calls] == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="holds other pictures, model is"):
        evaluate(Drawn(weights=1.0), "--model=DIR", "--num=6", f"--out={tmp_path}/b")


def test_a_folder_of_another_program_is_scored_by_the_numbers_in_its_names(
    evaluate, tmp_path, clip_folder
):
    evaluate(None)  # only the captions, to make pictures of
    captions = tmp_path / "out" / "protocols" / "small" / "captions.jsonl"
    assert len(captions.read_text().splitlines()) == COUNT
    evaluate(Drawn(), "--model=DIR", f"--clip={clip_folder}", "--guidance=2")
    curve = captions.with_name("curve.json")
    ours = json.loads(curve.read_text())["points"][0]
    for file in sorted(captions.with_name("guidance_2").glob("*.png")):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        file.rename(tmp_path / "theirs" / f"image_{int(file.stem)}.png")
    evaluate(None, f"--samples={tmp_path}/theirs", f"--clip={clip_folder}")
    theirs = json.loads(curve.read_text())["points"][0]
    assert theirs == ours | {"guidance": None}
    (tmp_path / "theirs" / "image_3.png").unlink()
    with pytest.raises(ValueError, match="6 pictures for 7 captions; none has number 3"):
        evaluate(None, f"--samples={tmp_path}/theirs")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--protocol=other"], "--protocol='other': unknown; one of coco30k, small"),
        (["--protocol=coco30k"], "draws 30000: --num=40 takes as many"),
        (["--metrics=fid"], "--metrics: isn't read with --protocol"),
        (["--samples=DIR"], "--workdir, --model, --samples: only one of them"),
        (["--guidance_scales=1,x"], "--guidance_scales=1,x: must be numbers"),
        (["--guidance_scales=1", "--guidance=2"], "--guidance not beside it"),
        (["--features="], "--features: missing; FID needs real pictures and Inception"),
        (["--out="], "--out: missing; name the folder to write to"),
        (["--sampler=other"], "sampler='other'"),
    ],
)
def test_flags_that_do_not_fit_a_protocol_are_refused_in_one_line(evaluate, flags, message):
    with pytest.raises(ValueError) as raised:
        evaluate(Drawn(), "--model=DIR", *flags)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert protocols.PROTOCOLS["coco30k"].count == 30_000
