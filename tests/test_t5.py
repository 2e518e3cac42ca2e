"""T5's encoder against transformers' torch model with random weights."""

from __future__ import annotations

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch_models import assert_close, assert_same_tensors, randomised, run
from transformers.models.t5.modeling_t5 import T5Attention

from contextdiff_jax.models.t5 import T5Config, relative_buckets
from contextdiff_jax.pretrained import load_t5, save_t5

SIZES = dict(vocab_size=30, pad_token_id=0)
CASES = {
    # name: (length, config)
    "v1.0": (
        7,
        dict(
            d_model=16,
            d_kv=8,
            d_ff=40,
            num_layers=3,
            num_heads=3,
            feed_forward_proj="relu",
            **SIZES,
        ),
    ),
    "v1.1": (
        13,
        dict(
            d_model=12,
            d_kv=4,
            d_ff=20,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8,
            relative_attention_max_distance=9,
            **SIZES,
        ),
    ),
    "gated_silu": (
        40,
        dict(
            d_model=20,
            d_kv=6,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-silu",
            relative_attention_num_buckets=10,
            relative_attention_max_distance=20,
            layer_norm_epsilon=1e-3,
            **SIZES,
        ),
    ),
}


def torch_t5(name: str, torch_class=transformers.T5EncoderModel) -> torch.nn.Module:
    model = randomised(torch_class(transformers.T5Config(**CASES[name][1])))
    with torch.no_grad():  # unscaled logits: large ones would leave one key with all the weight
        for key, p in model.named_parameters():
            if key.endswith((".q.weight", ".k.weight")):
                p.mul_(0.5)
    return model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (torch model, its folder, our module)."""
    built = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp(name)
        model = torch_t5(name)
        model.save_pretrained(folder)
        built[name] = model, folder, load_t5(folder)
    return built


def check(model, module, ids, mask=None):
    with torch.no_grad():
        mask_there = None if mask is None else torch.tensor(mask.astype(np.int64))
        expected = model(torch.tensor(ids), attention_mask=mask_there).last_hidden_state
    output = run(module, jnp.asarray(ids), *(() if mask is None else (jnp.asarray(mask),)))
    assert_close(output, expected)
    return output


def token_ids(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 30, (2, length))


@pytest.mark.parametrize("name", CASES)
def test_states_equal_transformers(pairs, name):
    model, _, module = pairs[name]
    check(model, module, token_ids(CASES[name][0]))


@pytest.mark.parametrize("name", CASES)
def test_states_with_an_attention_mask_equal_transformers(pairs, name):
    model, _, module = pairs[name]
    length = CASES[name][0]
    ids, mask = token_ids(length), np.arange(length) < np.array([[4], [length]])
    before = np.asarray(check(model, module, ids, mask))
    ids[0, 4:] = 29 - ids[0, 4:]
    np.testing.assert_allclose(
        run(module, jnp.asarray(ids), jnp.asarray(mask))[0, :4], before[0, :4], atol=1e-6
    )
    unmasked = np.asarray(run(module, jnp.asarray(ids), jnp.asarray(mask | True)))
    assert np.abs(unmasked[0, :4] - before[0, :4]).max() > 0.01


@pytest.mark.parametrize(
    "buckets, distance", [(32, 128), (8, 9), (10, 20), (64, 500), (4, 3), (7, 11)]
)
def test_every_relative_position_has_the_bucket_of_transformers(buckets, distance):
    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = T5Attention._relative_position_bucket(
        offset, num_buckets=buckets, max_distance=distance
    )
    np.testing.assert_array_equal(relative_buckets(600, buckets, distance), expected.numpy())


@pytest.mark.parametrize("name", CASES)
def test_a_saved_encoder_has_the_same_bits_and_transformers_reads_it(pairs, tmp_path, name):
    _, folder, module = pairs[name]
    save_t5(module, tmp_path)
    assert_same_tensors(folder, tmp_path)
    check(
        transformers.T5EncoderModel.from_pretrained(tmp_path).eval(),
        module,
        token_ids(CASES[name][0]),
    )
    assert load_t5(tmp_path).config == module.config


def test_the_encoder_is_read_from_a_folder_of_the_whole_t5(tmp_path):
    model = torch_t5("v1.1", transformers.T5ForConditionalGeneration)
    model.save_pretrained(tmp_path)
    check(model.encoder, load_t5(tmp_path), token_ids(13))


@pytest.mark.parametrize(
    "name",
    [
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    ],
)
def test_the_embedding_is_read_by_each_of_its_names(pairs, tmp_path, name):
    _, source, module = pairs["v1.0"]
    shutil.copytree(source, tmp_path / "t5")
    file = tmp_path / "t5" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[name] = tensors.pop("shared.weight")
    safetensors.torch.save_file(tensors, file)
    np.testing.assert_array_equal(
        load_t5(tmp_path / "t5").shared.embedding[...], module.shared.embedding[...]
    )
    del tensors[name]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match="1 tensors do not fit: shared.weight: missing"):
        load_t5(tmp_path / "t5")


def test_bfloat16_products_keep_the_states_close(pairs):
    _, folder, module = pairs["v1.1"]
    ids = jnp.asarray(token_ids(13))
    half = run(load_t5(folder, dtype=jnp.bfloat16), ids)
    assert half.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(half, np.float32) - np.asarray(run(module, ids)))
    assert 0 < difference.max() < 0.5 and difference.mean() < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(feed_forward_proj="gated-tanh"),
            "feed_forward_proj='gated-tanh': must be ACT or gated-ACT",
        ),
        (dict(feed_forward_proj="a-relu"), "feed_forward_proj='a-relu': must be ACT or gated-ACT"),
        (dict(num_heads=0), "num_heads=0: must be a whole number of at least 1"),
        (
            dict(relative_attention_num_buckets=3),
            "relative_attention_num_buckets=3: must be at least 4",
        ),
    ],
)
def test_a_config_that_is_not_supported_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**change)
