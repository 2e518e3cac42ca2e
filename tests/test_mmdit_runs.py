"""A transformer in the UNet's place, by `model.kind` alone: trained, resumed, sampled, scored."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import MMDIT_PROCESS, SMALLEST, config_dict, mmdit_dict, one_line, random_params
from flax import nnx

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.diffusion.process import MOTIONS
from contextdiff_jax.diffusion.samplers import SAMPLERS, adds_noise
from contextdiff_jax.evaluation.bound import make_strata, model_bound
from contextdiff_jax.evaluation.likelihood import flow_times, model_bits
from contextdiff_jax.inference.opening import of_run, run_steps
from contextdiff_jax.inference.sampling import Method, Text, make_sample
from contextdiff_jax.models.context_kinds import KINDS
from contextdiff_jax.models.contextdiff import Frozen, Teacher
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.models.vae import VAE, VAEConfig
from contextdiff_jax.parallel.mesh import path_name
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.model import build_model, init_params, model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.settings import parse
from contextdiff_jax.settings.sampling import check_sampling
from contextdiff_jax.training import loop
from contextdiff_jax.training.state import init_state
from contextdiff_jax.training.step import draw, loss_fn

SHALLOW = {"model.num_layers": 1}  # one layer, the last: the fewest operations to compile
KEY = jax.random.key(0)
PROMPTS = ["a red circle", "a large blue square"]
LINEAR = {"context.kind": "linear"}  # the kind with the fewest
INDICES = {
    "diffusion.schedule": "cosine",
    "diffusion.prediction_type": "v",
    "context.estimate": "plugin",
}
PLUGIN = {"diffusion.prediction_type": "x0", "context.estimate": "plugin"}


def batch_of(settings):
    rng, size, length = np.random.default_rng(0), settings.data.image_size, settings.data.max_length
    mask = np.arange(length) < np.array([[3], [5]])
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (2, size, size, 3)), jnp.uint8),
        "token_ids": jnp.asarray(rng.integers(1, 50, (2, length)) * mask),
        "token_mask": jnp.asarray(mask),
    }
    null = {name: batch[name][:1] for name in ("token_ids", "token_mask")}
    return draw(jax.random.key(1), batch, settings), null


def trace_of_loss(settings, frozen=Frozen()):
    """The shapes of a loss and of its gradient: whether a step can be made at all."""
    batch, null = batch_of(settings)
    graph = model_graph(settings)

    def loss(params, frozen):
        model = build_model(graph, params, frozen)
        return loss_fn(model, batch, null, settings.process, settings)[0]

    params = jax.eval_shape(lambda: init_params(settings, Undrawn()))
    return jax.eval_shape(jax.value_and_grad(loss), params, frozen)


def write_run(folder, config):
    """A run of random weights as it stands in its folder: training one takes a compilation."""
    claim_workdir(folder, config)
    settings = parse(config)
    shapes = jax.eval_shape(lambda: init_state(settings))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = random_params(settings, 0.5)
    with checkpoints.open_manager(folder) as manager:
        state = dataclasses.replace(state, params=params, ema=params)
        checkpoints.save(manager, state, {"next_batch": 0})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(a run, one of LoRA that starts from it, the same resumed from its middle), with all that
    changes how a step is made.
    """
    folder = tmp_path_factory.mktemp("runs")
    first, whole, resumed = (folder / name for name in ("first", "whole", "resumed"))
    write_run(first, mmdit_dict(**SHALLOW | LINEAR))
    config = mmdit_dict(
        **{
            "train.steps": 4,
            "train.checkpoint_every": 2,
            "train.init_from": str(first),
            "train.trainable": "lora",
            "train.lora_rank": 2,
            "train.remat": "products",
            "train.accumulation": 2,
            "train.power_ema": (0.05, 0.1),
            "train.power_ema_every": 2,
            "train.learning_rate": 1e-2,
            "train.warmup_steps": 0,
        }
        | SHALLOW
        | LINEAR
    )
    compiled, compile_step = [], loop.compile_step

    def compile_once(*arguments):
        compiled[:] = compiled or compile_step(*arguments)
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", compile_once)
        patch.setattr(loop, "Reporter", lambda *_: lambda *_: None)
        loop.train(parse(config), config, whole)
        shutil.copytree(whole, resumed)
        for archive in ("checkpoints", "averages"):
            shutil.rmtree(resumed / archive / "4")
        loop.train(parse(config), config, resumed)
    return first, whole, resumed


def saved(workdir, archive="checkpoints"):
    """The arrays of the last step, by their paths."""
    with checkpoints.open_archive(workdir, archive, read_only=True) as manager:
        restore = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(manager.latest_step(), args=restore).state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.slow  # pytest -m slow tests/test_mmdit_runs.py
def test_a_run_resumes_bit_for_bit(runs):
    _, whole, resumed = runs
    for archive in ("checkpoints", "averages"):
        one, other = saved(whole, archive), saved(resumed, archive)
        assert one.keys() == other.keys() and len(one) > 40
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    one, other = (
        [json.loads(line)["loss"] for line in (each / "metrics.jsonl").open()]
        for each in (whole, resumed)
    )
    assert one == other and len(one) == 4


@pytest.mark.slow  # pytest -m slow tests/test_mmdit_runs.py
def test_lora_changes_the_attention_of_each_stacked_layer_and_trains_the_context_beside_it(runs):
    first, whole, _ = runs
    before, after = saved(first), saved(whole)
    moved = {
        name for name in before if name[:7] == "params/" and (before[name] != after[name]).any()
    }
    assert moved and all(name.startswith("params/context/") for name in moved)
    run = load_run(str(whole), "params")
    merged = {
        path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(run.params)
    }
    attention = {
        name for name in merged if re.search(r"^transformer/.*/to_(q|k|v|out)/kernel$", name)
    }
    for name, value in merged.items():
        change = value - after[f"params/{name}"]
        if name not in attention:
            assert not change.any(), name
            continue
        layer = name.removeprefix("transformer/").removesuffix("/kernel")
        down, up = (after[f"params/lora/{layer}/{part}"] for part in ("down", "up"))
        assert down.shape == (len(value), 16, 2) and up.shape == (len(value), 2, 16)
        for own, left, right in zip(change, down, up, strict=True):  # a layer's
            np.testing.assert_allclose(own, left @ right, atol=1e-6)
            # the last layer's text is read, and asks for nothing
            assert own.any() != (layer == "stacks/0/layers/text/attn/to_q"), layer


@pytest.mark.slow  # pytest -m slow tests/test_mmdit_runs.py
def test_the_context_alone_has_moments_where_it_alone_is_trained(runs):
    changes = {"train.trainable": "context", "train.init_from": str(runs[0])}
    config = mmdit_dict(**SHALLOW | changes)
    state = jax.eval_shape(lambda: init_state(parse(config)))
    moments, own = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (state.opt_state, state.params["context"])
    )
    assert 2 * own <= moments < 2 * own + 10  # and the counts of steps


EVERY_KIND = {
    "cross_attention": {},
    "joint": {},
    "linear": {},
    "affine": PLUGIN,
    "bilinear": {},
    "text": {"context.estimate": "plugin", "context.shift": "prior"},
    "low_resolution": {"context.estimate": "plugin", "super_resolution.factor": 4},
    "two_ends": {"context.shift": "constant"},
    "gaussian_source": {"context.shift": "prior", "context.variance_kl": 0.1},
    "none": {"context.shift": "none"},
}
# of those whose r the loss differentiates; the others: pytest -m slow tests/test_mmdit_runs.py
DIFFERENTIATED = ("two_ends",)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in DIFFERENTIATED else pytest.param(kind, marks=pytest.mark.slow)
        for kind in EVERY_KIND
    ],
)
def test_a_step_can_be_made_with_every_kind_of_context(kind):
    assert EVERY_KIND.keys() == KINDS.keys()
    trace_of_loss(parse(mmdit_dict(**SHALLOW | {"context.kind": kind} | EVERY_KIND[kind])))


def test_joint_blocks_are_a_context_of_a_unet_on_a_path_too():
    changes = SMALLEST | {"model.patch_size": 2} | MMDIT_PROCESS
    loss, grads = trace_of_loss(parse(config_dict(**changes)))
    assert loss.shape == () and "blocks" in grads["context"]["raw"]


def test_a_transformer_learns_from_a_unet():
    teacher = parse(config_dict(**SMALLEST, **{"diffusion.schedule": "flow"}))
    student = parse(
        mmdit_dict(
            **SHALLOW,
            **{
                "distill.teacher": "runs/unet",
                "distill.steps": 2,
                "distill.substeps": 2,
                "sample.steps": 2,
                "sample.guidance": 1.0,
            },
        )
    )
    model = nnx.eval_shape(
        lambda: build_model(model_graph(teacher), init_params(teacher, Undrawn()))
    )
    loss, grads = trace_of_loss(student, Frozen(teacher=Teacher(model, "v")))
    assert loss.shape == () and "transformer" in grads


def test_latents_of_an_autoencoder_are_what_it_denoises(tmp_path):
    sizes = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=8,
    )
    write_json(tmp_path / "config.json", {"_class_name": "AutoencoderKL", **sizes})
    channels = {"model.in_channels": 8, "model.out_channels": 8, "model.patch_size": 2}
    changes = SHALLOW | channels | {"latent.vae": str(tmp_path)}
    settings = parse(mmdit_dict(**changes))
    assert settings.shape == (8, 8, 8)
    vae = nnx.eval_shape(lambda: VAE(VAEConfig(**sizes), rngs=Undrawn()))
    trace_of_loss(settings, Frozen(vae=vae))
    for wrong, words in (
        ({"model.in_channels": 4}, "model.in_channels=4: must be 8, the channels of latent.vae"),
        ({"model.patch_size": 3}, "model.patch_size=3: must divide the side of x0, 8"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(mmdit_dict(**changes | wrong))


@pytest.fixture(scope="module")
def pipeline():
    settings = parse(mmdit_dict(**SHALLOW, **{"context.estimate": "posterior_mean"}))
    return of_run(settings, load_tokenizer(), random_params(settings))


def test_pictures_are_made_from_noise_from_a_picture_and_into_a_hole(pipeline):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    holes = np.zeros((2, 16, 16), np.float32)
    holes[:, 4:12, 4:12] = 1
    plain, away = (pipeline.text_to_image(PROMPTS, negative=n) for n in (None, "a small circle"))
    assert plain.shape == (2, 16, 16, 3) and plain.std() > 1
    assert np.abs(plain.astype(int) - away).max() > 1
    near = pipeline.image_to_image(PROMPTS, images, strength=0.25)
    assert 0 < np.abs(near.astype(int) - images).mean() < np.abs(plain.astype(int) - images).mean()
    painted = pipeline.inpaint(PROMPTS, images, holes)
    np.testing.assert_array_equal(painted[holes == 0], images[holes == 0])
    assert (painted[holes == 1] != images[holes == 1]).mean() > 0.5


def test_what_a_transformer_cannot_do_is_refused_in_one_line(pipeline):
    for options, words in (
        ({"reuse": 2}, "reuse=2: the model has no coarser levels that could be kept; 1"),
        ({"size": (64, 64)}, "16 x 16 patches; model.pos_embed_max_size=8 is the most"),
        ({"size": (16, 18)}, "size=.16, 18.: height and width must be multiples of 4"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            pipeline.text_to_image(PROMPTS, **options)
        one_line(error)


def test_every_sampler_without_noise_follows_the_motion_of_a_transformer(pipeline):
    settings = parse(mmdit_dict(**SHALLOW))
    assert settings.diffusion.prediction_type in MOTIONS
    batch, null = batch_of(settings)
    text = Text(*(each[name] for each in (batch, null) for name in ("token_ids", "token_mask")))
    model = nnx.eval_shape(
        lambda: build_model(model_graph(settings), init_params(settings, Undrawn()))
    )
    refused = []
    for name in SAMPLERS:
        options = settings.sample.changed(sampler=name, eta=0.0)
        if adds_noise(name, 0.0):
            with pytest.raises(ValueError, match="noise needs an estimate of r"):
                check_sampling(settings.process, options)
            refused.append(name)
            continue
        sample = make_sample(settings.process, Method(sampler=name))
        steps = run_steps(settings.process.schedule, options)
        given = model, batch["noise"], text, steps, jnp.float32(3.0), KEY
        assert jax.eval_shape(sample, *given).shape == (2, 16, 16, 3)
    assert 0 < len(refused) < len(SAMPLERS)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param(INDICES, marks=pytest.mark.slow)],  # pytest -m slow tests/test_mmdit_runs.py
    ids=["likelihood on the straight path", "bound on indices"],
)
def test_each_picture_has_a_bound_in_bits(changes):
    settings = parse(mmdit_dict(**SHALLOW, **{"context.estimate": "posterior_mean"} | changes))
    graph, (batch, _) = model_graph(settings), batch_of(settings)
    process, schedule = settings.process, settings.process.schedule

    def bits(params, key):
        model = build_model(graph, params)
        captions = model.encode(batch["token_ids"], batch["token_mask"])
        given = model, process, batch["image"] / 127.5 - 1, captions, key
        if schedule.continuous:
            return model_bits(*given, flow_times(schedule, 2))
        return model_bound(*given, make_strata(schedule.num_timesteps, 2))

    params = jax.eval_shape(lambda: init_params(settings, Undrawn()))
    shapes = [term.shape for term in jax.tree.leaves(jax.eval_shape(bits, params, KEY))]
    assert shapes == [(2,)] or sorted(shapes) == [(2,), (2,), (2, 2)]


@pytest.mark.parametrize(
    ("kind", "other", "field"),
    [("mmdit", config_dict, "act_fn"), ("unet", mmdit_dict, "caption_projection_dim")],
)
def test_another_kind_over_a_config_is_told_how_its_section_is_made(kind, other, field):
    config = other()
    config["model"]["kind"] = kind
    with pytest.raises(ValueError, match=f"model.kind='{kind}': model.{field} is of ") as error:
        parse(config)
    assert f'base.backbone("{kind}", ...)' in one_line(error)
