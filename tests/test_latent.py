"""Latent training: what is frozen, what is trained, where a run starts, and how it becomes a
diffusers folder again.
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
import torch
from conftest import HERE, ON_EIGHT, ROOT, config_dict, random_params, with_gamma
from flax import nnx
from latent_runs import PROMPTS, batch_of, config_of, run_of, start_of
from torch_models import (
    SMALLEST,
    assert_close,
    assert_same_tensors,
    nchw,
    nhwc,
    stable_diffusion,
    t5_encoder,
)
from torch_models import randomised as randomised_torch

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.models.denoising import make_denoise
from contextdiff_jax.pretrained import load_unet
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.pretrained.lora import load_lora, merge_lora
from contextdiff_jax.pretrained.pipeline import load_pipeline
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.settings import parse
from contextdiff_jax.training.export import export_run
from contextdiff_jax.training.state import init_state
from contextdiff_jax.training.step import clean, draw, loss_fn


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """diffusers' pipeline and its folder."""
    folder = tmp_path_factory.mktemp("latent")
    pipe = stable_diffusion(folder / "words", unet_changes=SMALLEST)
    pipe.save_pretrained(folder / "sd")
    return pipe, folder / "sd"


@pytest.fixture(scope="module")
def runs(pipe, tmp_path_factory):
    """A run of each kind: (config, workdir)."""
    workdir = tmp_path_factory.mktemp("runs")
    changes = {
        "full": {},
        "lora": {"train.lora_rank": 2},
        "context": {"context.estimate": "posterior_mean"},
    }
    return {
        kind: (
            run_of(
                pipe[1], workdir / kind, **{"train.trainable": kind, "train.ema_decay": 0.5} | more
            ),
            workdir / kind,
        )
        for kind, more in changes.items()
    }


def test_a_fine_tune_at_gain_zero_samples_what_the_folder_samples(pipe):
    config = config_of(pipe[1], **{"sample.steps": 10})
    settings, params = parse(config), start_of(config)
    assert (
        settings.shape == (8, 8, 4)
        and settings.data.max_length == 9
        and settings.sample.steps_offset == 1
    )
    assert float(params["context"]["gamma"][...]) == 0
    pipeline = of_run(settings, load_tokenizer(settings.data.tokenizer), params)
    ours = pipeline.text_to_image(PROMPTS, seed=3)
    noise_key, _ = jax.random.split(jax.random.key(3))
    noise = jnp.stack(
        [jax.random.normal(jax.random.fold_in(noise_key, i), settings.shape) for i in range(2)]
    )
    theirs = load_pipeline(pipe[1]).text_to_image(PROMPTS, noise=noise, steps=10, guidance=7.5)
    assert theirs.std() > 30 and np.abs(ours.astype(int) - theirs).max() <= 1
    assert (
        ours == theirs
    ).mean() > 0.999  # what is left is the rounding of pictures to whole numbers
    moved = pipeline.with_params(with_gamma(params, 1.0)).text_to_image(PROMPTS, seed=3)
    assert (moved != theirs).mean() > 0.1


def test_latents_are_draws_from_the_autoencoders_gaussian_as_diffusers_has_it(pipe):
    settings = parse(config_of(pipe[1]))
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    model = build_model(model_graph(settings), random_params(settings), load_frozen(settings))
    pixels = np.asarray(batch["image"], np.float32) / 127.5 - 1
    with torch.no_grad():
        q = pipe[0].vae.encode(nchw(pixels)).latent_dist
        expected = (
            nhwc(q.mean + q.std * nchw(np.array(batch["latent_noise"])))
            * pipe[0].vae.config.scaling_factor
        )
    assert_close(jax.jit(clean)(model, batch)[0], expected)


def test_a_run_reads_text_through_t5(pipe, tmp_path):
    theirs, tokenizer = t5_encoder(tmp_path / "t5")
    folders = {"text.pretrained": str(tmp_path / "t5"), "data.tokenizer": str(tmp_path / "t5")}
    config = config_of(pipe[1], **folders)
    settings = parse(config)
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    rows = tokenizer(
        PROMPTS, padding="max_length", max_length=9, truncation=True, return_tensors="pt"
    )
    np.testing.assert_array_equal(batch["token_ids"], rows.input_ids)
    np.testing.assert_array_equal(batch["token_mask"], rows.attention_mask.bool())
    assert not batch["token_mask"].all() and batch["token_mask"][:, 0].all()
    with torch.no_grad():
        expected = theirs(rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
    model = build_model(model_graph(settings), start_of(config), load_frozen(settings))
    captions = nnx.jit(lambda model: model.encode(batch["token_ids"], batch["token_mask"]))(model)
    assert_close(captions.tokens, expected.numpy())
    # Padding is read by nobody: neither inside of T5 nor by the UNet.
    x, t, padding = batch["noise"], batch["t"], ~batch["token_mask"][..., None]
    predict = nnx.jit(
        lambda model, change: model.predict(
            x, t, captions._replace(tokens=captions.tokens + change)
        )
    )
    outputs = [predict(model, change) for change in (0.0 * padding, 1.0 * padding, 1.0 * ~padding)]
    np.testing.assert_array_equal(*outputs[:2])
    assert np.abs(outputs[2] - outputs[0]).max() > 1e-3
    t5_encoder(tmp_path / "wide", 24)
    wrong = parse(config_of(pipe[1], **folders | {"text.pretrained": str(tmp_path / "wide")}))
    with pytest.raises(
        ValueError, match="model.cross_attention_dim=16: text.pretrained='.*wide' has 24"
    ):
        load_frozen(wrong)


def test_latents_are_not_clipped_to_the_range_of_pictures(pipe):
    settings = parse(config_of(pipe[1]))
    model = build_model(model_graph(settings), random_params(settings), load_frozen(settings))
    batch, x = batch_of(settings), 5 * jax.random.normal(jax.random.key(0), (2, *settings.shape))
    t, schedule = jnp.full(2, 900), settings.diffusion.make_schedule()

    @nnx.jit
    def x0_of(model):
        captions = model.encode(batch["token_ids"], batch["token_mask"])
        denoise = make_denoise(
            model, schedule, captions, captions, prediction_type="epsilon", guidance=2.0
        )
        return denoise(x, t, t - 1).x0

    bounds = []
    for latent in (True, False):
        if not latent:
            model.vae = None
        bounds.append(float(jnp.abs(x0_of(model)).max()))
    assert bounds[0] > 3 and bounds[1] == 1


def test_the_frozen_networks_are_read_but_are_not_in_the_state(pipe, runs):
    config, workdir = runs["full"]
    assert config["latent"]["vae"] == str(pipe[1] / "vae") and config["text"]["pretrained"] == str(
        pipe[1] / "text_encoder"
    )
    assert {path[0] for path, _ in nnx.to_flat_state(load_run(str(workdir)).params)} == {
        "unet",
        "context",
    }
    settings = parse(config)
    frozen, params = load_frozen(settings), random_params(settings)
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    null = {k: v[:1] for k, v in batch_of(settings).items() if k != "image"}
    graph, process = model_graph(settings), settings.process
    loss = jax.jit(
        lambda frozen: loss_fn(build_model(graph, params, frozen), batch, null, process, settings)[
            0
        ]
    )
    moved = jax.tree.map(lambda a: a + 0.1, frozen)
    losses = [
        float(loss(f))
        for f in (frozen, frozen._replace(text=moved.text), frozen._replace(vae=moved.vae))
    ]
    assert len({*losses}) == 3 and np.isfinite(losses).all()


@pytest.mark.slow  # three compiled steps: bash launch/test.sh -m slow tests/test_latent.py -k mesh
def test_frozen_networks_on_a_mesh_give_the_loss_of_one_device(pipe):
    meshes = "1x1x1", "2x4x1", "1x4x2"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "latent_mesh_program.py", pipe[1], *meshes],
        env=os.environ | HERE | ON_EIGHT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout).values()
    np.testing.assert_allclose(others, one, rtol=1e-5)
    assert 0.1 < one < 10


@pytest.mark.parametrize("trainable", ["full", "lora", "context"])
def test_only_what_is_named_is_trained_and_has_moments(runs, trainable):
    config, workdir = runs[trainable]
    start, wanted = (
        dict(nnx.to_flat_state(start_of(config))),
        {
            "full": {"unet", "context"},
            "lora": {"lora", "context"},
            "context": {"context", "context_head"},
        }[trainable],
    )

    def kind(path):
        return "context_head" if path[:2] == ("unet", "context_head") else path[0]

    for weights in ("params", "ema"):
        after = nnx.to_flat_state(load_run(str(workdir), weights, merged=False).params)
        moved = {
            kind(path)
            for path, leaf in after
            if not np.array_equal(leaf.get_value(), start[path].get_value())
        }
        assert moved == wanted
    moments = jax.eval_shape(lambda: init_state(parse(config))).opt_state
    trained = sum(leaf.size for path, leaf in start.items() if kind(path) in wanted)
    # Gamma has no axis.
    assert sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.ndim) == 2 * trained - 2


def test_a_full_fine_tune_goes_back_to_a_folder_that_diffusers_reads(pipe, runs, tmp_path):
    import diffusers

    config, workdir = runs["full"]
    export_run(workdir, tmp_path / "out", report=lambda line: None)
    run = load_run(str(workdir))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet
    x, t, text = (
        np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32),
        7,
        torch.randn(2, 9, 16),
    )
    with torch.no_grad():
        expected, before = (nhwc(unet(nchw(x), t, text).sample) for unet in (theirs, pipe[0].unet))
    unet = build_model(model_graph(run.settings), run.params).unet
    assert_close(jax.jit(lambda unet: unet(x, jnp.int32(t), text.numpy()))(unet), expected)
    assert np.abs(before - expected).max() > 1e-2  # it was trained
    for name in ("vae", "text_encoder"):
        assert_same_tensors(pipe[1] / name, tmp_path / "out" / name)
    # A run that starts from it starts with the trained context.
    assert float(run.params["context"]["gamma"][...]) != 0
    jax.tree.map(np.testing.assert_array_equal, start_of(config_of(tmp_path / "out")), run.params)
    with pytest.raises(ValueError, match="--target=.*exists already"):
        export_run(workdir, tmp_path / "out")


def test_lora_goes_out_in_diffusers_names_beside_the_unet_it_changes(pipe, runs, tmp_path):
    config, workdir = runs["lora"]
    export_run(workdir, tmp_path / "out", report=lambda line: None)
    assert_same_tensors(pipe[1] / "unet", tmp_path / "out" / "unet")
    unet = load_unet(tmp_path / "out" / "unet")
    layers = load_lora(tmp_path / "out" / "lora.safetensors", {"unet": unet})["unet"]
    assert {layer.rank for layer in layers.values()} == {2}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0" in layers
    merge_lora(unet, layers)
    expected = load_run(str(workdir)).params["unet"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        nnx.state(unet, nnx.Param),
        expected,
    )
    differences = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), start_of(config)["unet"], expected
    )
    assert sum(d > 1e-5 for d in jax.tree.leaves(differences)) == len(layers)


def test_a_joint_run_starts_from_a_run_that_trained_the_context_alone(pipe, runs):
    first = load_run(str(runs["context"][1]))
    start = {"train.init_from": str(runs["context"][1]), "context.estimate": "posterior_mean"}
    jax.tree.map(np.testing.assert_array_equal, start_of(config_of(pipe[1], **start)), first.params)
    assert float(first.params["context"]["gamma"][...]) != 0
    lora = start_of(config_of(pipe[1], **start | {"train.trainable": "lora"}))
    np.testing.assert_array_equal(
        lora["context"]["gamma"][...], first.params["context"]["gamma"][...]
    )
    assert {"lora", "unet", "context"} == set(lora)
    with pytest.raises(
        ValueError,
        match=r"init_from=.*holds another model: context/.* \(16, 16\) there, \(16, 32\) here",
    ):
        start_of(config_of(pipe[1], **start | {"context.width": 32}))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train.trainable": "some"},
            "train.trainable='some': unknown; one of full, lora, context",
        ),
        (
            {"train.trainable": "context"},
            "needs a trained network, by model.pretrained or train.init_from",
        ),
        ({"latent.vae": "nowhere"}, "nowhere/config.json: no such file"),
        ({"text.pretrained": "nowhere"}, "data.tokenizer='': text.pretrained needs the folder"),
        ({"model.pretrained": "nowhere"}, "nowhere/model_index.json: no such file"),
        ({"train.lora_rank": 0}, "train.lora_rank=0: must be at least 1"),
        ({"model.patch_size": 3}, "model.patch_size=3: must divide the side of x0, 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        parse(adopt(config_dict(**changes)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.image_size": 15}, "data.image_size=15: must be a multiple of 2"),
        ({"sample.dynamic_threshold": 99.0}, "dynamic_threshold: is for pixels"),
    ],
    ids=["size", "threshold"],
)
def test_what_does_not_fit_the_latents_is_refused_in_one_line(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(config_of(pipe[1], **changes))
    with pytest.raises(
        ValueError, match="model.in_channels=3: must be 4, the channels of latent.vae"
    ):
        parse(config_dict(**{"latent.vae": str(pipe[1] / "vae")}))


def test_the_context_reads_the_tokens_of_a_frozen_clip_as_transformers_has_them(pipe, tmp_path):
    import transformers
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    clip = randomised_torch(
        transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=4,
            )
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    changes = {"context.tokens": "clip", "context.clip": str(tmp_path / "clip")}
    settings = parse(config_of(pipe[1], **changes))
    model = build_model(model_graph(settings), random_params(settings), load_frozen(settings))
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    pixels = np.asarray(batch["image"], np.float32) / 127.5 - 1
    with torch.no_grad():
        normed = ((pixels + 1) / 2 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
        expected = clip(nchw(normed.astype(np.float32))).last_hidden_state[:, 1:].numpy()
    assert_close(jax.jit(model.vision)(pixels), expected)
    # In the step the picture is there; in sampling x0 is decoded. Both reach r, and no parameter of
    # CLIP is in the state.
    null = {k: v[:1] for k, v in batch_of(settings).items() if k != "image"}
    loss = jax.jit(lambda model: loss_fn(model, batch, null, settings.process, settings)[0])
    assert np.isfinite(float(loss(model)))
    x0, _ = jax.jit(clean)(model, batch)
    args = model.encode(batch["token_ids"], batch["token_mask"]), batch["t"]
    relate = jax.jit(model.relate)
    # To the bit operation by operation: in one program the decoder rounds elsewhere.
    decoded = model.vae.decode(model.vae.from_diffusion(x0))
    np.testing.assert_array_equal(model.relate(x0, *args), model.relate(x0, *args, decoded))
    assert float(jnp.abs(relate(x0, *args, pixels) - relate(x0, *args, -pixels)).max()) > 1e-3
    with pytest.raises(
        ValueError, match="context.patch_size=4: gives 4 patches of x0; CLIP has 16 tokens"
    ):
        other = parse(config_of(pipe[1], **changes | {"context.patch_size": 4}))
        build_model(model_graph(other), random_params(other), load_frozen(other)).relate(x0, *args)
    with pytest.raises(ValueError, match="reads pictures, and data.source='cache' has none"):
        parse(config_of(pipe[1], **changes | {"data.source": "cache"}))
    with pytest.raises(ValueError, match="context.tokens='clip': needs context.clip"):
        parse(config_of(pipe[1], **{"context.tokens": "clip"}))
