"""Folders: float types, shards, and shardings."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import ON_EIGHT, ROOT
from diffusers import UNet2DConditionModel
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from text_folders import TENSOR, WEIGHTS, assert_refused, rewritten, text_model
from torch_models import assert_close, assert_same_tensors, nchw, nhwc, normal, randomised, stored

from contextdiff_jax.models.clip import CLIPText, CLIPTextConfig
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.parallel.mesh import MeshConfig, make_mesh, state_shardings
from contextdiff_jax.pretrained import load_clip_text, load_unet, save_clip_text
from contextdiff_jax.pretrained.casting import copy_finite


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return text_model()


@pytest.fixture
def folder(model, tmp_path):
    """A fresh folder, to be damaged."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


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
