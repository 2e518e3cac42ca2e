"""Latent training: what is frozen, what is trained, where a run starts, and how it becomes a diffusers folder again."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import config_dict
from flax import nnx
from PIL import Image
from test_training import randomised, with_gamma
from torch_models import assert_close, assert_same_tensors, nchw, nhwc, stable_diffusion
from torch_models import randomised as randomised_torch

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.generation import Generator
from contextdiff_jax.models.contextdiff import Frozen, make_denoise
from contextdiff_jax.pretrained import load_unet
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.pretrained.lora import load_lora, merge_lora
from contextdiff_jax.pretrained.pipeline import load_pipeline
from contextdiff_jax.run import load_run
from contextdiff_jax.settings import parse, parse_autoencoder
from contextdiff_jax.training.autoencoder import train_autoencoder
from contextdiff_jax.training.export import export_run
from contextdiff_jax.training.frozen import load_frozen
from contextdiff_jax.training.loop import train
from contextdiff_jax.training.state import build_model, init_state, model_graph
from contextdiff_jax.training.step import clean, draw, loss_fn, make_train_step

PROMPTS = ["a red circle", "the blue square is left of a rather long description"]
SMALL = {
    "train.batch_size": 4, "train.steps": 2, "train.checkpoint_every": 2, "train.learning_rate": 1e-2, "train.warmup_steps": 0,
    "train.decay": "constant", "context.patch_size": 2, "sample.guidance": 7.5, "sample.prompts": "('a red circle',)",
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """diffusers' pipeline and its folder."""
    folder = tmp_path_factory.mktemp("latent")
    pipe = stable_diffusion(folder / "words")
    pipe.save_pretrained(folder / "sd")
    return pipe, folder / "sd"


def config_of(folder, **changes):
    return adopt(config_dict(**{"model.pretrained": str(folder)} | SMALL | changes))


@pytest.fixture(scope="module")
def finetune(pipe, tmp_path_factory):
    """Two steps of a full fine-tune: its config and workdir."""
    config, workdir = config_of(pipe[1]), tmp_path_factory.mktemp("runs") / "full"
    train(parse(config), config, workdir)
    return config, workdir


def batch_of(settings, seed=0):
    rng = np.random.default_rng(seed)
    ids, mask = load_tokenizer(settings.data.tokenizer).encode(PROMPTS, settings.data.max_length)
    images = rng.integers(0, 256, (2, settings.data.image_size, settings.data.image_size, 3)).astype(np.uint8)
    return {"image": jnp.asarray(images), "token_ids": jnp.asarray(ids), "token_mask": jnp.asarray(mask)}


def test_a_fine_tune_at_gain_zero_samples_what_the_folder_samples(pipe, tmp_path):
    config = config_of(pipe[1], **{"train.steps": 1, "train.learning_rate": 0.0, "sample.steps": 10})
    settings = parse(config)
    assert settings.shape == (8, 8, 4) and settings.data.max_length == 9 and settings.sample.steps_offset == 1
    train(settings, config, tmp_path)
    run = load_run(str(tmp_path))
    assert float(run.params["context"]["gamma"][...]) == 0
    ours = Generator(run.settings, run.tokenizer)(run.params, PROMPTS, seed=3)
    noise_key, _ = jax.random.split(jax.random.key(3))
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(noise_key, i), settings.shape) for i in range(2)])
    theirs = load_pipeline(pipe[1]).text_to_image(PROMPTS, noise=noise, steps=10, guidance=7.5)
    assert theirs.std() > 30 and np.abs(ours.astype(int) - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.999  # what is left is the rounding of pictures to whole numbers
    moved = Generator(run.settings, run.tokenizer)(with_gamma(randomised(run.params), 1.0), PROMPTS, seed=3)
    assert np.abs(moved.astype(int) - theirs).mean() > 1


def test_latents_are_draws_from_the_autoencoders_gaussian_as_diffusers_has_it(pipe):
    settings = parse(config_of(pipe[1]))
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    model = build_model(model_graph(settings), init_state(settings).params, load_frozen(settings))
    pixels = np.asarray(batch["image"], np.float32) / 127.5 - 1
    with torch.no_grad():
        q = pipe[0].vae.encode(nchw(pixels)).latent_dist
        expected = nhwc(q.mean + q.std * nchw(np.array(batch["latent_noise"]))) * pipe[0].vae.config.scaling_factor
    assert_close(clean(model, batch)[0], expected)


def test_latents_are_not_clipped_to_the_range_of_pictures(pipe):
    settings = parse(config_of(pipe[1]))
    model = build_model(model_graph(settings), init_state(settings).params, load_frozen(settings))
    batch, x = batch_of(settings), 5 * jax.random.normal(jax.random.key(0), (2, *settings.shape))
    tokens, t = model.text(batch["token_ids"], batch["token_mask"]), jnp.full(2, 900)
    bounds = []
    for latent in (True, False):
        if not latent:
            model.vae = None
        mask = batch["token_mask"]
        denoise = make_denoise(
            model, settings.diffusion.make_schedule(), tokens, mask, tokens, mask, prediction_type="epsilon", guidance=2.0
        )
        bounds.append(float(jnp.abs(denoise(x, t, t - 1).x0).max()))
    assert bounds[0] > 3 and bounds[1] == 1


def test_the_frozen_networks_are_neither_in_the_state_nor_changed(pipe, finetune):
    settings = parse(finetune[0])
    run = load_run(str(finetune[1]))
    assert {path[0] for path, _ in nnx.to_flat_state(run.params)} == {"unet", "context"}
    assert finetune[0]["latent"]["vae"] == str(pipe[1] / "vae")
    frozen = load_frozen(settings)
    state = jax.jit(lambda: init_state(settings))()
    batch, null = batch_of(settings), {k: v[:1] for k, v in batch_of(settings).items() if k != "image"}
    step = jax.jit(make_train_step(settings))
    # The text encoder is read: another one changes the loss, with the same state and batch.
    other = Frozen(frozen.vae, jax.tree.map(lambda a: a + 0.1 if a.dtype == jnp.float32 else a, frozen.text))
    sums = [float(step(dataclasses.replace(state, params=randomised(state.params)), batch, null, f)[0].metric_sums["loss"])
            for f in (frozen, other)]
    assert sums[0] != sums[1] and np.isfinite(sums).all()


@pytest.mark.parametrize("trainable", ["lora", "context"])
def test_only_what_is_named_is_trained_and_has_moments(pipe, trainable):
    settings = parse(config_of(pipe[1], **{"train.trainable": trainable, "context.estimate": "posterior_mean"}))
    state = jax.jit(lambda: init_state(settings))()
    state = dataclasses.replace(state, params=randomised(state.params))
    state = dataclasses.replace(state, ema=state.params)
    null = {k: v[:1] for k, v in batch_of(settings).items() if k != "image"}
    new, finite = jax.jit(make_train_step(settings))(state, batch_of(settings), null, load_frozen(settings))
    assert bool(finite)
    wanted = {"context", "unet/context_head"} | ({"lora"} if trainable == "lora" else set())
    for before, after in ((state.params, new.params), (state.ema, new.ema)):
        old = dict(nnx.to_flat_state(before))
        moved = {p for p, leaf in nnx.to_flat_state(after) if not np.array_equal(leaf.get_value(), old[p].get_value())}
        assert {"unet/context_head" if p[:2] == ("unet", "context_head") else p[0] for p in moved} == wanted
        assert len(moved) > 10
    trained = sum(leaf.size for path, leaf in nnx.to_flat_state(state.params) if path[0] in wanted or "context_head" in path)
    moments = sum(leaf.size for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim)
    assert moments == 2 * trained


def test_a_full_fine_tune_goes_back_to_a_folder_that_diffusers_reads(pipe, finetune, tmp_path):
    import diffusers

    export_run(finetune[1], tmp_path / "out", report=lambda line: None)
    run = load_run(str(finetune[1]))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet
    x, t, text = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32), 7, torch.randn(2, 9, 16)
    with torch.no_grad():
        expected = nhwc(theirs(nchw(x), t, text).sample)
    unet = build_model(model_graph(run.settings), run.params).unet
    assert_close(unet(x, jnp.int32(t), text.numpy()), expected)
    with torch.no_grad():
        before = nhwc(pipe[0].unet(nchw(x), t, text).sample)
    assert np.abs(before - expected).max() > 1e-2  # it was trained
    for name in ("vae", "text_encoder"):
        assert_same_tensors(pipe[1] / name, tmp_path / "out" / name)
    # A run that starts from it starts with the trained context.
    config = config_of(tmp_path / "out", **{"train.steps": 1, "train.learning_rate": 0.0})
    train(parse(config), config, tmp_path / "again")
    again = load_run(str(tmp_path / "again")).params
    assert float(run.params["context"]["gamma"][...]) != 0
    jax.tree.map(np.testing.assert_array_equal, again, run.params)
    with pytest.raises(ValueError, match="--target=.*exists already"):
        export_run(finetune[1], tmp_path / "out")


def test_lora_goes_out_in_diffusers_names_beside_the_unet_it_changes(pipe, tmp_path):
    config = config_of(pipe[1], **{"train.trainable": "lora", "train.lora_rank": 2})
    train(parse(config), config, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", report=lambda line: None)
    assert_same_tensors(pipe[1] / "unet", tmp_path / "out" / "unet")
    unet = load_unet(tmp_path / "out" / "unet")
    before = nnx.state(unet, nnx.Param)
    before = jax.tree.map(jnp.copy, before)
    layers = load_lora(tmp_path / "out" / "lora.safetensors", {"unet": unet})["unet"]
    assert {layer.rank for layer in layers.values()} == {2}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0" in layers
    merge_lora(unet, layers)
    expected = load_run(str(tmp_path / "run")).params["unet"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), nnx.state(unet, nnx.Param), expected)
    differences = jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, expected))
    assert sum(d > 1e-5 for d in differences) == len(layers)


def test_a_joint_run_starts_from_a_run_that_trained_the_context_alone(pipe, tmp_path):
    first = config_of(pipe[1], **{"train.trainable": "context"})
    train(parse(first), first, tmp_path / "first")
    second = config_of(pipe[1], **{"train.init_from": str(tmp_path / "first"), "train.steps": 1, "train.learning_rate": 0.0})
    train(parse(second), second, tmp_path / "second")
    one, two = (load_run(str(tmp_path / name)).params for name in ("first", "second"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert float(one["context"]["gamma"][...]) != 0
    other = config_of(pipe[1], **{"train.init_from": str(tmp_path / "first"), "context.width": 32})
    with pytest.raises(ValueError, match=r"init_from=.*holds another model: context/.*\(16,.* there, \(32,"):
        train(parse(other), other, tmp_path / "third")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train.trainable": "some"}, "train.trainable='some': unknown; one of full, lora, context"),
        ({"train.trainable": "context"}, "needs a trained UNet, by model.pretrained or train.init_from"),
        ({"latent.vae": "nowhere"}, "nowhere/config.json: no such file"),
        ({"text.pretrained": "nowhere"}, "data.tokenizer='': text.pretrained needs the folder"),
        ({"model.pretrained": "nowhere"}, "nowhere/model_index.json: no such file"),
        ({"train.lora_rank": 0}, "train.lora_rank=0: must be at least 1"),
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
    with pytest.raises(ValueError, match="model.in_channels=3: must be 4, the channels of latent.vae"):
        parse(config_dict(**{"latent.vae": str(pipe[1] / "vae")}))


def vae_config(folder, **train):
    from configs.vae_emoji import get_config

    config = get_config()
    config.train.update(steps=30, batch_size=4, log_every=10, checkpoint_every=10, **train)
    config.data.update(source="emoji", path=str(folder), image_size=16)
    config.vae.update(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, sample_size=16,
    )
    return config.to_dict()


def test_an_autoencoder_learns_resumes_and_is_a_diffusers_folder_with_unit_latents(tmp_path):
    import diffusers

    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        colour = rng.integers(0, 256, 3)
        Image.fromarray(np.broadcast_to(colour.astype(np.uint8), (16, 16, 3)).copy()).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n")
    (tmp_path / "metadata_train.jsonl").write_text("".join(rows[:20]))
    (tmp_path / "metadata_test.jsonl").write_text("".join(rows[20:]))
    config, workdir = vae_config(tmp_path), tmp_path / "vae_run"
    report = train_autoencoder(parse_autoencoder(config), config, workdir)
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert [row["step"] for row in log] == [10, 20, 30] and log[-1]["l1"] < 0.6 * log[0]["l1"]
    assert (workdir / "reconstructions.png").exists()
    # Trained already: the same command measures the same.
    assert train_autoencoder(parse_autoencoder(config), config, workdir) == report
    theirs = diffusers.AutoencoderKL.from_pretrained(workdir / "vae")
    assert theirs.config.scaling_factor == report["scaling_factor"]
    pixels = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png"), np.float32) / 127.5 - 1 for i in range(20)])
    with torch.no_grad():
        q = theirs.encode(nchw(pixels)).latent_dist
    std = float((q.mean.var() + q.var.mean()).sqrt()) * theirs.config.scaling_factor
    assert abs(std - 1) < 0.02


def test_the_context_reads_the_tokens_of_a_frozen_clip_as_transformers_has_them(pipe, tmp_path):
    import transformers
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    clip = randomised_torch(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )))
    clip.save_pretrained(tmp_path / "clip")
    changes = {"context.tokens": "clip", "context.clip": str(tmp_path / "clip")}
    settings = parse(config_of(pipe[1], **changes))
    model = build_model(model_graph(settings), randomised(init_state(settings).params), load_frozen(settings))
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    pixels = np.asarray(batch["image"], np.float32) / 127.5 - 1
    with torch.no_grad():
        normed = ((pixels + 1) / 2 - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
        expected = clip(nchw(normed.astype(np.float32))).last_hidden_state[:, 1:].numpy()
    assert_close(model.vision(pixels), expected)
    # In the step the picture is there; in sampling x0 is decoded. Both reach r, and no parameter of CLIP is in the state.
    null = {k: v[:1] for k, v in batch_of(settings).items() if k != "image"}
    loss, _ = loss_fn(model, batch, null, settings.diffusion.make_schedule(), settings)
    assert np.isfinite(float(loss))
    x0, _ = clean(model, batch)
    args = model.text(batch["token_ids"], batch["token_mask"]), batch["token_mask"], batch["t"]
    decoded = model.vae.decode(model.vae.from_diffusion(x0))
    np.testing.assert_array_equal(model.relate(x0, *args), model.relate(x0, *args, decoded))
    assert float(jnp.abs(model.relate(x0, *args, pixels) - model.relate(x0, *args, -pixels)).max()) > 1e-3
    with pytest.raises(ValueError, match="context.patch_size=4: gives 4 patches of x0; CLIP has 16 tokens"):
        other = parse(config_of(pipe[1], **changes | {"context.patch_size": 4}))
        build_model(model_graph(other), init_state(other).params, load_frozen(other)).relate(x0, *args)
    with pytest.raises(ValueError, match="reads pictures, and data.source='cache' has none"):
        parse(config_of(pipe[1], **changes | {"data.source": "cache"}))
    with pytest.raises(ValueError, match="context.tokens='clip': needs context.clip"):
        parse(config_of(pipe[1], **{"context.tokens": "clip"}))
