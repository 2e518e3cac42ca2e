"""`contextdiff_jax.convert`: Hugging Face folders in our format and back, and what it refuses."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import command
from diffusers import StableDiffusionPipeline
from flax import nnx
from torch_models import assert_same_tensors, randomised, stable_diffusion

from contextdiff_jax.parallel.mesh import MeshConfig, make_mesh, state_shardings
from contextdiff_jax.pretrained import (
    conversion,
    load_clip_text,
    load_t5,
    load_unet,
    load_vae,
    native,
)
from contextdiff_jax.pretrained.kinds import Options

CONFIG = dict(
    vocab_size=56, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)


def convert(source, target, **options) -> list[str]:
    lines = []
    conversion.to_native(source, target, Options(**options), lines.append)
    return lines


def back(source, target) -> None:
    conversion.from_native(source, target, Options(), lambda line: None)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    stable_diffusion(folder / "words").save_pretrained(folder / "sd")
    return folder / "sd"


def test_a_pipeline_goes_to_our_format_and_back_by_command_with_the_same_bits_and_configs(
    pipeline, tmp_path
):
    ours, again = tmp_path / "ours", tmp_path / "again"
    result = command("convert", f"--source={pipeline}", f"--target={ours}")
    assert result.returncode == 0, result.stderr
    for line in (
        "unet: unet, ",
        "vae: vae, ",
        "text_encoder: clip_text, ",
        "tokenizer: copied",
        "scheduler: copied",
    ):
        assert line in result.stdout
    assert not list(ours.rglob("*.safetensors"))
    result = command("convert", f"--source={ours}", f"--target={again}", "--reverse")
    assert result.returncode == 0, result.stderr
    files = sorted(path.relative_to(pipeline) for path in pipeline.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".json":
            assert json.loads((pipeline / file).read_text()) == json.loads(
                (again / file).read_text()
            ), file
    for name in ("unet", "vae", "text_encoder"):
        assert_same_tensors(pipeline / name, again / name)
    StableDiffusionPipeline.from_pretrained(again)


def test_converted_models_are_loaded_as_the_folders_they_came_from(pipeline, tmp_path):
    convert(pipeline, tmp_path / "ours")
    rule = functools.partial(state_shardings, make_mesh(MeshConfig()))
    for name, load in (("unet", load_unet), ("vae", load_vae), ("text_encoder", load_clip_text)):
        theirs, ours = load(pipeline / name), load(tmp_path / "ours" / name, shardings=rule)
        assert ours.config == theirs.config
        jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))
    half = load_unet(tmp_path / "ours" / "unet", param_dtype=jax.numpy.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {
        jax.numpy.dtype("bfloat16")
    }
    with pytest.raises(ValueError, match="model.json: kind='vae': another model; wanted 'unet'"):
        load_unet(tmp_path / "ours" / "vae")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_go_round_bit_for_bit(tmp_path, dtype):
    model = randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG))).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    lines = convert(tmp_path / "theirs", tmp_path / "ours")
    assert len(lines) == 1 and lines[0].startswith("clip_text, 20 tensors")
    back(tmp_path / "ours", tmp_path / "again")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")
    assert transformers.CLIPTextModel.from_pretrained(tmp_path / "again").dtype == dtype


def test_of_a_whole_t5_the_encoder_is_kept(tmp_path):
    config = transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2
    )
    model = randomised(transformers.T5ForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "ours")
    back(tmp_path / "ours", tmp_path / "again")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "again")
    assert torch.equal(
        encoder.encoder.block[0].layer[1].DenseReluDense.wi.weight,
        model.encoder.block[0].layer[1].DenseReluDense.wi.weight,
    )
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [
        "T5EncoderModel"
    ]
    ours, again = (nnx.state(load_t5(tmp_path / name)) for name in ("ours", "again"))
    jax.tree.map(np.testing.assert_array_equal, ours, again)


def test_pickles_of_models_that_we_do_not_have_are_left_out(pipeline, tmp_path):
    source = tmp_path / "sd"
    (source / "safety_checker").mkdir(parents=True)
    (source / "safety_checker" / "config.json").write_text(
        '{"architectures": ["StableDiffusionSafetyChecker"]}'
    )
    (source / "safety_checker" / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "safety_checker" / "model.safetensors").write_bytes(b"weights")
    (source / "model_index.json").write_text(
        '{"safety_checker": ["a", "b"], "vae": [null, null], "_class_name": "c"}'
    )
    assert convert(source, tmp_path / "ours") == ["safety_checker: copied"]
    copied = sorted(path.name for path in (tmp_path / "ours" / "safety_checker").iterdir())
    assert copied == ["config.json", "model.safetensors"]


def test_a_failed_conversion_leaves_nothing_behind(pipeline, tmp_path):
    source = tmp_path / "sd"
    source.mkdir()
    for name in ("vae", "unet", "model_index.json"):
        (source / name).symlink_to(pipeline / name)
    index = json.loads((pipeline / "model_index.json").read_text())
    with pytest.raises(ValueError, match="no such folder, though model_index.json names it"):
        convert(source, tmp_path / "ours")
    (source / "model_index.json").unlink()
    (source / "model_index.json").write_text(json.dumps({"vae": index["vae"], "bad": ["a", "b"]}))
    (source / "bad").mkdir()
    (source / "bad" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="bad/diffusion_pytorch_model.safetensors: no such file"):
        convert(source, tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sd"]


def test_what_cannot_be_converted_is_refused(pipeline, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="--target=.*full: exists already"):
        convert(pipeline / "vae", tmp_path / "full")
    with pytest.raises(
        ValueError, match="--source=.*full: holds no model of ours .unet, mmdit, vae, clip_text"
    ):
        convert(tmp_path / "full", tmp_path / "new")
    convert(pipeline / "vae", tmp_path / "ours")
    with pytest.raises(ValueError, match="in our format already; --reverse writes it back"):
        convert(tmp_path / "ours", tmp_path / "new")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text(
        '{"architectures": ["CLIPModel"], "model_type": "clip"}'
    )
    with pytest.raises(
        ValueError, match="may be clip_text and clip_vision; convert a folder of one of them"
    ):
        convert(tmp_path / "clip", tmp_path / "new")
    (tmp_path / "ours" / native.MODEL_FILE).write_text('{"kind": "gan", "config": {}}')
    with pytest.raises(ValueError, match="kind='gan': unknown; one of unet, mmdit, vae"):
        back(tmp_path / "ours", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_of_ours_that_was_copied_in_part_is_named(tmp_path):
    model = randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CONFIG)))
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    params = tmp_path / "ours" / native.PARAMS_FOLDER
    arrays = max(params.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    for file in (arrays, params / "array_metadatas" / "process_0", params / "_METADATA"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 5])
        with pytest.raises(
            ValueError, match="ours/params: can't be read; copied in part?"
        ) as error:
            load_clip_text(tmp_path / "ours")
        assert "\n" not in str(error.value)
    for values in ({"kind": "clip_text", "config": 3}, {"kind": ["clip_text"], "config": {}}):
        (tmp_path / "ours" / native.MODEL_FILE).write_text(json.dumps(values))
        with pytest.raises(ValueError, match="model.json: (kind|config)=.*: not as convert wrote"):
            load_clip_text(tmp_path / "ours")


def test_a_tokenizer_that_git_lfs_has_not_brought_is_not_copied(pipeline, tmp_path):
    source = tmp_path / "sd"
    shutil.copytree(pipeline, source)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
    next((source / "tokenizer").glob("*.json")).write_text(pointer)
    with pytest.raises(ValueError, match="tokenizer/.*: a Git LFS pointer.*run `git lfs pull`"):
        convert(source, tmp_path / "ours")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--target=new",), "--source: missing; name a folder"),
        (("--source=nowhere", "--target=new"), "--source=nowhere: no such folder"),
    ],
)
def test_the_command_gives_one_line_and_status_2(arguments, message):
    result = command("convert", *arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"error: {message}"]
