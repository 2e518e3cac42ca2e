"""Fine-tuning of an XL folder: two tokenizers, two text encoders, sizes, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import config_dict, one_line, with_gamma
from flax import nnx
from latent_runs import PROMPTS, batch_of, config_of, run_of, start_of
from PIL import Image
from torch_models import (
    SMALLEST,
    assert_close,
    assert_same_tensors,
    nchw,
    nhwc,
    stable_diffusion_xl,
    t5_encoder,
)

from contextdiff_jax.data import load_tokenizer, make_loader, make_source
from contextdiff_jax.data.decoding import size_condition
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.pretrained import load_unet
from contextdiff_jax.pretrained.lora import load_lora, merge_lora
from contextdiff_jax.pretrained.pipeline import load_pipeline
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.settings import parse
from contextdiff_jax.training.export import export_run
from contextdiff_jax.training.step import draw, loss_fn

NULL = ("token_ids", "token_mask")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """diffusers' pipeline and its folder."""
    folder = tmp_path_factory.mktemp("xl")
    pipe = stable_diffusion_xl(folder / "words", SMALLEST)
    pipe.save_pretrained(folder / "sd")
    return pipe, folder / "sd"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of captioned pictures of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i, (height, width) in enumerate([(40, 20), (16, 16), (20, 48), (17, 33)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f'{{"file_name": "{i}.png", "text": "{("red", "a blue")[i % 2]}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def torch_captions(pipe, prompts):
    """(states, pooled text) that diffusers' network reads."""
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return states, pooled


def test_batches_hold_the_ids_of_both_tokenizers_and_the_sizes_of_the_pictures(pipe, pictures):
    changes = {"data.source": "folder", "data.path": str(pictures)}
    settings = parse(config_of(pipe[1], **changes))
    assert settings.data.sizes and settings.data.max_length == 9
    tokenizer = open_tokenizer(settings)
    loader = make_loader(
        make_source(settings.data),
        batch_size=4,
        tokenizer=tokenizer,
        max_length=9,
        num_threads=0,
    )
    batch = next(loader)
    theirs = [
        each(batch["caption"], padding="max_length", max_length=9, truncation=True).input_ids
        for each in (pipe[0].tokenizer, pipe[0].tokenizer_2)
    ]
    np.testing.assert_array_equal(batch["token_ids"], np.stack(theirs, axis=1))
    assert batch["token_ids"].shape == (4, 2, 9) and batch["token_mask"].shape == (4, 9)
    assert (batch["token_ids"][:, 0] != batch["token_ids"][:, 1]).any()  # they pad differently
    # Height, width, rows and columns that the crop to 16 x 16 cuts off before, height, width.
    expected = {(40, 20, 8, 0), (16, 16, 0, 0), (20, 48, 0, 11), (17, 33, 0, 8)}
    assert {tuple(map(int, row[:4])) for row in batch["sizes"]} == expected
    assert (batch["sizes"][:, 4:] == 16).all()
    assert load_frozen(settings).text.shapes(9) == ((2, 9), (9,))


def test_the_crop_of_a_scaled_picture_is_that_of_diffusers_training_script():
    """Its own resizing and cropping, by torchvision's rule: the shorter side first, then a cut."""
    np.testing.assert_array_equal(size_condition((100, 50), (25, 25)), [100, 50, 12, 0, 25, 25])
    cut = size_condition((300, 400), (100, 100), (0.0, 1.0))
    np.testing.assert_array_equal(cut, [300, 400, 0, 33, 100, 100])


def test_the_training_step_predicts_as_diffusers_network_does(pipe):
    config = config_of(pipe[1])
    settings = parse(config)
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    sizes = np.array([[40, 20, 12, 0, 16, 16], [16, 48, 0, 7, 16, 16]], np.float32)
    model = build_model(model_graph(settings), start_of(config), load_frozen(settings))

    @nnx.jit
    def predict(model):
        captions = model.encode(batch["token_ids"], batch["token_mask"])
        x, t = batch["noise"], batch["t"]
        return captions, [
            model.predict(x, t, captions._replace(sizes=given)) for given in (None, sizes)
        ]

    captions, outputs = predict(model)
    states, pooled = torch_captions(pipe[0], PROMPTS)
    assert_close(captions.tokens, states.numpy())
    assert_close(captions.pooled, pooled.numpy())
    whole = np.tile([16, 16, 0, 0, 16, 16], (2, 1))
    for given, output in zip((whole, sizes), outputs, strict=True):
        added = {"text_embeds": pooled, "time_ids": torch.tensor(given)}
        x, t = nchw(np.array(batch["noise"])), torch.tensor(np.array(batch["t"]))
        with torch.no_grad():
            expected = pipe[0].unet(x, t, states, added_cond_kwargs=added).sample
        assert_close(output, nhwc(expected))
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_a_dropped_caption_is_what_guidance_leads_away_from(pipe):
    """Zeros, as `force_zeros_for_empty_prompt` says: what the empty caption's states are is nothing
    to the loss.
    """
    config = config_of(pipe[1], **{"train.caption_dropout": 0.5})
    settings = parse(config)
    batch = draw(jax.random.key(0), batch_of(settings), settings)
    batch["dropped"] = jnp.array([True, False])
    graph, params, process = model_graph(settings), start_of(config), settings.process
    frozen = load_frozen(settings)
    assert frozen.text.zeros_for_empty

    @jax.jit
    def losses(frozen, null):
        model = build_model(graph, params, frozen)
        return loss_fn(model, batch, null, process, settings)[0]

    def null_of(text):
        ids, mask = load_tokenizer(settings.data.tokenizer).encode([text], 9)
        return dict(zip(NULL, (ids, mask), strict=True))

    assert losses(frozen, null_of("")) == losses(frozen, null_of("red"))
    for zeros in (True, False):
        frozen.text.zeros_for_empty = zeros
        empty = build_model(graph, params, frozen).encode_empty(*null_of("").values())
        assert (not np.any(empty.tokens)) == (not np.any(empty.pooled)) == zeros


@pytest.mark.slow  # bash launch/test.sh -m slow tests/test_latent_xl.py
def test_a_fine_tune_at_gain_zero_samples_what_the_folder_samples(pipe):
    config = config_of(pipe[1], **{"sample.steps": 10})
    settings, params = parse(config), start_of(config)
    pipeline = of_run(settings, open_tokenizer(settings), params)
    assert pipeline.opened.zeros_for_empty
    noise = np.random.default_rng(0).normal(size=(2, *settings.shape)).astype(np.float32)
    options = dict(noise=noise, steps=10, guidance=7.5)
    ours = pipeline.text_to_image(PROMPTS, **options).astype(int)
    theirs = load_pipeline(pipe[1]).text_to_image(PROMPTS, **options)
    assert theirs.std() > 30 and np.abs(ours - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.999
    moved = pipeline.with_params(with_gamma(params, 1.0)).text_to_image(PROMPTS, **options)
    assert (moved != theirs).mean() > 0.1


@pytest.mark.slow  # bash launch/test.sh -m slow tests/test_latent_xl.py
def test_a_full_fine_tune_goes_back_to_a_folder_that_diffusers_reads(pipe, pictures, tmp_path):
    import diffusers

    changes = {"data.source": "folder", "data.path": str(pictures), "train.ema_decay": 0.5}
    run_of(pipe[1], tmp_path / "run", **changes)
    export_run(tmp_path / "run", tmp_path / "out", report=lambda line: None)
    run = load_run(str(tmp_path / "run"))
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out").unet
    stored = nnx.state(load_unet(tmp_path / "out" / "unet"), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, stored, run.params["unet"])
    moved = [
        float((a - b).abs().max())
        for a, b in zip(theirs.parameters(), pipe[0].unet.parameters(), strict=True)
    ]
    assert min(moved) > 0  # the added conditions' layers too
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert_same_tensors(pipe[1] / name, tmp_path / "out" / name)
    again = start_of(config_of(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, again, run.params)


@pytest.mark.slow  # pytest -m slow tests/test_latent_xl.py -k alone
def test_lora_and_the_context_alone_are_trained_and_go_back(pipe, tmp_path):
    for kind in ("lora", "context"):
        changes = {"train.trainable": kind, "train.lora_rank": 2, "train.ema_decay": 0.5}
        run_of(pipe[1], tmp_path / kind, **changes)
        export_run(tmp_path / kind, tmp_path / f"{kind}-out", report=lambda line: None)
        assert_same_tensors(pipe[1] / "unet", tmp_path / f"{kind}-out" / "unet")
        params = load_run(str(tmp_path / kind)).params
        assert float(params["context"]["gamma"][...]) != 0
        unet = load_unet(tmp_path / f"{kind}-out" / "unet")
        if kind == "lora":
            file = tmp_path / "lora-out" / "lora.safetensors"
            merge_lora(unet, load_lora(file, {"unet": unet})["unet"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            nnx.state(unet, nnx.Param),
            params["unet"],
        )


def test_what_does_not_fit_two_encoders_is_refused_in_one_line(pipe, tmp_path):
    sd, words = str(pipe[1]), str(pipe[1] / "tokenizer")
    t5_encoder(tmp_path / "t5")
    cases = [
        (open_tokenizer, {"data.tokenizer": words}, "must be a folder that holds tokenizer, tok"),
        (
            open_tokenizer,
            {"text.pretrained": sd + "/text_encoder", "data.tokenizer": sd},
            "must be the folder of CLIP's tokenizer",
        ),
        (
            load_frozen,
            {"text.pretrained": str(tmp_path / "t5"), "data.tokenizer": str(tmp_path / "t5")},
            "model.cross_attention_dim=36: text.pretrained=.* has 16",
        ),
    ]
    for read, changes, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            read(parse(config_of(pipe[1], **changes)))
        one_line(error)
    plain = parse(config_dict(**{"data.tokenizer": sd}))
    with pytest.raises(ValueError, match="holds several tokenizers; name the folder of one"):
        open_tokenizer(plain)


def test_a_cache_of_latents_keeps_the_sizes(pipe, pictures, tmp_path):
    from contextdiff_jax.training.latent_cache import write_cache

    changes = {"data.source": "folder", "data.path": str(pictures)}
    settings = parse(config_of(pipe[1], **changes))
    write_cache(settings, tmp_path / "cache", batch_size=4)
    cached = {"data.source": "cache", "data.path": str(tmp_path / "cache")}
    source = make_source(parse(config_of(pipe[1], **cached)).data)
    made = make_source(settings.data)
    for i in range(4):
        np.testing.assert_array_equal(source[i]["sizes"], made[i]["sizes"])
        assert source[i]["token_ids"].shape == (2, 9)
