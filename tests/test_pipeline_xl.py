"""Pictures from a Stable Diffusion XL folder against diffusers', and its two tokenizers."""

from __future__ import annotations

import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from safetensors.numpy import load_file, save_file
from same_pictures import (
    PROMPTS,
    assert_same_pictures,
    check,
    holes,
    pictures,
    saved,
    share_noise,
    theirs_from,
)
from torch_models import normal, stable_diffusion, stable_diffusion_xl
from transformers import CLIPTokenizer

from contextdiff_jax.pretrained.pipeline import load_pipeline


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' pipeline and its folder."""
    return saved(stable_diffusion, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def pair_xl(tmp_path_factory):
    """diffusers' XL pipeline and its folder."""
    return saved(stable_diffusion_xl, tmp_path_factory.mktemp("xl"))


@pytest.fixture
def same_noise(monkeypatch):
    return share_noise(monkeypatch)


def test_xl_gives_the_pictures_of_diffusers(pair_xl):
    pipe, folder = pair_xl
    plain = check(pipe, folder, steps=10)  # no negative text: guidance leads away from zeros
    given = check(pipe, folder, steps=10, negative="")  # an empty one is a text
    assert np.abs(given - plain).max() > 0.02
    wider = check(pipe, folder, size=(12, 8), steps=5, negative="blue")
    assert wider.shape != plain.shape
    index = json.loads((folder / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"]
    (folder / "model_index.json").write_text(
        json.dumps(index | {"force_zeros_for_empty_prompt": False})
    )
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    empty = check(pipe, folder, steps=10)
    assert np.abs(empty - plain).max() > 0.02
    (folder / "model_index.json").write_text(json.dumps(index))
    pipe.register_to_config(force_zeros_for_empty_prompt=True)


def test_xl_from_a_picture_gives_the_pictures_of_diffusers(pair_xl, same_noise):
    pipe, folder = pair_xl
    expected = theirs_from(
        pipe, StableDiffusionXLImg2ImgPipeline, strength=0.65, guidance_scale=5.0
    )
    options = dict(steps=10, guidance=5.0, noise=same_noise)
    images = load_pipeline(folder).image_to_image(PROMPTS, pictures(), strength=0.65, **options)
    assert_same_pictures(images, expected)


def test_xl_inpainting_gives_the_pictures_of_diffusers(pair_xl, same_noise):
    pipe, folder = pair_xl
    masks, mask_image = holes()
    expected = theirs_from(
        pipe,
        StableDiffusionXLInpaintPipeline,
        strength=0.7,
        guidance_scale=5.0,
        height=16,
        width=24,
        mask_image=mask_image,
    )
    options = dict(steps=10, guidance=5.0, noise=same_noise)
    images = load_pipeline(folder).inpaint(PROMPTS, pictures(), masks, strength=0.7, **options)
    assert_same_pictures(images, expected)


def test_an_xl_folder_that_does_not_fit_is_refused(pair_xl, tmp_path):
    _, folder = pair_xl
    shutil.copytree(folder, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "text_encoder")
    with pytest.raises(ValueError, match="XL's refiner is not supported"):
        load_pipeline(tmp_path / "sd")
    shutil.copytree(folder / "text_encoder_2", tmp_path / "sd" / "text_encoder")
    with pytest.raises(
        ValueError, match="cross_attention_dim differs from the text encoders' width, 40"
    ):
        load_pipeline(tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "text_encoder_2")
    with pytest.raises(ValueError, match="text_encoder_2"):
        load_pipeline(tmp_path / "sd")


def test_xls_autoencoder_does_not_overflow_in_float16(pair_xl, tmp_path):
    folder = shutil.copytree(pair_xl[1], tmp_path / "sd")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)  # the norms take the factor out again
    tensors["decoder.conv_in.weight"] *= 1e5
    save_file(tensors, path, {"format": "pt"})
    options = dict(noise=normal(2, 8, 8, 4), size=(16, 16), steps=2, guidance=1.0)
    full = load_pipeline(folder).text_to_image(PROMPTS, **options)
    half = load_pipeline(folder, dtype=jnp.float16).text_to_image(PROMPTS, **options)
    assert np.abs(half.astype(int) - full).mean() < 5 < full.std()


def test_a_token_without_a_row_in_the_embedding_is_refused(pair, pair_xl, tmp_path):
    for made, part in ((pair, "tokenizer"), (pair_xl, "tokenizer_2")):
        folder = shutil.copytree(made[1], tmp_path / part)
        tokenizer = CLIPTokenizer.from_pretrained(folder / part)
        tokenizer.add_tokens(["<sks>"])
        tokenizer.save_pretrained(folder / part)
        pipeline = load_pipeline(folder)
        message = f"{part}: token '<sks>' of 'a <sks> circle' has the id 56; .* rows for 0..55"
        for prompts, negative in ((["red", "a <sks> circle"], None), (["red"], "a <sks> circle")):
            with pytest.raises(ValueError, match=message):
                pipeline.text_to_image(prompts, steps=2, negative=negative)
        assert pipeline.token_ids(["red"])[0][0, 1] == 53


def test_a_prompt_that_is_cut_says_which_words_are_lost(pair, pair_xl, caplog):
    for folder in (pair[1], pair_xl[1]):
        caplog.clear()
        pipeline = load_pipeline(folder)
        with caplog.at_level(logging.WARNING, "contextdiff_jax"):
            pipeline.text_to_image(
                ["red " * 6, "red red red red red blue square"], size=(16, 16), steps=1
            )
        (record,) = caplog.records
        assert record.getMessage().endswith("is cut at 9 tokens; lost: 'blue square'")
