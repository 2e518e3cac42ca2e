"""Folders that are refused, in one line with file and tensor: other files, damaged, incomplete."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import safetensors.numpy
import torch
from text_folders import TENSOR, WEIGHTS, assert_refused, rewritten, text_model
from torch_models import edit_config

from contextdiff_jax.pretrained import load_clip_text, load_t5, load_unet, load_vae
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.unet import MODEL as UNET_MODEL


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return text_model()


@pytest.fixture
def folder(model, tmp_path):
    """A fresh folder, to be damaged."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
)


@pytest.mark.parametrize(
    "name, content, part",
    [
        (WEIGHTS, POINTER, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (WEIGHTS, b"", "truncated: 0 bytes"),
        (WEIGHTS, b"<html><body>404</body></html>", "not a safetensors file"),
        (WEIGHTS, b"PK\x03\x04" + bytes(60), "not a safetensors file"),
        (
            WEIGHTS,
            (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995,
            "not a safetensors file",
        ),
        ("config.json", POINTER, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ("config.json", b"", "is empty (0 bytes)"),
        ("config.json", b" \n", "is empty (0 bytes)"),
        ("config.json", b"[" * 200_000, "not valid JSON (nested too deeply)"),
        ("config.json", b'{"a": ' * 200_000, "not valid JSON (nested too deeply)"),
        ("config.json", b'{"hidden_size": 16', "not valid JSON"),
        ("config.json", b'{"num_attention_heads": 0}', "num_attention_heads=0"),
        ("config.json", b'{"text_config": 3}', "config.json: "),
    ],
)
def test_files_that_are_something_else_are_named_in_one_line(folder, name, content, part):
    (folder / name).write_bytes(content)
    assert_refused(load_clip_text, folder, str(folder / name), part)


def test_a_config_with_a_byte_order_mark_is_read_and_a_folder_in_its_place_is_named(folder):
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_clip_text(folder).config.hidden_size == 16
    path.unlink()
    path.mkdir()
    assert_refused(load_clip_text, folder, str(path), "can't be read (Is a directory)")


@pytest.mark.parametrize(
    "changes",
    [
        dict(norm_num_groups=0),
        dict(block_out_channels=None),
        dict(attention_head_dim=[]),
        dict(layers_per_block="two"),
        dict(down_block_types={}),
    ],
)
def test_values_of_another_kind_are_refused_with_the_files_name(tmp_path, changes):
    values = {"_class_name": "UNet2DConditionModel"} | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = functools.partial(read_config, UNET_MODEL)
    assert_refused(read, tmp_path, str(tmp_path / "config.json"))


def test_missing_unknown_and_wrong_tensors_are_all_listed_in_one_line(folder):
    def change(tensors):
        del tensors["text_projection.weight"]
        tensors["extra.weight"] = torch.zeros(3)
        tensors["text_model.final_layer_norm.bias"] = torch.zeros(5)

    rewritten(folder, change)
    assert_refused(
        load_clip_text,
        folder,
        str(folder / WEIGHTS),
        "3 tensors",
        "text_projection.weight: missing",
        "extra.weight: unknown",
        "text_model.final_layer_norm.bias: shape (5,), the config asks for (16,)",
    )


@pytest.mark.parametrize(
    "left, parts",
    [
        (-1, ("truncated", "1 tensors are incomplete, the first is text_projection.weight")),
        (0.5, ("truncated", "tensors are incomplete, the first is text_model.encoder.layers.")),
        (100, ("truncated within its header: 100 bytes",)),
        (5, ("truncated: 5 bytes",)),
        (0, ("truncated: 0 bytes",)),
    ],
)
def test_a_truncated_file_is_named_with_the_first_tensor_that_it_lacks(folder, left, parts):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(
        data[: int(left * len(data)) if isinstance(left, float) else left]
    )
    assert_refused(load_clip_text, folder, str(folder / WEIGHTS), *parts)


def test_what_is_no_safetensors_file_is_named(folder):
    (folder / WEIGHTS).write_bytes(b"\x80\x02}q\x00." * 1000)
    assert_refused(load_clip_text, folder, str(folder / WEIGHTS), "not a safetensors file")


def test_a_missing_shard_and_a_shard_without_its_tensors_are_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    names = sorted(safetensors.numpy.load_file(second))
    shutil.copy(first, second)
    assert_refused(
        load_clip_text, tmp_path, str(second), "lacks", names[0], "which the index promises"
    )
    second.unlink()
    assert_refused(
        load_clip_text,
        tmp_path,
        str(second),
        "missing shard",
        "model.safetensors.index.json",
        "it holds",
    )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "../a.safetensors"}}))
    assert_refused(
        load_clip_text,
        tmp_path,
        str(index),
        "a.weight",
        "must be a safetensors file of the same folder",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(folder, value, dtype):
    def change(tensors):
        tensors[TENSOR] = tensors[TENSOR].to(dtype)
        tensors[TENSOR][3, 5] = value

    rewritten(folder, change)
    assert_refused(load_clip_text, folder, str(folder / WEIGHTS), TENSOR, "holds NaN or infinity")


def test_the_largest_finite_weights_are_read(folder):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        limit = torch.finfo(dtype).max
        largest = torch.full((16, 24), -limit, dtype=dtype)
        rewritten(folder, lambda tensors: tensors.update({TENSOR: largest}))  # noqa: B023
        assert float(load_clip_text(folder).layers[1].fc2.kernel[0, 0]) == -limit


def test_whole_numbers_are_refused_as_weights(folder):
    rewritten(
        folder, lambda tensors: tensors.update({TENSOR: torch.zeros(16, 24, dtype=torch.int8)})
    )
    assert_refused(load_clip_text, folder, TENSOR, "holds int8")


def test_a_pickle_is_refused_with_the_reason(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert_refused(
        load_clip_text,
        folder,
        "pytorch_model.bin",
        "can run any code",
        "convert it to model.safetensors",
    )


@pytest.mark.parametrize("load", [load_unet, load_vae, load_t5])
def test_a_folder_of_another_architecture_is_refused(folder, load):
    assert_refused(
        load,
        folder,
        str(folder / "config.json"),
        "CLIPTextModelWithProjection",
        "another architecture",
    )


@pytest.mark.parametrize(
    "changes, part",
    [
        (
            dict(_class_name="UNet2DConditionModel", architectures=None),
            "_class_name='UNet2DConditionModel'",
        ),
        (
            dict(model_type="siglip_text_model", architectures=None),
            "model_type='siglip_text_model': another",
        ),
        (dict(architectures=["BertModel"]), "architectures='BertModel': another architecture"),
        (dict(hidden_act="tanh"), "hidden_act='tanh': unknown"),
        (dict(hidden_size="wide"), "hidden_size='wide': must be a whole number"),
    ],
)
def test_a_config_of_another_model_or_with_an_unknown_option_is_refused(folder, changes, part):
    edit_config(folder, **changes)
    assert_refused(load_clip_text, folder, str(folder / "config.json"), part)


def test_a_config_that_is_no_json_object_and_an_absent_folder_are_named(folder, tmp_path):
    (folder / "config.json").write_text("[1]")
    assert_refused(load_clip_text, folder, "config.json: not a JSON object")
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    assert_refused(load_clip_text, folder, "config.json: not valid JSON")
    assert_refused(load_clip_text, tmp_path / "nowhere", "nowhere/config.json: no such file")
