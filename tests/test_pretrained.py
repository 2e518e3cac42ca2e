"""Folders: float types, shards, shardings, and what is refused, with file and tensor."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from conftest import ON_EIGHT, ROOT
from diffusers import UNet2DConditionModel
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from torch_models import (
    assert_close,
    assert_same_tensors,
    edit_config,
    nchw,
    nhwc,
    normal,
    randomised,
    stored,
)

from contextdiff_jax.models.clip import CLIPText, CLIPTextConfig
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.parallel.mesh import MeshConfig, make_mesh, state_shardings
from contextdiff_jax.pretrained import load_clip_text, load_t5, load_unet, load_vae, save_clip_text
from contextdiff_jax.pretrained.casting import copy_finite
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.unet import MODEL as UNET_MODEL

WEIGHTS = "model.safetensors"
TENSOR = "text_model.encoder.layers.1.mlp.fc2.weight"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        projection_dim=6,
        eos_token_id=2,
    )
    return randomised(transformers.CLIPTextModelWithProjection(config))


@pytest.fixture
def folder(model, tmp_path):
    """A fresh folder, to be damaged."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_refused(load, folder, *parts: str) -> None:
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def rewritten(folder, change) -> None:
    """Applies `change` to the tensors of the folder's file."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_type_goes_round_bit_for_bit(model, tmp_path, dtype):
    source, target = tmp_path / "source", tmp_path / "target"
    config = model.config
    typed = transformers.CLIPTextModelWithProjection(config).to(dtype)
    typed.load_state_dict(model.state_dict())
    typed.save_pretrained(source)
    module = load_clip_text(source)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(module))} == {
        str(dtype).removeprefix("torch.")
    }
    save_clip_text(module, target)
    assert_same_tensors(source, target)
    again = transformers.CLIPTextModelWithProjection.from_pretrained(target)
    assert again.dtype == dtype
    # Products are float32 all the same, and another type can be asked for.
    ids = jnp.array([[1, 2, 3]])
    assert module(ids).last.dtype == jnp.float32
    wide = load_clip_text(source, param_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(wide))} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(wide(ids).last, module(ids).last)


def test_parameters_are_widened_to_the_products_type_where_it_holds_them(model, tmp_path):
    def types(stored, **options):
        typed = transformers.CLIPTextModelWithProjection(model.config).to(stored)
        typed.load_state_dict(model.state_dict())
        typed.save_pretrained(tmp_path / str(stored))
        module = load_clip_text(tmp_path / str(stored), widen=True, **options)
        return module, {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(module))}

    module, held = types(torch.float16)
    assert held == {"float32"}
    plain = load_clip_text(tmp_path / "torch.float16")
    for wide, half in zip(*(jax.tree.leaves(nnx.state(m)) for m in (module, plain)), strict=True):
        np.testing.assert_array_equal(wide, half)
    ids = jnp.array([[1, 2, 3]])
    np.testing.assert_array_equal(module(ids).last, plain(ids).last)
    assert types(torch.bfloat16)[1] == {"float32"}
    # float16 has numbers that bfloat16 hasn't, and the other way round.
    assert types(torch.float16, dtype=jnp.bfloat16)[1] == {"float16"}
    assert types(torch.bfloat16, dtype=jnp.float16)[1] == {"bfloat16"}
    assert types(torch.float32, dtype=jnp.bfloat16)[1] == {"float32"}
    assert types(torch.float16, param_dtype=jnp.float16)[1] == {"float16"}


@pytest.mark.parametrize("turn", [lambda a: a, np.transpose])
@pytest.mark.parametrize("shape", [(63488,), (62, 1024), (8, 31, 16, 16), (0, 3), ()])
def test_every_float16_is_copied_as_numpy_converts_it(shape, turn):
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]  # 63488: normal and subnormal ones, both zeros
    values = turn(numbers[: int(np.prod(shape))].reshape(shape))
    target = np.full(values.shape, np.nan, np.float32)
    copy_finite(values, target)
    np.testing.assert_array_equal(target.view(np.uint32), values.astype(np.float32).view(np.uint32))


def test_a_module_without_drawn_parameters_has_the_structure_of_a_drawn_one():
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, projection_dim=6
    )
    ours, drawn = (
        nnx.eval_shape(lambda rngs=rngs: CLIPText(config, rngs=rngs()))
        for rngs in (Undrawn, lambda: nnx.Rngs(0))
    )
    assert nnx.graphdef(ours) == nnx.graphdef(drawn)
    assert nnx.state(ours) == nnx.state(drawn)


def test_devices_of_a_cpu_share_the_memory_of_parameters_that_are_not_split(folder):
    """Without it a device a core takes the weights' memory as often."""
    code = (
        "import sys, jax\n"
        "from flax import nnx\n"
        "from contextdiff_jax.parallel.mesh import local_mesh, replicated\n"
        "from contextdiff_jax.pretrained import load_clip_text\n"
        "place = lambda params: jax.tree.map(lambda _: replicated(local_mesh()), params)\n"
        "text = load_clip_text(sys.argv[1], shardings=place)\n"
        "for leaf in jax.tree.leaves(nnx.state(text)):\n"
        "    shards = [shard.data for shard in leaf.addressable_shards]\n"
        "    assert len(shards) == 3\n"
        "    assert len({shard.unsafe_buffer_pointer() for shard in shards}) == 1\n"
    )
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code, folder],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_a_file_of_mixed_types_keeps_each(folder, tmp_path):
    rewritten(folder, lambda tensors: tensors.update({TENSOR: tensors[TENSOR].half()}))
    save_clip_text(load_clip_text(folder), tmp_path / "target")
    assert_same_tensors(folder, tmp_path / "target")


def test_sharded_files_and_half_variants_are_read(model, folder, tmp_path):
    whole = nnx.state(load_clip_text(folder))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(load_clip_text(tmp_path / "sharded")), whole
    )
    (folder / WEIGHTS).rename(folder / "model.fp16.safetensors")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_clip_text(folder)), whole)


@pytest.mark.parametrize("place", [".\\{}", "./{}", "text_encoder\\{}", "part\\{}"])
def test_an_index_with_another_systems_paths_is_read(model, tmp_path, place):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    if place.startswith("part"):
        (tmp_path / "part").mkdir()
        for shard in tmp_path.glob("*.safetensors"):
            shard.rename(tmp_path / "part" / shard.name)
    values["weight_map"] = {name: place.format(f) for name, f in values["weight_map"].items()}
    index.write_text(json.dumps(values))
    assert load_clip_text(tmp_path).config.hidden_size == 16
    for wrong in (
        "..\\a.safetensors",
        "C:\\a.safetensors",
        "\\\\host\\share\\a.safetensors",
        "/a.safetensors",
        3,
    ):
        index.write_text(json.dumps({"weight_map": {"a.weight": wrong}}))
        assert_refused(load_clip_text, tmp_path, "must be a safetensors file of the same folder")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    ],
)
def test_numbers_of_eight_bits_are_read_as_torch_widens_them(folder, dtype):
    kept = {}

    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype) if tensor.ndim == 2 else tensor.bfloat16()
        kept.update(tensors)

    rewritten(folder, change)
    kernel = load_clip_text(folder).layers[1].fc2.kernel[...]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel.T, kept[TENSOR].float().numpy())
    nan = kept[TENSOR].float()
    nan[1, 2] = float("nan")
    rewritten(folder, lambda tensors: tensors.update({TENSOR: nan.to(dtype)}))
    assert_refused(load_clip_text, folder, TENSOR, "holds NaN or infinity")


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


def test_names_from_before_transformers_5_are_read_and_kept(tmp_path):
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = randomised(transformers.CLIPTextModel(config))
    source, target = tmp_path / "source", tmp_path / "target"
    model.save_pretrained(source)
    tensors = {f"text_model.{name}": tensor for name, tensor in stored(source).items()}
    buffer = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    safetensors.torch.save_file(tensors | buffer, source / WEIGHTS, metadata={"format": "pt"})
    save_clip_text(load_clip_text(source), target)
    assert stored(target).keys() == tensors.keys()
    again = transformers.CLIPTextModel.from_pretrained(target)
    for (name, ours), theirs in zip(
        again.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_parameters_go_straight_to_their_shards(folder):
    mesh = jax.make_mesh((1,), ("fsdp",))
    spread = load_clip_text(
        folder,
        shardings=lambda tree: jax.tree.map(lambda leaf: NamedSharding(mesh, P("fsdp")), tree),
    )
    plain = load_clip_text(folder)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(spread), nnx.state(plain))
    assert all(
        leaf.sharding == NamedSharding(mesh, P("fsdp"))
        for leaf in jax.tree.leaves(nnx.state(spread))
    )
    rule = functools.partial(state_shardings, make_mesh(MeshConfig()))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(load_clip_text(folder, shardings=rule)),
        nnx.state(plain),
    )


EIGHT_DEVICES = """
import functools, pathlib, sys
import jax, numpy as np
from flax import nnx
from contextdiff_jax.parallel.mesh import MeshConfig, make_mesh, state_shardings
from contextdiff_jax.pretrained import conversion, load_clip_text
from contextdiff_jax.pretrained.kinds import Options
source, target = map(pathlib.Path, sys.argv[1:])
rule = functools.partial(state_shardings, make_mesh(MeshConfig(data=2, fsdp=4)))
conversion.to_native(source, target, Options())
plain = nnx.state(load_clip_text(source))
for folder in (source, target):
    state = nnx.state(load_clip_text(folder, shardings=rule))
    jax.tree.map(np.testing.assert_array_equal, state, plain)
    for leaf in jax.tree.leaves(state):
        divisible = any(side % 4 == 0 for side in leaf.shape)
        sizes = {shard.data.size for shard in leaf.addressable_shards}
        # Some biases are on all.
        assert sizes == {leaf.size // 4 if divisible else leaf.size} or leaf.ndim == 1
print("8 devices", jax.device_count())
"""


def test_on_eight_devices_each_gets_its_part_from_either_format(folder, tmp_path):
    environment = os.environ | {
        **ON_EIGHT,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, folder, tmp_path / "ours"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "8 devices 8" in result.stdout, result.stderr


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


FULL_SIZE = """
import pathlib, re, sys, time
import jax
from flax import nnx
from contextdiff_jax.pretrained import load_unet
folder = pathlib.Path(sys.argv[1])
start = time.time()
jax.block_until_ready(jax.tree.leaves(nnx.state(load_unet(folder))))
# Not ru_maxrss, which a process started by a larger one inherits.
status = pathlib.Path("/proc/self/status").read_text()
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
print(time.time() - start, peak / (folder / "diffusion_pytorch_model.safetensors").stat().st_size)
"""


@pytest.mark.slow
def test_a_full_size_half_precision_unet_is_loaded_fast_in_little_memory_and_equals_torch(tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    unet = randomised(unet.half().to_empty(device="cpu"))
    unet.save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, memory = map(float, result.stdout.split())
    assert seconds < 30 and memory < 2.2, result.stdout
    x, tokens = normal(1, 16, 24, 4), normal(1, 77, 768)
    with torch.no_grad():
        expected = nhwc(unet.float()(nchw(x), torch.tensor([981]), torch.tensor(tokens)).sample)
    output = nnx.jit(lambda unet, *inputs: unet(*inputs))(
        load_unet(tmp_path), x, np.array([981]), tokens
    )
    print(result.stdout, np.abs(np.asarray(output) - expected).max() / np.abs(expected).max())
    assert_close(output, expected)


def test_a_config_that_is_no_json_object_and_an_absent_folder_are_named(folder, tmp_path):
    (folder / "config.json").write_text("[1]")
    assert_refused(load_clip_text, folder, "config.json: not a JSON object")
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    assert_refused(load_clip_text, folder, "config.json: not valid JSON")
    assert_refused(load_clip_text, tmp_path / "nowhere", "nowhere/config.json: no such file")
