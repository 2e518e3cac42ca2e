"""Programs compiled for TPUs that aren't here, what their text says, and what makes them fit: remat
and the splash kernel.
"""

from __future__ import annotations

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoder_settings import autoencoder_settings
from conftest import ONE_LEVEL, command, config_dict, one_line
from edit_settings import edit_settings
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from contextdiff_jax.benchmarks.tpu import aot, aot_edit, aot_table, hlo
from contextdiff_jax.models import flash
from contextdiff_jax.models.attention import attention
from contextdiff_jax.models.contextdiff import Frozen
from contextdiff_jax.models.layers import ResnetBlock
from contextdiff_jax.models.remat import POLICIES, configure
from contextdiff_jax.models.transformer import SpatialTransformer
from contextdiff_jax.parallel.chips import CHIPS, GiB
from contextdiff_jax.parallel.mesh import (
    MeshConfig,
    Target,
    gathered,
    make_mesh,
    path_name,
    state_shardings,
    tracing_for,
)
from contextdiff_jax.settings import parse
from contextdiff_jax.training import autoencoder
from contextdiff_jax.training.state import init_state

MESH = {"data": 2, "fsdp": 3, "sequence": 1, "tensor": 4}


@pytest.fixture(scope="module")
def devices():
    """Devices of a v5e:2x2, whose compiler is libtpu (requirements-test.txt)."""
    return aot.described_devices("v5e:2x2")


@pytest.mark.parametrize(
    "attributes, groups, axes",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("tensor",)),
        (
            "replica_groups=[12,2]<=[2,12]T(1,0), use_global_device_ids=true",
            [[i, i + 12] for i in range(12)],
            ("data",),
        ),
        ("replica_groups=[1,24]<=[24]", [list(range(24))], ("data", "fsdp", "tensor")),
        (
            "replica_groups=mesh['x'=2,'y'=12] {'x'}, to_apply=%add",
            [[i, i + 12] for i in range(12)],
            ("data",),
        ),
        (
            "replica_groups=mesh['x'=2,'y'=12] {'y':(1)3}",
            [[i + j, i + j + 4, i + j + 8] for i in (0, 12) for j in range(4)],
            ("fsdp",),
        ),
        (
            "channel_id=1, source_target_pairs={{0,4},{4,8},{8,0}}",
            [[0, 4], [4, 8], [8, 0]],
            ("fsdp",),
        ),
    ],
)
def test_a_collectives_groups_are_read_onto_the_meshs_axes(attributes, groups, axes):
    found = hlo.replica_groups(attributes, 24)
    np.testing.assert_array_equal(found, groups)
    assert hlo.axes_of(found, MESH) == axes


def test_a_collective_spread_over_fusions_counts_once_and_a_scattered_sum_is_one():
    program = hlo.instructions("""
%fused.1 (p: bf16[8,32]) -> bf16[32,32] {
  %all-gather.1 = bf16[32,32]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}
%fused.2 (p: bf16[8,32]) -> bf16[32,32] {
  %all-gather.2 = bf16[32,32]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1}}, dimensions={0}
}
%all-reduce-scatter.3 (p: f32[16]) -> f32[8] {
  %all-reduce.3 = f32[16]{0} all-reduce(%p), channel_id=8, replica_groups={{0,1}}, to_apply=%add
}""")  # noqa: E501
    rows = (
        hlo.Traffic("all-gather", "data", 1, 1024.0),
        hlo.Traffic("reduce-scatter", "data", 1, 32.0),
    )
    assert hlo.collectives(program, {"data": 2}) == list(rows)


def test_bytes_of_a_compiled_programs_collectives_are_those_of_a_ring(devices):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), devices=devices)
    x = jax.ShapeDtypeStruct(
        (256, 512), jnp.float32, sharding=NamedSharding(mesh, P("data", "fsdp"))
    )
    compiled = (
        jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P("fsdp"))).lower(x).compile()
    )
    (row,) = hlo.collectives(hlo.instructions(compiled.as_text()), mesh.shape)
    # Each chip sums 256 of the 512 columns with the one that has the other rows: 2 V (g - 1) / g, V
    # = 1024 bytes.
    assert row == hlo.Traffic("all-reduce", "data", 1, 1024.0)


def test_a_kernels_hidden_work_is_counted_from_the_compiled_program(devices):
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices=devices)
    spread = NamedSharding(mesh, P("data", None, "tensor"))
    q = jax.ShapeDtypeStruct((2, 1024, 4, 40), jnp.bfloat16, sharding=spread)

    def loss(q, k, v):
        with tracing_for(mesh):
            return flash.splash_attention(q, k, v, 1.0).astype(jnp.float32).sum()

    program = hlo.instructions(
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile().as_text()
    )
    product = 2 * 1 * 2 * 1024**2 * 128  # 1 example, 2 heads a chip
    assert [kernel.flops for kernel in hlo.kernels(program)] == [2 * product, 5 * product]
    assert hlo.collectives(program, mesh.shape) == []  # no chip needs another's


@pytest.mark.parametrize("tokens, width", [(128, 40), (70, 8), (2304, 8)])
def test_the_splash_kernel_is_attention_forward_and_backward(tokens, width):
    """Interpreted; heads narrower than the lanes, and tokens that are no whole blocks."""
    *inputs, direction = (
        jax.random.normal(key, (1, tokens, 2, width))
        for key in jax.random.split(jax.random.key(0), 4)
    )
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    kernel, plain = (
        jax.vjp(jax.jit(f), *inputs)
        for f in (
            lambda *qkv: flash.splash_attention(*qkv, width**-0.5, target=Target(mesh)),
            attention,
        )
    )
    np.testing.assert_allclose(kernel[0], plain[0], atol=2e-6)
    for ours, theirs in zip(kernel[1](direction), plain[1](direction), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)


def test_auto_takes_the_kernel_for_long_sequences_on_the_platform_that_is_compiled_for(devices):
    tpu, here = (
        Target(make_mesh(MeshConfig(), devices=devices)),
        Target(make_mesh(MeshConfig(), devices=jax.devices()[:1])),
    )

    def formulation(choice, tokens, target):
        x = jnp.zeros((1, tokens, 2, 8))
        return flash.formulation(choice, x, x, target)

    assert formulation("auto", 4096, tpu) == "splash" and formulation("auto", 256, tpu) == "xla"
    assert formulation("auto", 4096, here) == "tiles" and formulation("auto", 64, here) == "xla"
    assert formulation("splash", 64, here) == "splash" and formulation("xla", 4096, tpu) == "xla"


class Blocks(nnx.Module):
    """A resnet and a transformer block."""

    def __init__(self, width=8, dtype=jnp.float32):
        policy = dict(dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.resnet = ResnetBlock(width, width, 16, num_groups=4, eps=1e-5, **policy)
        self.transformer = SpatialTransformer(width, 2, 12, num_groups=4, **policy)

    def __call__(self, x, temb, text):
        return (self.transformer(self.resnet(x, temb), text, None) ** 2).mean()


def test_rematerialised_blocks_have_the_same_loss_and_gradient_and_compute_again_what_they_say():
    inputs = [
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 4, 4, 8), (2, 16), (2, 5, 12)])
    ]
    params = jax.tree.map(lambda p: p + 0.1, nnx.state(Blocks()))  # nothing that starts at zero
    results, counts = {}, {}
    for remat in POLICIES:
        blocks = Blocks()
        configure(blocks, remat=remat, attention="xla")
        graph = nnx.split(blocks)[0]
        both = jax.value_and_grad(lambda params, graph=graph: nnx.merge(graph, params)(*inputs))
        results[remat] = jax.jit(both)(params)
        counts[remat] = str(jax.make_jaxpr(both)(params)).count("conv_general_dilated[")
    for remat in POLICIES:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            results[remat],
            results["none"],
        )
    assert counts["none"] == counts["products"] < counts["kernels"] == counts["blocks"]


@pytest.mark.parametrize("data, fsdp", [(1, 4), (2, 2)])
def test_fsdp_gathers_kernels_in_bfloat16_and_scatters_gradients_and_sends_nothing_else(
    devices, data, fsdp
):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), devices=devices)
    graph, params = nnx.split(nnx.eval_shape(lambda: Blocks(128, jnp.bfloat16)))
    shardings, spread = state_shardings(mesh, params), NamedSharding(mesh, P(("data", "fsdp")))
    inputs = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=spread)
        for s in ((8, 8, 8, 128), (8, 16), (8, 5, 12))
    ]

    def loss(params, *inputs):
        with tracing_for(mesh):
            return nnx.merge(graph, gathered(params, jnp.bfloat16))(*inputs).astype(jnp.float32)

    step = jax.jit(jax.value_and_grad(loss), out_shardings=(NamedSharding(mesh, P()), shardings))
    compiled = step.lower(aot.abstract(params, shardings), *inputs).compile()
    sent = hlo.collectives(hlo.instructions(compiled.as_text()), mesh.shape)
    assert {row.kind for row in sent} <= {"all-gather", "all-reduce", "reduce-scatter"}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    whole = sum(
        leaf.size * (2 if path_name(path).endswith("/kernel") else 4) for path, leaf in leaves
    )
    gather = sum(row.sent_bytes for row in sent if row.kind == "all-gather")
    assert gather == pytest.approx(whole * (1 - 1 / fsdp), rel=0.1)
    # Scattered over fsdp, and the parts summed over data: a ring sends an array twice to sum it.
    gradients = sum(row.sent_bytes for row in sent) - gather
    assert gradients < 1.15 * whole * ((1 - 1 / fsdp) + 2 * (1 - 1 / data) / fsdp)


def test_sampling_with_guidance_spread_over_data_sends_the_finished_pictures_alone(devices):
    smallest = {"model.mid_block_type": None, "context.kind": "linear", "sample.steps": 2}
    settings = parse(
        config_dict(**ONE_LEVEL, **smallest, **{"train.batch_size": 4, "sample.guidance": 3.0})
    )
    mesh = make_mesh(MeshConfig(data=4), devices=devices)
    compiled = aot.lower(settings, "sample", mesh, Frozen()).compile()
    pictures = 4 * 16 * 16 * 3
    sent = hlo.collectives(hlo.instructions(compiled.as_text()), mesh.shape)
    # And a bit for each, whether its values are finite, which the TPU's compiler pads.
    finite = [traffic for traffic in sent if traffic.kind == "all-reduce"]
    assert len(finite) <= 1 and sum(traffic.sent_bytes for traffic in finite) <= 768
    rest = [traffic for traffic in sent if traffic not in finite]
    assert rest == [hlo.Traffic("all-gather", "data", 1, pictures * 3 / 4)]


def test_figures_are_those_of_the_compiled_program(devices, monkeypatch):
    """A product stands in the place of the step: 2 x 512 x 512 x 256 operations a chip."""

    def product(settings, program, mesh, frozen):
        spread = NamedSharding(mesh, P(("data", "fsdp")))
        places = ((2048, 512), spread), ((512, 256), NamedSharding(mesh, P()))
        x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=p) for s, p in places)
        return jax.jit(lambda x, w: (x, x @ w), donate_argnums=0).lower(x, w)

    monkeypatch.setattr(aot, "lower", product)
    result = aot.run(parse(config_dict()), aot.AotBenchmark(topology="v5e:2x2", batch_per_chip=2))
    (row,) = result.rows
    assert row["fits"] and row["chips"] == 4 and row["batch_per_chip"] == 2
    assert row["flops"] == pytest.approx(2 * 512 * 512 * 256, rel=0.01)
    assert row["aliased"] == 512 * 512 * 2 and row["collectives"] == [] and row["kernel_flops"] == 0
    assert (
        row["utilisation"] == pytest.approx(row["flops"] / row["seconds"] / 197e12)
        and 0.05 < row["utilisation"] <= 1
    )
    assert "nothing run on a TPU" in result.text and row["name"] in result.text


def test_a_sweep_tries_meshes_rematerialisations_and_batches_and_the_fastest_that_fits_comes_first(
    devices, monkeypatch
):
    """The compiler's answers are made up: 3 pictures a chip don't fit, `blocks` is the slowest,
    fsdp costs.
    """
    settings = parse(config_dict(**{"train.batch_size": 4}))

    def row(candidate, program, mesh, frozen):
        train, each = candidate.train, candidate.train.batch_size / 4
        seconds = each * (1 + POLICY_COST[train.remat]) + 0.1 * mesh.shape["fsdp"]
        numbers = dict.fromkeys(
            ("flops", "kernel_seconds", "collective_seconds", "utilisation", "compile_seconds"), 1.0
        )
        return (
            numbers
            | dict.fromkeys(("peak_hbm", "arguments", "aliased"), 2**30)
            | {
                "name": "{data}x{fsdp} ".format(**mesh.shape) + f"{train.remat} {train.batch_size}",
                "hbm": 2**34,
                "fits": each < 3,
                "seconds": seconds,
                "pictures_per_second": train.batch_size / seconds,
                "collectives": [],
                "largest": [],
                "optimization_level": "O0",
            }
        )

    POLICY_COST = {"none": 0.0, "products": 0.1, "kernels": 0.2, "blocks": 0.3}
    monkeypatch.setattr(aot, "compile_row", row)
    result = aot.run(settings, aot.AotBenchmark(topology="v5e:2x2", sweep=True))
    names = [each["name"] for each in result.rows]
    assert len(set(names)) == 2 * 4 * 3 and {name.split()[0] for name in names} == {"4x1", "1x4"}
    assert (
        names[0] == "4x1 none 8"
        and [each["fits"] for each in result.rows] == [True] * 16 + [False] * 8
    )
    lines = result.text.splitlines()
    assert lines[2].startswith("4x1 none 8") and "JAX_OPTIMIZATION_LEVEL=O0" in lines[0]


@pytest.mark.slow
def test_a_train_step_compiles_for_chips_that_are_not_here_with_its_state_in_place(devices):
    """Half a minute of compilation: bash launch/test.sh -m slow tests/test_aot.py"""
    # What a test costs is the compilation.
    smallest = {"model.mid_block_type": None, "context.kind": "none"}
    settings = parse(config_dict(**ONE_LEVEL, **smallest))
    result = aot.run(settings, aot.AotBenchmark(topology="v5e:2x2", batch_per_chip=2))
    (row,) = result.rows
    assert (
        row["fits"]
        and row["chips"] == 4
        and row["batch_per_chip"] == 2
        and 0 < row["seconds"] < 0.1
    )
    abstract = jax.eval_shape(lambda: init_state(settings))
    state, gradient = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (abstract, abstract.params)
    )
    assert row["aliased"] >= state  # tiling pads it
    (reduced, *_) = row["collectives"]
    assert (reduced["kind"], reduced["axes"]) == ("all-reduce", "data")
    assert abs(reduced["sent_bytes"] / (2 * gradient * 3 / 4) - 1) < 0.1


def test_chips_share_the_matrices_that_muon_makes_orthogonal(devices):
    """A training step's, whose update was once traced for no mesh: each chip made all of them."""
    smallest = {"model.mid_block_type": None, "context.kind": "none"}
    options = {"train.optimizer": "muon", "train.batch_size": 4}
    settings = parse(config_dict(**ONE_LEVEL, **smallest, **options))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), devices=devices)
    program = aot.lower(settings, "train", mesh, Frozen())
    check_shared(program, jax.eval_shape(lambda: init_state(settings)).params)


def test_chips_share_them_in_an_autoencoders_training_too(devices):
    settings = autoencoder_settings(optimizer="muon")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), devices=devices)
    state = jax.eval_shape(lambda: autoencoder.init_state(settings))
    spread = NamedSharding(mesh, P(("data", "fsdp")))
    batch = {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8, sharding=spread)}
    step = jax.jit(autoencoder.make_vae_step(settings, mesh))
    check_shared(step.lower(aot.abstract(state, state_shardings(mesh, state)), batch), state.params)


def check_shared(lowered, params):
    """The kernels' matrices of each shape are one batch, spread over the four chips, filled up."""
    text = lowered.as_text()
    shared = re.findall(r'\[\{"data", "fsdp".*\}, \{\}, \{\}\]> : tensor<(.*)x(.*)x(.*)xf32>', text)
    wanted = collections.Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path_name(path).endswith("/kernel"):
            sides = leaf.size // leaf.shape[-1], leaf.shape[-1]
            wanted[min(sides), max(sides)] += 1
    assert {(int(a), int(b)): int(count) for count, a, b in shared} == {
        sides: -(-count // 4) * 4 for sides, count in wanted.items()
    }


def test_what_does_not_fit_is_an_answer_in_the_compilers_words():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 17.95G of 15.75G hbm. Exceeded\nmore"
    )
    assert aot.out_of_memory(message) == "Used 17.95G of 15.75G hbm. Exceeded"
    assert aot.out_of_memory("INTERNAL: something else") is None
    row = dict(name="train", fits=False, seconds=None, compile_seconds=2, optimization_level="O1")
    text = aot_table.table([row | {"reason": "Used 17G"}], "train", "v5e:2x2", 0.5)
    assert "train: Used 17G" in text and re.search(r"train +no( +-){6} +2 s", text)


def test_a_described_v4_device_is_half_a_chip_and_the_others_are_whole():
    core = CHIPS["TPU v4"].described()
    assert (core.name, core.peak, core.hbm) == ("v4 core", 137.5e12, 16 * GiB)
    assert CHIPS["TPU v5"] is CHIPS["TPU v5p"].described()


def test_topologies_and_batches_that_cannot_be_are_refused_in_one_line():
    settings = parse(config_dict())
    for options, changes, words in (
        ({"topology": "v9:2x2"}, {}, "--topology='v9:2x2': "),
        (
            {"topology": "v5e:2x2"},
            {"batch_size": 6},
            "train.batch_size=6: must be a multiple of mesh.data x mesh.fsdp = 4",
        ),
    ):
        changed = dataclasses.replace(
            settings, train=dataclasses.replace(settings.train, **changes)
        )
        with pytest.raises(ValueError) as error:
            aot.run(changed, aot.AotBenchmark(**options))
        assert words in str(error.value) and "\n" not in str(error.value)
    done = command("benchmark", "--mode=aot", "--config=configs/base.py", env={"XLA_FLAGS": ""})
    assert done.returncode == 2 and done.stderr.strip().endswith("as in --topology=v5e:4x4")


def test_chips_that_share_frames_have_theirs_of_every_clip():
    changes = {"mesh.data": 1, "mesh.sequence": 4, "video.size": (16, 16), "video.num_frames": 8}
    settings = edit_settings(**changes, **{"train.batch_size": 1})
    mesh = make_mesh(settings.base.mesh, 1, 1, aot.described_devices("v5p:2x2x1"))
    (part,) = (part for part in aot_edit.parts(settings, mesh) if part.name == "editing")
    assert part.clips == 6  # three prompts, each with guidance's other branch
    found = aot.tried(part.lowered, mesh, part.trips, part.clips * 8)
    # The first and the neighbouring frames, and all frames of some places: never those of a clip.
    kinds = {row["kind"] for row in found["collectives"]}
    assert kinds == {"all-reduce", "all-to-all", "collective-permute"}
    assert found["largest"][0]["array"] == f"f32[{6 * 8 // 4},2,256,512]"  # attention's


@pytest.mark.slow  # compiles three programs for a TPU: pytest -m slow tests/test_aot.py -k edit
@pytest.mark.parametrize("topology, sequence", [("v5e:1x1", 1), ("v5e:2x2", 4)])
def test_an_edits_parts_are_compiled_for_chips_that_share_its_frames(topology, sequence):
    changes = {"mesh.data": 1, "mesh.sequence": sequence, "edit.strength": (0.8, 0.4)}
    sizes = {"video.size": (8, 12), "video.num_frames": 4}
    settings = edit_settings(**changes, **sizes, **{"train.batch_size": 1})
    result = aot_edit.run(settings, aot.AotBenchmark(topology=topology, program="edit"))
    assert [row["program"] for row in result.rows] == ["tuning step", "inversion", "editing"]
    assert [row["trips"] for row in result.rows] == [1, 4, 4]  # 5 steps, of which 0.8
    for row in result.rows:
        assert row["fits"] and row["seconds"] > 0 and row["peak_hbm"] > 0
        assert (row["collective_seconds"] > 0) == (sequence > 1)
    # three clips, each by its prompt and away from the source's, and each four times
    flops = [row["flops"] for row in result.rows]
    assert flops[2] > 4 * flops[1]
    assert "editing 4 frames of 8x12, 6 at a time, 4 steps" in result.text


def test_an_edits_frames_that_chips_cannot_share_are_one_line():
    options = aot.AotBenchmark(topology="v5e:2x2", program="edit")
    settings = edit_settings(**{"mesh.data": 1, "mesh.sequence": 4, "video.num_frames": 6})
    with pytest.raises(ValueError, match="must divide video.num_frames=6") as error:
        aot_edit.run(settings, options)
    one_line(error)
    with pytest.raises(ValueError, match="neither --sweep nor --batch_per_chip"):
        aot.AotBenchmark(topology="v5e:2x2", program="edit", sweep=True)
