"""Cascades: a base and upsamplers in one call and one command."""

from __future__ import annotations

import json

import command_flags
import numpy as np
import pytest
from conftest import ROOT, SMALLEST, config_dict, one_line, random_params, with_gamma
from PIL import Image

from contextdiff_jax import Pipeline
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference import filling
from contextdiff_jax.inference.cascade import split_options
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.pictures import read_png_metadata
from contextdiff_jax.settings import parse

SAMPLE = ROOT / "contextdiff_jax" / "sample.py"
PROMPTS = ["a large red circle", "a small blue square", "a large green triangle"]
UPSAMPLER = {
    "super_resolution.factor": 2,
    "super_resolution.max_level": 0.6,
    "context.kind": "low_resolution",
    "sample.augmentation": 0.1,
    "sample.guidance": 1.0,
    "sample.steps": 2,
}


def model(side, **changes):
    settings = parse(config_dict(**SMALLEST | {"data.image_size": side} | changes))
    params = with_gamma(random_params(settings), 1.5)
    return of_run(settings, load_tokenizer(), params, source=f"model of {side}")


@pytest.fixture(scope="module")
def base():
    return model(8, **{"sample.guidance": 1.0, "sample.steps": 3})


@pytest.fixture(scope="module")
def upsampler():
    return model(16, **UPSAMPLER)


@pytest.fixture(scope="module")
def cascade(base, upsampler):
    return Pipeline.cascade([base, upsampler])


def test_each_stage_is_what_its_model_makes_by_itself_with_noise_of_its_own(
    base, upsampler, cascade
):
    small, large = cascade.each_stage(PROMPTS, seed=5)
    assert (small.shape, large.shape) == ((3, 8, 8, 3), (3, 16, 16, 3))
    np.testing.assert_array_equal(small, base.text_to_image(PROMPTS, seed=5))
    alone = upsampler.upsample(PROMPTS, small, seed=5, stage=1)
    np.testing.assert_array_equal(large, alone)
    np.testing.assert_array_equal(large, cascade.text_to_image(PROMPTS, seed=5))
    of_the_first_stage = upsampler.upsample(PROMPTS, small, seed=5)
    assert np.abs(large.astype(int) - of_the_first_stage).max() > 10


def test_a_picture_of_each_stage_depends_on_its_number_not_on_the_batches(cascade):
    whole = list(cascade.each_stage(PROMPTS, seed=1))
    parts = list(cascade.each_stage(PROMPTS, seed=1, batch_size=1))
    last = list(cascade.each_stage(PROMPTS[2:], seed=1, first=2))
    for all_rows, shared, alone in zip(whole, parts, last, strict=True):
        assert np.abs(all_rows.astype(int) - shared).max() <= 1
        assert np.abs(all_rows[2:].astype(int) - alone).max() <= 1


def test_a_list_has_a_value_for_each_stage_and_anything_else_is_for_all():
    times = (40.0, 20.0, 0.0)
    given = {
        "steps": [50, None, 16],
        "guidance": 2.0,
        "augmentation": 0.1,
        "spacing": times,
        "guidance_interval": [(0.2, 0.8), None, None],
        "negative": ["a", "b", "c", "d"],
        "batch_size": (8, 4, 2),
    }
    first, second, third = split_options(given, 3)
    shared = {"guidance": 2.0, "spacing": times, "negative": given["negative"]}
    interval = {"guidance_interval": (0.2, 0.8)}
    assert first == shared | interval | {"steps": 50, "batch_size": 8}
    assert second == shared | {"augmentation": 0.1, "batch_size": 4}
    assert third == shared | {"steps": 16, "augmentation": 0.1, "batch_size": 2}
    levels = split_options({"augmentation": [0.3, 0.2]}, 3)
    assert levels == [{}, {"augmentation": 0.3}, {"augmentation": 0.2}]


def test_options_reach_their_stage(cascade):
    base, upsampler = cascade.options(steps=[1, None], augmentation=0.4, sampler="euler")
    assert (base.steps, base.augmentation, base.sampler) == (1, 0.0, "euler")
    assert (upsampler.steps, upsampler.augmentation, upsampler.sampler) == (2, 0.4, "euler")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": [1, 2, 3]}, r"steps=\[1, 2, 3\]: 3 values; must be one, or one for each of 2"),
        ({"augmentation": [0.1, 0.2]}, r"augmentation=.*: the base enlarges no picture"),
        ({"augmentation": 0.7}, "stage 2 of 2, model of 16: augmentation=0.7: must be at most 0.6"),
        ({"steps": [2, 99]}, "stage 2 of 2, model of 16: sample.steps=99: must lie in 1..50"),
        ({"size": (8, 0)}, "stage 1 of 2, model of 8: size=.*: height and width must be"),
    ],
)
def test_what_a_later_stage_refuses_is_said_before_anything_is_drawn(
    cascade, monkeypatch, options, message
):
    def drawn(*_, **__):
        raise AssertionError("a stage was drawn")

    monkeypatch.setattr(Pipeline, "_run", drawn)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        cascade.each_stage(PROMPTS, **options)
    one_line(error)


def test_coarser_levels_that_a_later_stage_cannot_reuse_are_refused_before_too(base):
    kind = {"model": config_dict(**SMALLEST)["model"]}
    fields = ("in_channels", "out_channels", "cross_attention_dim", "norm_num_groups")
    model_section = {name: kind["model"][name] for name in fields} | {
        "kind": "efficient_unet",
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "attention": ("none",),
        "num_attention_heads": 2,
    }
    config = config_dict(**SMALLEST | UPSAMPLER) | {"model": model_section}
    settings = parse(config)
    efficient = of_run(settings, load_tokenizer(), random_params(settings), source="SR")
    with pytest.raises(ValueError, match="stage 2 of 2, SR: reuse=2: the model has no coarser"):
        Pipeline.cascade([base, efficient]).each_stage(PROMPTS, steps=2, reuse=2)


def test_parts_that_do_not_fit_are_refused_in_one_line(base, upsampler):
    for parts, message in (
        ([base], "cascade: one part; must be a base and one upsampler or more"),
        ([upsampler, upsampler], "stage 1 of 2, model of 16: enlarges pictures; the first part"),
        ([base, base], "stage 2 of 2, model of 8: doesn't enlarge pictures"),
        (
            [model(16), upsampler],
            "stage 2 of 2, model of 16: enlarges pictures of 8x8 to 16x16; the part before makes",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as error:
            Pipeline.cascade(parts)
        one_line(error)


def test_pictures_of_another_size_are_enlarged_as_much(cascade):
    plans = cascade.plan(PROMPTS, size=(8, 12))
    assert [plan.shape for plan in plans] == [(8, 12, 3), (16, 24, 3)]


def test_one_command_draws_all_stages_and_says_what_each_did(
    cascade, base, upsampler, monkeypatch, tmp_path
):
    parts = {"BASE": base, "SR": upsampler}
    monkeypatch.setattr(Pipeline, "open", lambda path, *_, **__: parts[path])
    monkeypatch.setattr(host, "set_compilation_cache", lambda folder: None)
    flags = ["--cascade=BASE,SR", "--prompt=a large red circle", "--num=3", "--seed=3"]
    places = [f"--out={tmp_path}/grid.png", f"--images={tmp_path}/each", "--stages"]
    command_flags.run(SAMPLE, [*flags, *places, "--steps=,1", "--augmentation=0.2"])
    stages = cascade.each_stage(
        ["a large red circle"], num=3, seed=3, steps=[None, 1], augmentation=0.2
    )
    for folder, images in zip(("8x8", "."), stages, strict=True):
        files = sorted((tmp_path / "each" / folder).glob("*.png"))
        for file, image in zip(files, images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
    texts = read_png_metadata(tmp_path / "each" / "0001.png")
    assert (texts["seed"], texts["index"]) == ("3", "1")
    first, second = json.loads(texts["stages"])
    assert (first["source"], first["steps"], first["augmentation"]) == ("model of 8", 3, 0.0)
    assert (second["source"], second["steps"], second["augmentation"]) == ("model of 16", 1, 0.2)
    small = json.loads(read_png_metadata(tmp_path / "each" / "8x8" / "0000.png")["stages"])
    assert small == [first]


def test_a_folder_of_a_cascade_says_its_models_and_goes_on(cascade, tmp_path):
    made = filling.made_of(cascade, {"steps": [2, 1], "seed": 4})
    assert [stage["steps"] for stage in made["stages"]] == [2, 1] and made["seed"] == 4
    assert made["stages"][0]["model"] != made["stages"][1]["model"]
    files = [tmp_path / f"{i}.png" for i in range(3)]
    filling.fill(cascade, PROMPTS, files, batch_size=1, seed=4)
    files[2].unlink()
    assert filling.fill(cascade, PROMPTS, files, batch_size=1, seed=4) == 1
    whole = cascade.text_to_image(PROMPTS, seed=4)
    for file, image in zip(files, whole, strict=True):
        assert np.abs(np.asarray(Image.open(file), int) - image).max() <= 1


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--model=M", "--steps=2,3"], "--steps: several values are for the stages of --cascade"),
        (["--model=M", "--stages"], "--stages: needs --cascade"),
        (["--cascade=A,B", "--model=M"], "--model=M: can't be given with --cascade"),
        (["--cascade=A,B", "--image=x"], "--image=x: can't be given with --cascade"),
        (["--cascade=A,B", "--stages"], "--stages: needs --images"),
        (["--cascade=A,B", "--steps=1,2,3"], r"steps=\[1, 2, 3\]: 3 values; must be one, or one"),
        (["--cascade=A,B", "--guidance_interval=0.2,0.8/0.5"], "--guidance_interval=0.5: must be"),
        (["--cascade=A,B", "--batch_size=4,4,4"], r"batch_size=\[4, 4, 4\]: 3 values"),
    ],
)
def test_flags_that_are_not_of_a_cascade_are_refused_in_one_line(flags, error):
    with pytest.raises(ValueError, match=f"^{error}") as raised:
        command_flags.run(SAMPLE, ["--prompt=a", *flags])
    assert "\n" not in str(raised.value)
