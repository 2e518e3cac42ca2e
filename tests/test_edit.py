"""The edit command end to end: from files to films, with a new model and with a Stable Diffusion
folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ON_EIGHT, ROOT, SMALLEST, command, config_dict
from PIL import Image
from torch_models import stable_diffusion
from transformers import CLIPConfig, CLIPModel

from contextdiff_jax.configs.edit_shapes import video_sections
from contextdiff_jax.data.moving_shapes import frames_of, make_moving_shape
from contextdiff_jax.data.video import read_clip
from contextdiff_jax.editing import benchmark, end_to_end, page, tuning
from contextdiff_jax.editing.end_to_end import remove_old, run_edit, table
from contextdiff_jax.editing.output import save_frames
from contextdiff_jax.editing.settings import parse_edit
from contextdiff_jax.editing.video_model import digest
from contextdiff_jax.parallel import processes
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.runtime.files import write_json


def config_of(folder, **changes):
    """A tiny config for the clip in `folder`."""
    own = {
        name: value
        for name, value in changes.items()
        if name.split(".")[0] not in ("video", "edit")
    }
    small = SMALLEST | {"train.batch_size": 1, "train.steps": 4, "train.checkpoint_every": 2}
    config = config_dict(**small | own) | video_sections()
    config["video"] |= dict(
        path=str(folder / "clip"),
        prompt="a red circle",
        edit_prompts=("a blue circle", "a red square"),
        num_frames=2,
    )
    config["edit"] |= dict(steps=2)
    for name, value in changes.items():
        section, field = name.split(".")
        config[section][field] = value
    return json.loads(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    save_frames(frames_of(make_moving_shape(0, 2).scenes, 16), folder / "clip")
    return folder


def edit(config, workdir):
    return run_edit(parse_edit(config), config, workdir)


def check_outputs(workdir, metrics, size=(16, 16)):
    for i in range(2):
        for name in (f"{i:02d}", f"{i:02d}.gif", f"{i:02d}.mp4"):
            assert read_clip(workdir / "edits" / name, num_frames=2).shape == (2, *size, 3)
    assert (workdir / "strip.png").stat().st_size > 1000
    page = (workdir / "report.html").read_text()
    assert "a blue circle" in page and "data:image/gif;base64," in page and "http" not in page
    written = json.loads((workdir / "metrics.json").read_text())
    assert written["reconstruction"]["psnr"] == metrics["reconstruction"]["psnr"] > 5
    assert 0 < written["reconstruction"]["x0_error"] < 0.5  # explicit inversion in two steps
    assert {"tuning", "inversion", "reconstruction", "editing"} <= written["costs"].keys()
    assert "a blue circle" in table(metrics) and "psnr" in table(metrics)


@pytest.mark.slow  # over a minute of compilation: pytest -m slow tests/test_edit.py
def test_a_new_model_learns_resumes_and_edits_a_clip(folder, tmp_path, monkeypatch, caplog):
    config = config_of(
        folder,
        **{
            "video.tune": "all",
            "edit.control": "refine",
            "edit.blend": "changed",
            "edit.attention_maps": True,
        },
    )
    # Stopped after the third step, as by SIGTERM: what was reached is saved, and the run says so.
    calls = iter([False, False, True])
    with monkeypatch.context() as stopping:
        stopping.setattr(processes.StopSignal, "__call__", lambda self, step: next(calls))
        with (
            pytest.raises(RunError, match="stopped at step 3 of 4; run again to go on"),
            jax.log_compiles(),
        ):
            edit(config, tmp_path)
    assert sum("Compiling jit(step) " in line for line in caplog.messages) == 1
    (tmp_path / "checkpoints" / "9").mkdir()  # copied in part
    metrics = edit(config, tmp_path)
    check_outputs(tmp_path, metrics)
    assert (tmp_path / "damaged" / "9").exists()
    assert len(list((tmp_path / "attention").glob("*.png"))) == 3
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="holds another config's run, video.prompt"):
        edit(config_of(folder, **{"video.tune": "all", "video.prompt": "a green cross"}), tmp_path)


@pytest.mark.slow  # over a minute of compilation: pytest -m slow tests/test_edit.py
def test_a_stable_diffusion_folder_and_a_clip_folder_go_through_every_path(folder, tmp_path):
    pipeline = stable_diffusion(folder / "words")
    pipeline.save_pretrained(folder / "sd")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    CLIPModel(
        CLIPConfig(
            text_config=dict(
                vocab_size=56, max_position_embeddings=9, eos_token_id=55, bos_token_id=54, **sizes
            ),
            vision_config=dict(image_size=16, patch_size=8, **sizes),
            projection_dim=8,
        )
    ).save_pretrained(folder / "clip_model")
    pipeline.tokenizer.save_pretrained(folder / "clip_model")
    metrics = edit(
        config_of(
            folder,
            **{
                "video.model": str(folder / "sd"),
                "video.prompt": "a red",
                "video.edit_prompts": ("b red", "a b"),
                "video.size": (16, 24),
                "edit.control": "replace",
                "edit.guidance": 5.0,
                "edit.inversion": "exact",
                "edit.steps": 20,
                # two moves of little noise: over more a random network's inversion runs away
                "edit.strength": (0.1,),
                "edit.clip": str(folder / "clip_model"),
                "edit.pickscore": str(folder / "clip_model"),
                "context.patch_size": 2,
            },
        ),
        tmp_path,
    )
    assert read_clip(tmp_path / "edits/00.mp4", num_frames=2).shape == (2, 16, 24, 3)
    assert metrics["reconstruction"]["x0_error"] < 1e-3  # exact
    row = metrics["edits"][0]
    assert {
        "text_alignment",
        "frame_consistency",
        "pickscore",
        "warping_error",
    } <= row.keys()
    assert np.isfinite([value for name, value in row.items() if name not in page.NAMES]).all()


def test_the_page_of_an_edit_has_all_of_it_and_escapes_what_a_user_wrote():
    rng = np.random.default_rng(0)
    source, edited = rng.integers(0, 256, (2, 3, 8, 8, 3)).astype(np.uint8)
    row = {"prompt": "<b>bold</b>", "name": "00-seed7", "psnr": 20.0, "ssim": None}
    metrics = {"reconstruction": {"psnr": 40.0}, "edits": [row], "costs": {"editing": {"s": 1.5}}}
    shown = [page.Shown(p, c, np.ones((3, 8, 8))) for p, c in (("a", source), ("<b>", edited))]
    text = page.make_page(shown[0], source, shown[1:], metrics, {"edit": {"steps": 5}}, 8.0)
    assert text.count("data:image/gif;base64,") == 6  # two clips, two maps, again and difference
    assert "<b>" not in text and "&lt;b&gt;bold" in text and "steps" in text and "1.5" in text
    choice = {"prompt": "<b>", "strength": 0.8, "reached": False, "fit_of_the_clip": 0.25}
    chosen = metrics | {"strengths": [choice | {"fits": {"0.3": -0.5, "0.8": 0.125}}]}
    text = page.make_page(shown[0], source, shown[1:], chosen, {}, 8.0)
    assert "0.8, the best of none that do" in text and "fit at 0.3" in text and "0.125" in text
    assert "attention" not in page.make_page(
        page.Shown("a", source), source, [], metrics | {"edits": []}, {}, 8.0
    )
    still = page.make_page(page.Shown("a", source[:1]), source[:1], [], metrics, {}, 8.0)
    assert "data:image/png;base64," in still


def test_every_seed_has_its_files_its_metrics_and_its_place_on_the_page(folder, tmp_path):
    changes = {"edit.method": "flowedit", "edit.seeds": (3, 12), "edit.strength": (0.5, 1.0)}
    settings = parse_edit(config_of(folder, **changes))
    clip = read_clip(folder / "clip", num_frames=2)
    clips = [clip // (2 + i) for i in range(4)]
    edited = end_to_end.Edited(
        reconstruction=clip,
        error=0.0,
        outputs=settings.outputs,
        clips=clips,
        masks=[np.ones(clip.shape[:3], bool)] * 4,
        maps=np.zeros((5, *clip.shape[:3])),
    )
    metrics = end_to_end.measure(clip, edited, settings, end_to_end.Judges((), None))
    end_to_end.write(clip, edited, settings, metrics | {"costs": {}}, tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())["edits"]
    names = ["00-seed3", "00-seed12", "01-seed3", "01-seed12"]
    assert [row["name"] for row in rows] == names
    assert [(row["seed"], row["strength"]) for row in rows] == [
        (3, 0.5),
        (12, 0.5),
        (3, 1),
        (12, 1),
    ]
    text = (tmp_path / "report.html").read_text()
    for i, name in enumerate(names):
        np.testing.assert_array_equal(read_clip(tmp_path / "edits" / name, num_frames=2), clips[i])
        assert read_clip(tmp_path / f"edits/{name}.mp4", num_frames=2).shape == clip.shape
        assert name in table(metrics) and name in text
    assert "1, seed 12: a red square" in text
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.height > 6 * 64  # a row for the source, its reconstruction, and each


@pytest.mark.slow  # a tuning and an edit are compiled: pytest -m slow tests/test_edit.py
def test_a_benchmarks_scores_are_the_means_over_the_seeds_of_tuning(folder):
    changes = {"train.steps": 3, "train.learning_rate": 0.01}
    settings = parse_edit(config_of(folder, **changes))
    ways = {"own": settings.edit}
    arms = [benchmark.Arm(settings, ways, tunings) for tunings in (1, 1, 2)]
    arms[1].seeds = range(1, 2)
    case = next(benchmark.shape_cases(1, 2, 16))
    first, second, both = (arm(case)["own"] for arm in arms)
    for kind, scores in both[1].items():
        for name, mean in scores.items():
            assert mean == pytest.approx((first[1][kind][name] + second[1][kind][name]) / 2)
    psnrs = [found[1]["colour"]["psnr"] for found in (first, second, both)]
    assert psnrs[0] != psnrs[1]
    for kind, clip in both[0].items():
        np.testing.assert_array_equal(clip, first[0][kind])


@pytest.mark.slow  # minutes of compilation: pytest -m slow tests/test_edit.py
def test_both_benchmarks_score_every_way_against_the_true_edits(folder, tmp_path):
    moving = make_moving_shape(0, 2)
    save_frames(frames_of(moving.edited["colour"], 16), folder / "true")
    row = dict(source="clip", prompt="a red circle", target="true", edit_prompt="a blue circle")
    (folder / "edits.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    config = config_of(folder, **{"video.path": str(folder), "context.kind": "linear"})
    settings, others = parse_edit(config), ("prompt-to-prompt", "sdedit", "flowedit")
    for name, cases in (
        ("clips", benchmark.cases_of(settings, 0, 2)),
        ("shapes", benchmark.cases_of(settings, 2, 0)),
    ):
        report = benchmark.run_benchmark(settings, tmp_path / name, cases, 2, "", others)
        assert set(report["others"]) == set(others) and report["clips"] == 2
        found = report["results"]["edit" if name == "clips" else "colour"]
        assert np.isfinite([value for scores in found.values() for value in scores.values()]).all()
        assert json.loads((tmp_path / name / "benchmark.json").read_text())["clips"] == 2
        assert (tmp_path / name / "benchmark.png").stat().st_size > 1000
        rows = 2 if name == "clips" else 4
        film = read_clip(tmp_path / name / "benchmark.gif", num_frames=0)
        assert film.shape == (2, rows * (2 * 16 + 8), 3 * (2 * 16 + 8), 3)
        assert "flowedit" in benchmark.table(report) and "reconstruction" in benchmark.table(report)
        assert report["a_frame"]["flowedit"]["editing"]["megabytes"] > 0
        assert "megabytes a frame" in benchmark.table(report)


def test_a_benchmark_without_true_edits_is_one_line(folder, tmp_path):
    settings = parse_edit(config_of(folder, **{"video.path": str(tmp_path)}))
    for line, words in (("{}", "line 1: no text source"), ("{", "line 1: "), ("", "has 0 edits")):
        (tmp_path / "edits.jsonl").write_text(line)
        with pytest.raises(ValueError, match=words):
            next(benchmark.cases_of(settings, 0, 2))
    with pytest.raises(ValueError, match="one of them at a time"):
        benchmark.cases_of(settings, 1, 1)
    with pytest.raises(ValueError, match="--others='magic': unknown; one of"):
        benchmark.run_benchmark(settings, tmp_path, iter(()), 2, "", ("magic",))


def test_what_does_not_fit_the_command_is_one_line(folder, tmp_path):
    result = command(
        "edit",
        "--config=configs/edit_shapes.py",
        f"--workdir={tmp_path}/x",
        f"--config.video.path={tmp_path}/no",
    )
    assert result.returncode == 2 and result.stderr.splitlines()[-1] == (
        f"error: video.path={tmp_path}/no: no such file or folder"
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow  # half a minute of compilation each: pytest -m slow tests/test_edit.py
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_frames_over_eight_devices_give_what_one_device_gives(kind):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        **ON_EIGHT,
    }
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/frames_program.py"), kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["devices"] == 8 and found["values"] > 20 and found["output_devices"] == 8
    assert found["error"] < 2e-4
    assert found["share"] < 0.2  # an eighth, and what every device does for itself


def test_a_tuning_is_known_by_the_clip_and_the_model_not_by_their_names(tmp_path):
    config = config_of(tmp_path) | {"tuned_on": {"clip": "c", "model": "m"}}
    claim_workdir(tmp_path, config, tuning.FREE_FIELDS)

    def check(config, **then):
        tuning.check_workdir(
            tmp_path, config | {"tuned_on": {"clip": "c", "model": "m"} | then}, settings
        )

    renamed = config_of(tmp_path, **{"video.path": "same", "video.model": "same", "edit.steps": 3})
    settings = parse_edit(renamed)
    check(renamed)
    for changes, message in (
        ({"clip": "other"}, "was tuned on another clip than video.path=same is now; choose"),
        ({"model": "other"}, "was tuned from another model than video.model=same is now; choose"),
    ):
        with pytest.raises(ValueError, match=message):
            check(renamed, **changes)
    with pytest.raises(ValueError, match="video.num_frames is 2 there and 3 here"):
        check(config_of(tmp_path, **{"video.num_frames": 3}))
    write_json(tmp_path / "config.json", config_of(tmp_path))  # as before there were digests
    with pytest.raises(ValueError, match="doesn't say of which clip its tuning is; choose another"):
        check(renamed)


def test_a_digest_tells_arrays_by_their_values_wherever_they_lie():
    values = {"a": np.arange(6.0, dtype=np.float32), "b": jnp.ones(2, jnp.bfloat16)}
    same = {"a": jnp.arange(6.0), "b": np.asarray(values["b"])}
    assert digest(values) == digest(same)
    others = [{**values, "a": values["a"] + 1}, {**values, "a": values["a"].reshape(2, 3)}]
    assert len({digest(values), digest(values, "config"), *map(digest, others)}) == 4


def test_what_an_earlier_edit_wrote_is_removed_and_nothing_else(tmp_path):
    old = [
        "edits/00.gif",
        "edits/00.mp4",
        "edits/101.gif",
        "edits/00-seed12.gif",
        "edits/03.webp",
        "edits/03.apng",
        "edits/02-seed3/00001.png",
        "edits/00/00000.png",
        "attention/01.png",
    ]
    own = [
        "edits/best.gif",
        "edits/00-seed.gif",
        "edits/01/note.txt",
        "edits/notes.txt",
        "attention/mean.png",
    ]
    for name in (*old, *own, "edits/01/00007.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_old(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(own) and not (tmp_path / "edits/00").exists()
    remove_old(tmp_path / "new")


def test_the_clip_maker_names_the_number_that_is_too_small(tmp_path):
    result = command("draw_clip", f"--out={tmp_path}/clip", "--size=4")
    assert result.returncode == 2 and "--size=4: " in result.stderr and "8" in result.stderr
    assert not (tmp_path / "clip").exists()
