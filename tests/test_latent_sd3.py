"""Fine-tuning of a Stable Diffusion 3 folder on the path `flow`, and back to it."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import torch
from conftest import one_line, with_gamma
from flax import nnx
from latent_runs import PROMPTS, batch_of, config_of, run_of, start_of
from torch_models import assert_close, assert_same_tensors, nchw, nhwc
from torch_sd3 import MEDIUM, PARTS, stable_diffusion_3

from contextdiff_jax import Pipeline
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.pretrained import load_mmdit
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.pretrained.lora import load_lora, merge_lora
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.settings import parse
from contextdiff_jax.training.export import export_run
from contextdiff_jax.training.step import clean, draw

T5_LENGTH = 12
TEXT = {"text.t5_length": T5_LENGTH}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """diffusers' pipeline and its folder."""
    folder = tmp_path_factory.mktemp("sd3")
    pipe = stable_diffusion_3(folder / "words", transformer=MEDIUM)
    pipe.save_pretrained(folder / "sd")
    return pipe, folder / "sd"


def test_the_folder_says_what_is_trained(pipe):
    config = config_of(pipe[1], **TEXT)
    settings = parse(config)
    assert config["model"]["kind"] == "mmdit" and settings.shape == (8, 8, 16)
    assert (settings.diffusion.schedule, settings.diffusion.prediction_type) == ("flow", "velocity")
    assert settings.context.estimate == "velocity"  # `plugin` has no x0 there
    sample = settings.sample
    assert (sample.sampler, sample.spacing, sample.spacing_factor) == ("euler", "sd3", 3.0)
    assert settings.data.max_length == 9 + T5_LENGTH and settings.text.width == 40
    assert adopt(config) == config
    kept = config_of(pipe[1], **TEXT | {"context.estimate": "posterior_mean"})
    assert kept["context"]["estimate"] == "posterior_mean"


def test_the_training_step_predicts_as_diffusers_network_does(pipe):
    config = config_of(pipe[1], **TEXT)
    settings = parse(config)
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    assert batch["token_ids"].shape == (2, 9 + 9 + T5_LENGTH)
    model = build_model(model_graph(settings), start_of(config), load_frozen(settings))
    schedule = settings.process.schedule

    @nnx.jit
    def predict(model):
        captions = model.encode(batch["token_ids"], batch["token_mask"])
        x, t = schedule.network_input(batch["noise"], batch["t"])
        return clean(model, batch)[0], model.predict(x, t, captions)

    x0, output = predict(model)
    with torch.no_grad():
        states, _, pooled, _ = pipe[0].encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        expected = pipe[0].transformer(
            nchw(np.array(batch["noise"])),
            timestep=1000 * torch.tensor(np.array(batch["t"])),
            encoder_hidden_states=states,
            pooled_projections=pooled,
        )
        pixels = np.asarray(batch["image"], np.float32) / 127.5 - 1
        q, vae = pipe[0].vae.encode(nchw(pixels)).latent_dist, pipe[0].vae.config
        latents = q.mean + q.std * nchw(np.array(batch["latent_noise"]))
        latents = (latents - vae.shift_factor) * vae.scaling_factor
    assert_close(output, nhwc(expected.sample))
    assert_close(x0, nhwc(latents))


def test_a_fine_tune_at_gain_zero_samples_what_the_folder_samples(pipe):
    config = config_of(pipe[1], **TEXT | {"sample.steps": 10})
    settings, params = parse(config), start_of(config)
    pipeline = of_run(settings, open_tokenizer(settings), params)
    noise = np.random.default_rng(0).normal(size=(2, *settings.shape)).astype(np.float32)
    options = dict(noise=noise, steps=10, guidance=4.5)
    ours = pipeline.text_to_image(PROMPTS, **options).astype(int)
    theirs = Pipeline.open(pipe[1], max_sequence_length=T5_LENGTH).text_to_image(PROMPTS, **options)
    assert theirs.std() > 30 and np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.999
    moved = pipeline.with_params(with_gamma(params, 1.0)).text_to_image(PROMPTS, **options)
    np.testing.assert_array_equal(moved, ours)  # a velocity holds the context: r is not read
    with pytest.raises(ValueError, match="height and width must be multiples of 4"):
        pipeline.latent_shape((18, 16))


@pytest.mark.slow  # bash launch/test.sh -m slow tests/test_latent_sd3.py
def test_a_full_fine_tune_goes_back_to_a_folder_that_diffusers_reads(pipe, tmp_path):
    import diffusers

    run_of(pipe[1], tmp_path / "run", **TEXT | {"train.ema_decay": 0.5})
    export_run(tmp_path / "run", tmp_path / "out", report=lambda line: None)
    run = load_run(str(tmp_path / "run"))
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "out").transformer
    stored = nnx.state(load_mmdit(tmp_path / "out" / "transformer"), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, stored, run.params["transformer"])
    pairs = zip(theirs.named_parameters(), pipe[0].transformer.named_parameters(), strict=True)
    still = {name for (name, a), (_, b) in pairs if (a - b).abs().max() < 1e-3}
    # Nobody reads what the text's tokens make of the others in the last layer.
    assert all(re.search(r"blocks\.2\.attn\.(add_q_proj|norm_added_q)\.", name) for name in still)
    for name in ("vae", *PARTS):
        assert_same_tensors(pipe[1] / name, tmp_path / "out" / name)
    assert float(run.params["context"]["gamma"][...]) != 0
    again = start_of(config_of(tmp_path / "out", **TEXT))
    jax.tree.map(np.testing.assert_array_equal, again, run.params)


@pytest.mark.slow  # pytest -m slow tests/test_latent_sd3.py
@pytest.mark.parametrize("kind", ["lora", "context"])
def test_lora_and_the_context_alone_are_trained_and_go_back(pipe, tmp_path, kind):
    changes = {"train.trainable": kind, "train.lora_rank": 2, "train.ema_decay": 0.5}
    changes |= {"context.estimate": "posterior_mean"} if kind == "context" else {}
    run_of(pipe[1], tmp_path / "run", **TEXT | changes)
    export_run(tmp_path / "run", tmp_path / "out", report=lambda line: None)
    assert_same_tensors(pipe[1] / "transformer", tmp_path / "out" / "transformer")
    params = load_run(str(tmp_path / "run")).params
    assert float(params["context"]["gamma"][...]) != 0
    network = load_mmdit(tmp_path / "out" / "transformer")
    if kind == "lora":
        layers = load_lora(tmp_path / "out" / "lora.safetensors", {"transformer": network})
        names = layers["transformer"].keys()
        wanted = ("attn.to_q", "attn.add_k_proj", "attn2.to_v", "attn.to_out.0")
        assert {f"transformer_blocks.0.{layer}" for layer in wanted} <= names
        assert "transformer_blocks.2.attn.to_add_out" not in names  # the text ends before it
        assert {layer.rank for layer in layers["transformer"].values()} == {2}
        merge_lora(network, layers["transformer"])
    trained = {path: leaf for path, leaf in nnx.to_flat_state(params["transformer"])}
    for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        np.testing.assert_allclose(leaf.get_value(), trained[path].get_value(), atol=1e-6)


def test_what_does_not_fit_is_refused_in_one_line(pipe, tmp_path):
    sd = str(pipe[1])
    cases = [
        (
            {"data.tokenizer": sd + "/tokenizer"},
            "must be a folder that holds tokenizer, tokenizer_2",
        ),
        (
            {"text.pretrained": sd + "/text_encoder_3", "data.tokenizer": sd},
            "another model's; must",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            open_tokenizer(parse(config_of(sd, **TEXT | changes)))
        one_line(error)
    with pytest.raises(ValueError, match="text.t5_length=0: must be at least 1"):
        parse(config_of(sd, **{"text.t5_length": 0}))
    wrong = {"text.pretrained": sd + "/text_encoder_3", "data.tokenizer": sd + "/tokenizer_3"}
    with pytest.raises(ValueError, match="model.pooled_projection_dim=36: text.pretrained=.* 40"):
        load_frozen(parse(config_of(sd, **TEXT | wrong)))


def test_a_scheduler_of_other_times_is_not_fine_tuned(pipe, tmp_path):
    import json

    folder = tmp_path / "sd"
    folder.mkdir()
    for part in pipe[1].iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "scheduler").unlink()
    (folder / "scheduler").mkdir()
    values = json.loads((pipe[1] / "scheduler" / "scheduler_config.json").read_text())
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(values | {"num_train_timesteps": 500}))
    with pytest.raises(
        ValueError, match="scheduler: num_train_timesteps=500: .* only 1000"
    ) as error:
        config_of(folder, **TEXT)
    one_line(error)


def test_ids_of_a_run_are_those_of_the_folders_tokenizers(pipe):
    settings = parse(config_of(pipe[1], **TEXT))
    ids, mask = load_tokenizer(settings.data.tokenizer).encode(PROMPTS, settings.data.max_length)
    model = Pipeline.open(pipe[1], max_sequence_length=T5_LENGTH).model
    np.testing.assert_array_equal(ids, model.encode_text(PROMPTS)[0])
    np.testing.assert_array_equal(mask, model.encode_text(PROMPTS)[1])
    np.testing.assert_array_equal(ids, np.concatenate(model.token_ids(PROMPTS), axis=1))
    shapes = load_frozen(settings).text.shapes(settings.data.max_length)
    assert shapes == (ids.shape[1:], mask.shape[1:])
