"""A trained model as one folder: `Pipeline.save`, what reads it, the hub, and what is refused."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import stat
import tarfile

import command_flags
import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, SMALLEST, command, config_dict, one_line, random_params
from flax import nnx
from latent_runs import PROMPTS, config_of
from loopback_hub import below, point_to, serving
from PIL import Image
from torch_models import SMALLEST as SMALLEST_UNET
from torch_models import stable_diffusion, stable_diffusion_xl

from contextdiff_jax import Pipeline
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.models.lora import add_lora, merge_lora
from contextdiff_jax.runs import saved
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.saved import Description
from contextdiff_jax.runtime import hub as names
from contextdiff_jax.runtime.hub import SHIPPED, find, shipped_names
from contextdiff_jax.settings import parse, to_config

PROMPT = "a large red circle"
HERE = {"data.path": "/home/somebody/pictures", "train.init_from": "/home/somebody/run"}


@pytest.fixture(scope="module")
def settings():
    return parse(config_dict(**SMALLEST, **HERE, **{"sample.sampler": "ddim"}))


@pytest.fixture(scope="module")
def params(settings):
    return random_params(settings)


@pytest.fixture
def folder(settings, params, tmp_path):
    """The model as it is saved."""
    of_run(
        settings, load_tokenizer(), params, description=Description(step=1234, weights="ema")
    ).save(tmp_path / "model")
    return tmp_path / "model"


def assert_same(params, others, rtol=0.0) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(others)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        assert other.dtype == one.dtype
        np.testing.assert_allclose(other, one, rtol=rtol, atol=rtol)


def test_what_is_saved_is_opened_with_the_same_bits_and_settings_wherever_it_lies(
    settings, params, folder, tmp_path
):
    assert below(folder) == {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644
    moved = folder.rename(tmp_path / "moved")
    run = load_run(str(moved))
    assert run.step == 1234
    assert_same(params, run.params)
    assert run.settings.data.tokenizer == str(moved / "tokenizer.json")
    kept, there = to_config(run.settings), to_config(settings)
    del kept["mesh"], there["mesh"]  # of the devices that are here
    for field, value in {"path": "", "tokenizer": str(moved / "tokenizer.json")}.items():
        there["data"][field] = value
    there["train"]["init_from"] = ""
    assert kept == there
    assert "/home" not in (moved / "config.json").read_text() + (moved / "README.md").read_text()


@pytest.mark.parametrize("dtype, rtol", [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_weights_are_stored_in_half_the_bytes_if_asked_for(
    settings, params, folder, tmp_path, dtype, rtol
):
    half = tmp_path / dtype
    of_run(settings, load_tokenizer(), params).save(half, dtype=dtype)
    assert_same(params, load_run(str(half)).params, rtol)
    sizes = [(each / "model.safetensors").stat().st_size for each in (folder, half)]
    assert sizes[1] < 0.6 * sizes[0]


def test_the_card_says_what_it_is_and_how_to_use_it_and_one_that_is_there_stays(
    settings, params, folder, tmp_path
):
    card = (folder / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert "library_name: contextdiff_jax" in head and "license" not in head
    count = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    for words in (
        "# model",
        'python -m contextdiff_jax.sample --model=model --prompt="',
        f"{count:.2f} M, stored as float32",
        "1,234 steps of 8 pictures, `data.source=shapes`",
        "`ddim`, 4 steps",
    ):
        assert words in body
    there = tmp_path / "there"
    there.mkdir()
    (there / "README.md").write_text("mine")
    (there / "LICENSE").write_text("MIT")
    pipeline = of_run(settings, load_tokenizer(), params)
    pipeline.save(there)
    assert (there / "README.md").read_text() == "mine" and (there / "LICENSE").exists()
    assert load_run(str(there)).step == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "there"}
    with pytest.raises(ValueError, match="folder=.*there: exists already; name a new folder"):
        pipeline.save(there)
    assert (there / "README.md").read_text() == "mine"
    pipeline.save(tmp_path / "other", card=there / "README.md", license="mit")
    assert (tmp_path / "other" / "README.md").read_text().startswith("---\nlicense: mit\n")
    assert (tmp_path / "other" / "README.md").read_text().endswith("---\n\nmine")


def test_a_low_rank_change_is_saved_in_the_layers_that_it_changes(settings, tmp_path):
    changed = parse(config_dict(**SMALLEST, **{"train.trainable": "lora"}))
    params = add_lora(random_params(settings), 2, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)  # its second factor begins at 0
    of_run(changed, load_tokenizer(), params).save(tmp_path / "model")
    run = load_run(str(tmp_path / "model"))
    assert run.settings.train.trainable == "full"
    assert_same(merge_lora(params), run.params)


def test_frozen_networks_and_tokenizers_come_along(tmp_path):
    sd = tmp_path / "sd"
    stable_diffusion_xl(tmp_path / "words", SMALLEST_UNET).save_pretrained(sd)
    settings = parse(config_of(sd))
    params, frozen = random_params(settings), load_frozen(settings)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    ids = tokenizer.encode(PROMPTS, settings.data.max_length)
    of_run(settings, tokenizer, params, frozen=frozen).save(tmp_path / "model")
    shutil.rmtree(sd)
    shutil.rmtree(tmp_path / "words")
    run = load_run(str(tmp_path / "model"))
    assert run.settings.pretrained == ""
    assert_same(params, run.params)
    assert_same(nnx.state(frozen.vae), nnx.state(load_frozen(run.settings).vae))
    assert_same(frozen.text, load_frozen(run.settings).text)
    for one, other in zip(
        ids, run.tokenizer.encode(PROMPTS, settings.data.max_length), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_stable_diffusion_folder_is_saved_as_a_copy_with_a_card(tmp_path):
    sd = tmp_path / "sd"
    stable_diffusion(tmp_path / "words", unet_changes=SMALLEST_UNET).save_pretrained(sd)
    (sd / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    pipeline = Pipeline.open(sd)
    pipeline.save(tmp_path / "copy")
    assert below(tmp_path / "copy") - {"README.md"} == {
        name for name in below(sd) if not name.endswith(".bin")
    }
    assert "library_name: contextdiff_jax" in (tmp_path / "copy" / "README.md").read_text()
    with pytest.raises(ValueError, match="dtype='float16': a Stable Diffusion folder is copied"):
        pipeline.save(tmp_path / "half", dtype="float16")
    with pytest.raises(ValueError, match="a model with a guide .* is two"):
        pipeline.guided_by(pipeline).save(tmp_path / "two")


def damaged(folder: pathlib.Path, change) -> None:
    """Applies `change` to config.json's values and to the tensors."""
    values = json.loads((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(values, tensors)
    (folder / "config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v, t: v.update(format=2), "config.json: format=2: of another version; this one"),
        (lambda v, t: v.pop("step"), "config.json: lacks config or step"),
        (
            lambda v, t: v["config"]["data"].update(tokenizer="../secret"),
            "data.tokenizer='../secret': must lie in the folder",
        ),
        (
            lambda v, t: v["config"]["data"].update(tokenizer="/etc/passwd"),
            "data.tokenizer='/etc/passwd': must lie in the folder",
        ),
        (lambda v, t: v["config"].update(data="x"), "data='x': must be a section"),
        (lambda v, t: v["config"]["train"].update(stepz=1), "train.stepz=1: unknown field"),
        (
            lambda v, t: t.pop("context.gamma"),
            "model.safetensors: context.gamma: missing, unknown or of another shape",
        ),
        (
            lambda v, t: t.update({"context.gamma": np.full_like(t["context.gamma"], np.nan)}),
            "model.safetensors: context.gamma: holds NaN or infinity",
        ),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused_in_one_line(folder, change, message):
    damaged(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_run(str(folder))
    one_line(error)


def test_what_a_saved_model_lacks_is_refused_in_one_line(folder, settings, params, tmp_path):
    with pytest.raises(ValueError, match="--weights=params: .* holds ema alone"):
        load_run(str(folder), "params")
    with pytest.raises(ValueError, match="--ema_length=0.1: .* is no run"):
        load_run(str(folder), ema_length=0.1)
    large = jax.tree.map(lambda leaf: leaf * 1e6, params)
    with pytest.raises(ValueError, match="dtype='float16': can't hold .*; take 'bfloat16'"):
        of_run(settings, load_tokenizer(), large).save(tmp_path / "large", dtype="float16")
    with pytest.raises(ValueError, match="dtype='int8': unknown; one of float32, float16"):
        of_run(settings, load_tokenizer(), params).save(tmp_path / "large", dtype="int8")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: refused, a pickle can run any code"):
        load_run(str(folder))
    assert not (tmp_path / "large").exists()


def test_a_model_goes_to_the_hub_and_is_sampled_there_by_its_name(settings, params, tmp_path):
    """By the command, in a process that knows the hub by HF_ENDPOINT alone."""
    pipeline = of_run(settings, load_tokenizer(), params)
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        point_to(patch, hub.address, tmp_path / "unused")
        address = pipeline.push_to_hub("me/shapes", token="hf_loopback", license="mit")
        assert address.startswith(f"{hub.address}/me/shapes/commit/")
        card = hub.repos["models", "me/shapes"]["main"]["README.md"].decode()
        assert "license: mit" in card and 'Pipeline.open("me/shapes")' in card
        sampled = command(
            "sample",
            "--model=me/shapes",
            f"--prompt={PROMPT}",
            "--seed=3",
            f"--out={tmp_path}/grid.png",
            f"--images={tmp_path}/each",
            env={"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
            | {"XDG_CACHE_HOME": str(tmp_path / "programs")},
        )
        assert sampled.returncode == 0, sampled.stderr
    made = pipeline.text_to_image([PROMPT], seed=3)[0]
    off = np.abs(np.asarray(Image.open(tmp_path / "each" / "0000.png")).astype(int) - made)
    assert off.max() <= 1


def test_a_run_starts_from_a_pipeline_of_the_hub_and_its_config_keeps_the_names(
    tmp_path, monkeypatch
):
    sd = tmp_path / "sd"
    stable_diffusion(tmp_path / "words", unet_changes=SMALLEST_UNET).save_pretrained(sd)
    with serving() as hub:
        point_to(monkeypatch, hub.address, tmp_path / "cache")
        hub.add("org/sd", {name: (sd / name).read_bytes() for name in below(sd)})
        config = config_of("org/sd@main")
        assert config == config_of("org/sd@main") == config_of(config["model"]["pretrained"])
        names = config["latent"]["vae"], config["text"]["pretrained"], config["data"]["tokenizer"]
        assert names == ("org/sd@main/vae", "org/sd@main/text_encoder", "org/sd@main/tokenizer")
        settings = parse(config)
        cached = os.path.join(find("org/sd"), "vae")
        assert settings.latent.vae == cached and settings.latent.config.latent_channels == 4
        local = config_of(sd)
        assert local["latent"]["vae"] == str(sd / "vae")
        assert Pipeline.open("org/sd").opened.shape == Pipeline.open(sd).opened.shape


def test_the_command_writes_a_run_as_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the run's config names its tokenizer from there
    with tarfile.open(ROOT / "tests" / "saved_run" / "run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    run, model = tmp_path / "run", tmp_path / "model"
    convert = ROOT / "contextdiff_jax" / "convert.py"
    options = ["--dtype=float16", "--license=mit"]
    command_flags.run(convert, [f"--source={run}", f"--target={model}", *options])
    before, after = load_run(str(run)), load_run(str(model))
    assert after.step == before.step == 300
    assert_same(before.params, after.params, 1e-3)
    assert after.settings.data.tokenizer == str(model / "tokenizer.json")
    assert "license: mit" in (model / "README.md").read_text()
    for more, message in (
        ([f"--source={model}", "--dtype=float16"], "--dtype=float16: is for a run, .* is none"),
        ([f"--source={run}", "--reverse", "--license=x"], "--license=x: .* without --reverse"),
        ([f"--source={model}"], "--source=.*model: holds no model of ours"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            command_flags.run(convert, [f"--target={tmp_path}/new", *more])
        one_line(error)


def test_results_of_a_model_by_its_name_need_a_folder(folder, monkeypatch):
    monkeypatch.setattr(names, "SHIPPED", folder.parent)
    evaluate = ROOT / "contextdiff_jax" / "evaluate.py"
    with pytest.raises(ValueError, match="--out: missing; --workdir=model is a name"):
        command_flags.run(evaluate, ["--workdir=model", "--metrics=bound"])


@pytest.mark.parametrize("folder", sorted(SHIPPED.iterdir()), ids=lambda path: path.name)
def test_a_shipped_model_is_small_has_its_licence_and_card_and_opens(folder):
    """While its weights are not in the repository, card and licence alone are looked at."""
    card = (folder / "README.md").read_text()
    assert "license: " in card.partition("\n---\n")[0] and (folder / "LICENSE").is_file()
    assert f"--model={folder.name}" in card
    if folder.name in shipped_names():
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
        run = load_run(folder.name)
        assert run.step > 0 and run.settings.shape[-1] == 3


def test_the_format_is_what_the_page_says(folder):
    values = json.loads((folder / "config.json").read_text())
    assert list(values) == ["model_type", "format", "step", "weights", "config"]
    assert values["model_type"] == saved.MODEL_TYPE and values["format"] == saved.FORMAT
