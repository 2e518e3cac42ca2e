"""Folders of samples as benchmarks read them, and as a killed run leaves them."""

from __future__ import annotations

import json
import re
import types

import command_flags
import numpy as np
import pytest
from conftest import ROOT
from drawn_pipeline import Drawn
from PIL import Image

from contextdiff_jax import Pipeline
from contextdiff_jax.evaluation.shares import share
from contextdiff_jax.inference.filling import fill, fingerprint
from contextdiff_jax.inference.layouts import LAYOUTS, spots
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.pictures import read_png_metadata

SAMPLE = ROOT / "contextdiff_jax" / "sample.py"
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {"tag": "two_object", "include": [], "prompt": "a café and_a/cat"},
    {"tag": "colors", "include": [], "prompt": "a photo of a red cow"},
]


def sample(monkeypatch, pipeline, *arguments):
    monkeypatch.setattr(Pipeline, "open", lambda *_, **__: pipeline)
    monkeypatch.setattr(host, "set_compilation_cache", lambda folder: None)
    command_flags.run(SAMPLE, ["--model=DIR", *arguments])


def test_geneval_finds_its_metadata_and_pictures(tmp_path, monkeypatch):
    """As its evaluate_images.py walks the folder."""
    file, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    options = [f"--prompts_file={file}", "--layout=geneval", f"--images={out}", "--num=2"]
    sample(monkeypatch, Drawn(), *options, "--batch_size=4", "--guidance=5")
    found = {}
    for folder in out.iterdir():
        if folder.is_dir() and folder.name.isdigit():
            with open(folder / "metadata.jsonl") as opened:
                metadata = json.load(opened)
            names = sorted(picture.name for picture in (folder / "samples").iterdir())
            assert all(re.match(r"\d+\.png", name) for name in names)
            found[folder.name] = metadata, names
    names = ["0000.png", "0001.png"]
    assert found == {f"{i:05d}": (row, names) for i, row in enumerate(GENEVAL)}
    last = out / "00002" / "samples" / "0001.png"
    assert np.asarray(Image.open(last))[0, 0].tolist() == [len(GENEVAL[2]["prompt"]), 5, 1]
    assert read_png_metadata(last)["prompt"] == GENEVAL[2]["prompt"]


def test_compbench_reads_prompts_and_their_order_off_the_names(tmp_path, monkeypatch):
    """As its BLIP_vqa.py does: nothing else lies in the folder."""
    file, out = tmp_path / "color_val.txt", tmp_path / "out"
    prompts = ["a green bench and a red car", "a blue bowl.", "two dogs, one cat"]
    file.write_text(f"{prompts[0]}\n{prompts[1]}\tmore of it\n{prompts[2]}\n")
    options = [f"--prompts_file={file}", "--layout=t2i_compbench", f"--images={out}", "--num=10"]
    sample(monkeypatch, Drawn(), *options)
    names = [path.name for path in (out / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [p for p in prompts for _ in range(10)]
    assert names[0] == "a green bench and a red car_000000.png"


def files_of(folder, count):
    return [folder / LAYOUTS["numbered"].picture(spot) for spot in spots(["a"] * count)]


def test_a_killed_run_goes_on_with_the_batches_that_lack_a_picture(tmp_path):
    prompts, files = ["a" * (i + 1) for i in range(10)], files_of(tmp_path, 10)
    with pytest.raises(KeyboardInterrupt):
        fill(Drawn(fails_at=2), prompts, files, batch_size=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f.name for f in files[:6]]
    files[4].unlink()
    (tmp_path / "000004.png.partial").write_bytes(b"half")
    before, again = files[0].stat().st_mtime_ns, Drawn()
    assert fill(again, prompts, files, batch_size=3, steps=7) == 3
    assert again.calls == [(first, {"steps": 7}) for first in (3, 6, 9)]
    assert files[0].stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [f.name for f in files]
    for i, file in enumerate(files):
        assert np.asarray(Image.open(file))[0, 0].tolist() == [i + 1, i, i // 3]


def test_processes_fill_a_folder_together(tmp_path):
    prompts, files, drawn = ["a"] * 7, files_of(tmp_path, 7), [Drawn(), Drawn()]
    for index, pipeline in enumerate(drawn):
        fill(pipeline, prompts, files, batch_size=2, share=lambda n, i=index: share(n, i, 2))
    assert [[first for first, _ in pipeline.calls] for pipeline in drawn] == [[0, 2], [4, 6]]
    assert all(file.exists() for file in files)


def test_pictures_of_another_model_prompt_or_option_never_mix(tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    options = [f"--prompts_file={file}", "--layout=numbered", f"--images={tmp_path}/out"]
    again = Drawn()
    sample(monkeypatch, Drawn(), *options)
    sample(monkeypatch, again, *options)
    assert not again.calls
    for changed, pipeline, what in (
        (["--guidance=2"], Drawn(), "guidance is 3.0 there and 2.0 here"),
        (["--num=2"], Drawn(), "num is 1 there and 2 here"),
        ([], Drawn(weights=1.0), "model is"),
    ):
        with pytest.raises(ValueError, match=f"holds other pictures, {what}"):
            sample(monkeypatch, pipeline, *options, *changed)
    file.write_text("a dog\n")
    with pytest.raises(ValueError, match="holds other pictures, prompts is"):
        sample(monkeypatch, Drawn(), *options)


def test_any_array_of_a_model_changes_its_fingerprint():
    def opened(value):
        arrays = {"a": np.zeros((3, 50)), "b": np.float32(value)}
        return types.SimpleNamespace(weights=(arrays, None), guide=None)

    assert fingerprint(opened(0)) == fingerprint(opened(0)) != fingerprint(opened(1))


@pytest.mark.parametrize(
    "layout, text, message",
    [
        ("geneval", "{}\n", "line 1: must be an object with a text 'prompt'"),
        ("geneval", '{"prompt": "a"}\n\nno\n', "line 3: not JSON"),
        ("t2i_compbench", "a\na_b\n", "'a_b' holds '_'; T2I-CompBench reads prompts off"),
        ("t2i_compbench", "é" * 119, "holds more than 236 bytes"),
        ("numbered", "\n", "holds no prompts"),
        ("other", "a\n", "--layout='other': unknown; one of numbered, geneval, t2i_compbench"),
    ],
)
def test_files_that_no_layout_holds_are_refused_in_one_line(
    layout, text, message, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text(text)
    options = [f"--layout={layout}", f"--prompts_file={tmp_path}/file", f"--images={tmp_path}/x"]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        sample(monkeypatch, Drawn(), *options)
    assert "\n" not in str(raised.value) and not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="reads --prompts_file alone; not --prompt"):
        sample(monkeypatch, Drawn(), *options, "--prompt=a")
