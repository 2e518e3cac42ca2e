"""One program for one device, for many, and for many processes (8 simulated devices, in processes
of their own).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    HERE,
    NO_ATTENTION,
    ON_EIGHT,
    ROOT,
    SMALLEST,
    XLA_FLAGS,
    command,
    config_dict,
    config_file,
    mmdit_dict,
)
from jax.sharding import PartitionSpec as P

from contextdiff_jax.parallel.mesh import (
    AXES,
    RULES,
    Feed,
    MeshConfig,
    make_mesh,
    place,
    state_shardings,
)
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.settings import parse
from contextdiff_jax.training.state import init_state

ONE = "1x1x1x1"  # data, fsdp, tensor, sequence
QUICK = "1x2x2x2/2"
STEPS = {"train.steps": 10, "sample.steps": 2}
# A program for each mesh is compiled, and that is what these tests cost: one level, with attention
# of pictures and text. The slow ones have two, with attention in the middle.
ONE_LEVEL = config_dict(**SMALLEST | STEPS)
TWO_LEVELS = config_dict(
    **STEPS,
    **{
        "model.down_block_types": "('DownBlock2D','DownBlock2D')",
        "model.up_block_types": "('UpBlock2D','UpBlock2D')",
    },
)


class Device:
    """Stands for one of many; a mesh needs no more to say where arrays go."""

    platform = "cpu"

    def __init__(self, number, slice_index=0):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index
        self.device_kind = "cpu"


def abstract_mesh(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_each_parameter_lies_as_the_table_says_and_its_moments_and_average_with_it():
    settings = parse(config_dict())
    state = jax.eval_shape(lambda: init_state(settings))
    spec = jax.tree.map(lambda s: s.spec, state_shardings(abstract_mesh(fsdp=2, tensor=2), state))
    unet = spec.params["unet"]
    block = unet["mid_block"]["attentions"][0]["transformer_blocks"][0]
    assert block["attn1"]["to_q"]["kernel"].get_value() == P("fsdp", "tensor")
    assert block["attn1"]["to_out"]["kernel"].get_value() == P("tensor", "fsdp")
    assert block["ff"]["proj_in"]["kernel"].get_value() == P("fsdp", "tensor")
    assert unet["mid_block"]["resnets"][0]["conv1"]["kernel"].get_value() == P(
        None, None, "fsdp", "tensor"
    )
    assert unet["mid_block"]["resnets"][0]["conv2"]["kernel"].get_value() == P(
        None, None, "tensor", "fsdp"
    )
    # 3 channels don't divide by 2.
    assert unet["conv_in"]["kernel"].get_value() == P(None, None, None, "fsdp")
    adam = spec.opt_state[1][0]
    assert spec.ema == spec.params == adam.mu == adam.nu
    assert spec.step == P() and spec.key == P(None)


def test_a_rule_is_one_entry_of_the_config():
    shape, names = (64, 64), ("width", "heads")
    mesh = abstract_mesh(fsdp=2, tensor=4)
    assert place(mesh, shape, names).spec == P(("fsdp",), ("tensor",))
    assert place(mesh, shape, names, {"heads": ""}).spec == P(("fsdp",), None)
    assert place(mesh, shape, names, {"width": "fsdp,tensor"}).spec == P(("fsdp", "tensor"), None)
    assert config_dict()["mesh"]["rules"] == RULES


def test_slices_lie_along_data_and_a_mesh_that_would_cut_them_is_refused():
    devices = [Device(i, slice_index=i // 4) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), devices=devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)[:, :, 0, 0]
    assert [set(row) for row in slices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(
        ValueError, match="data or fsdp must be a multiple of the number of slices, 2"
    ):
        make_mesh(MeshConfig(data=1, tensor=8), devices=devices)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"mesh.rules": {"headz": "tensor"}},
            "mesh.rules='headz': unknown; one of batch, rows, width, heads",
        ),
        (
            {"mesh.rules": {"heads": "model"}},
            "mesh.rules.heads='model': unknown axis 'model'; some of data",
        ),
        ({"mesh.tensor": 0}, "mesh.tensor=0: must be positive"),
    ],
)
def test_wrong_rules_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse(config_dict(**changes))


def test_pictures_are_split_by_rows_and_what_does_not_divide_is_whole():
    mesh = abstract_mesh(data=2, sequence=2)
    assert Feed(mesh, 4).sharding((4, 8, 8, 3)).spec == P(("data",), ("sequence",), None, None)
    assert Feed(mesh, 3).sharding((3, 8, 8, 3)).spec == P(None, ("sequence",), None, None)
    assert Feed(mesh, 4).sharding((4, 9)).spec == P(("data",), None)


def test_a_process_reads_the_rows_of_its_devices():
    feed = Feed(make_mesh(MeshConfig(), devices=jax.devices()[:1]), 4)
    np.testing.assert_array_equal(feed.rows, np.arange(4))
    batch = feed.put(
        {
            "image": np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3),
            "token_ids": np.ones((4, 5), np.int32),
        }
    )
    np.testing.assert_array_equal(batch["image"], np.arange(48).reshape(4, 2, 2, 3))
    assert jnp.asarray(batch["token_ids"]).shape == (4, 5)


def losses_and_pictures(folder: pathlib.Path, config: dict, *meshes: str) -> dict:
    """What mesh_program.py finds, whose files go into `folder`."""
    out, given = folder / "out.json", folder / "given.json"
    given.write_text(json.dumps(config))
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "mesh_program.py", out, folder / "run", given, *meshes],
        cwd=ROOT,
        env=os.environ | HERE | ON_EIGHT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


def assert_same(result: dict, one: dict) -> None:
    np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-4)
    assert len(result["losses"]) == STEPS["train.steps"]
    assert abs(result["losses"][0] / result["losses"][-1] - 1) > 0.01
    # Of 255: a rounding may tip over.
    assert np.abs(np.array(result["image"]) - np.array(one["image"])).max() <= 1
    np.testing.assert_allclose(result["resumed"], one["losses"][5], rtol=1e-5)


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "config, mesh, share",
    [
        (ONE_LEVEL, QUICK, 1 / 2),
        slow(TWO_LEVELS, QUICK, 1 / 2),
        slow(TWO_LEVELS, "2x2x2x1", 1 / 2),
        slow(TWO_LEVELS, "2x2x1x2", 1 / 2),
        slow(TWO_LEVELS, "8x1x1x1", 1),
        slow(TWO_LEVELS, "1x8x1x1", 1 / 8),
        slow(TWO_LEVELS, "1x1x1x8", 1),
    ],
)
def test_every_mesh_gives_the_losses_and_the_picture_of_one_device_and_reads_its_checkpoint(
    config, mesh, share, tmp_path
):
    """10 steps, and step 6 from what the one device saved.

    The slow ones are a program each: bash launch/test.sh -m slow tests/test_mesh.py
    """
    results = losses_and_pictures(tmp_path, config, ONE, mesh)
    assert_same(results[mesh], results[ONE])
    assert results[mesh]["opt_share"] == share  # of the largest moment on each device


@pytest.mark.parametrize(
    "mesh", [QUICK, *map(slow, ("2x2x2x1", "2x2x1x2", "8x1x1x1", "1x8x1x1", "1x1x1x4"))]
)
def test_the_transformer_too(mesh, tmp_path):
    """The slow ones are a program each: bash launch/test.sh -m slow tests/test_mesh.py"""
    results = losses_and_pictures(tmp_path, mmdit_dict(**STEPS), ONE, mesh)
    assert_same(results[mesh], results[ONE])


@pytest.mark.slow
def test_muon_too(tmp_path):
    """bash launch/test.sh -m slow tests/test_mesh.py -k muon"""
    muon = {"train.optimizer": "muon", "train.learning_rate": 1e-2}
    results = losses_and_pictures(tmp_path, mmdit_dict(**STEPS | muon), ONE, QUICK)
    assert_same(results[QUICK], results[ONE])


def test_layers_in_one_array_are_split_as_one_layer_is():
    state = jax.eval_shape(lambda: init_state(parse(mmdit_dict())))
    spec = jax.tree.map(lambda s: s.spec, state_shardings(abstract_mesh(fsdp=2, tensor=2), state))
    layers = spec.params["transformer"]["stacks"][0]["layers"]["picture"]
    assert layers["attn"]["to_q"]["kernel"].get_value() == P(None, ("fsdp",), ("tensor",))
    assert layers["attn"]["to_out"]["kernel"].get_value() == P(None, ("tensor",), ("fsdp",))
    assert layers["ff"]["proj_in"]["bias"].get_value() == P(None, ("tensor",))
    assert layers["attn"]["norm_q"]["scale"].get_value() == P(None, ("fsdp",))


def in_two_processes(config: dict, workdir: pathlib.Path, *flags: str) -> list[float]:
    """The losses of a run by 2 processes of 2 devices, started as a user does."""
    path = config_file(workdir.with_suffix(".py"), config)
    result = subprocess.run(
        [
            "bash",
            "launch/local.sh",
            "2",
            "2",
            f"--config={path}",
            f"--workdir={workdir}",
            *flags,
            "--config.train.checkpoint_every=7",
            "--config.train.power_ema=(0.05,0.1)",
            "--config.train.power_ema_every=4",
            "--config.train.sample_every=500",
            "--config.mesh.fsdp=2",
            "--config.train.peer_timeout=120",
        ],
        cwd=ROOT,
        env=os.environ | HERE | {"PYTHON": sys.executable, "XLA_FLAGS": XLA_FLAGS},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))  # once each
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_two_processes_give_the_transformers_losses(tmp_path):
    """bash launch/test.sh -m slow tests/test_mesh.py"""
    config = mmdit_dict(**STEPS)
    losses = in_two_processes(config, tmp_path / "two")
    one = losses_and_pictures(tmp_path, config, ONE)[ONE]
    np.testing.assert_allclose(losses, one["losses"], rtol=1e-4)


def test_two_processes_give_the_losses_of_one_device_and_the_first_alone_writes(tmp_path):
    """The checkpoint of the two is read here, on one device."""
    config, workdir = config_dict(**NO_ATTENTION | STEPS), tmp_path / "two"
    losses = in_two_processes(config, workdir, "--config.train.profile_steps=(3,4)")
    one = losses_and_pictures(tmp_path, config, ONE)[ONE]
    np.testing.assert_allclose(losses, one["losses"], rtol=1e-4)
    assert (
        len(list((workdir / "samples").iterdir())) == 1
        and len(list((workdir / "events").iterdir())) == 1
    )
    traces = workdir.glob("profile/*/plugins/profile/*/*.xplane.pb")
    assert sorted(trace.parts[-5] for trace in traces) == ["process_0", "process_1"]
    averages = {path.name: checkpoints.damage(path) for path in (workdir / "averages").iterdir()}
    assert averages == {"4": "", "8": "", "10": ""}
    sample = command(
        "sample",
        f"--workdir={workdir}",
        "--prompt=a large red circle",
        f"--out={tmp_path / 'out.png'}",
    )
    assert sample.returncode == 0 and "pictures of step 10" in sample.stdout, sample.stderr


def test_a_batch_that_the_devices_cannot_divide_is_refused_in_one_line(tmp_path):
    result = command(
        "train",
        "--config=configs/base.py",
        f"--workdir={tmp_path}",
        "--config.train.batch_size=12",
        tiny=True,
        env=ON_EIGHT,
    )
    assert (
        result.returncode == 2 and "train.batch_size=12" in result.stderr and "= 8" in result.stderr
    )
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_saved_on_data_8_and_read_on_fsdp_4_by_tensor_2_and_on_one_device(tmp_path):
    """Three programs: bash launch/test.sh -m slow tests/test_mesh.py"""
    results = losses_and_pictures(tmp_path, TWO_LEVELS, "8x1x1x1", "1x4x2x1", ONE)
    for mesh in ("1x4x2x1", ONE):
        np.testing.assert_allclose(
            results[mesh]["resumed"], results["8x1x1x1"]["losses"][5], rtol=1e-5
        )
