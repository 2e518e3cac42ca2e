"""CLIP's encoders against transformers' torch models with random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from torch_models import assert_close, assert_same_tensors, nchw, normal, randomised, run

from contextdiff_jax.models.clip import CLIPText, CLIPTextConfig
from contextdiff_jax.pretrained import (
    load_clip_text,
    load_clip_vision,
    save_clip_text,
    save_clip_vision,
)

TEXT = {
    # name: (with a projection, config)
    "sd1": (
        False,
        dict(
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=11,
            vocab_size=50,
            hidden_act="quick_gelu",
            eos_token_id=2,
        ),
    ),
    "sd2": (
        False,
        dict(
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=9,
            vocab_size=40,
            hidden_act="gelu",
            eos_token_id=39,
        ),
    ),
    "xl": (
        True,
        dict(
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=60,
            projection_dim=14,
            max_position_embeddings=9,
            hidden_act="gelu",
            eos_token_id=7,
            layer_norm_eps=1e-3,
        ),
    ),
}
VISION = {
    "plain": (
        False,
        dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=12,
            patch_size=4,
            hidden_act="quick_gelu",
        ),
    ),
    "projection": (
        True,
        dict(
            hidden_size=12,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=9,
            patch_size=3,
            projection_dim=10,
            hidden_act="gelu",
            layer_norm_eps=1e-3,
        ),
    ),
    "remainder": (
        True,
        dict(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=11,
            patch_size=4,
            projection_dim=5,
            num_channels=4,
            hidden_act="gelu_pytorch_tanh",
        ),
    ),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """name -> (torch model, its folder, our module)."""
    return _built(TEXT, "CLIPText", load_clip_text, tmp_path_factory)


@pytest.fixture(scope="module")
def visions(tmp_path_factory):
    return _built(VISION, "CLIPVision", load_clip_vision, tmp_path_factory)


def _built(cases, name, load, tmp_path_factory):
    built = {}
    for case, (projection, config) in cases.items():
        folder = tmp_path_factory.mktemp(case)
        torch_class = getattr(
            transformers, name + "Model" + ("WithProjection" if projection else "")
        )
        model = randomised(torch_class(getattr(transformers, name + "Config")(**config)))
        model.save_pretrained(folder)
        built[case] = model, folder, load(folder)
    return built


def token_ids(config: dict, length: int) -> np.ndarray:
    """Three texts with their end token in different places; one has it twice, one has larger ids
    after it.
    """
    ids = np.random.default_rng(0).integers(8, config["vocab_size"] - 2, (3, length))
    eos = config["eos_token_id"]
    end = config["vocab_size"] - 1 if eos == 2 else eos
    ids[0, -1], ids[1, 2], ids[2, 1], ids[2, 4] = (end,) * 4
    return ids


def check_text(model, module, ids, mask=None):
    with torch.no_grad():
        expected = model(
            torch.tensor(ids),
            attention_mask=None if mask is None else torch.tensor(mask),
            output_hidden_states=True,
        )
    output = run(module, jnp.asarray(ids), *(() if mask is None else (jnp.asarray(mask),)))
    assert_close(output.last, expected.last_hidden_state)
    if module.config.with_projection:
        assert_close(output.projected, expected.text_embeds)
    else:
        assert output.projected is None
        assert_close(output.pooled, expected.pooler_output)
    assert (
        len(output.hidden_states)
        == len(expected.hidden_states)
        == module.config.num_hidden_layers + 1
    )
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", TEXT)
def test_text_states_and_pooled_states_equal_transformers(texts, name):
    model, _, module = texts[name]
    check_text(model, module, token_ids(TEXT[name][1], TEXT[name][1]["max_position_embeddings"]))


@pytest.mark.parametrize("name", TEXT)
def test_text_with_an_attention_mask_and_a_shorter_length_equals_transformers(texts, name):
    model, _, module = texts[name]
    ids = token_ids(TEXT[name][1], 7)
    mask = np.arange(7) < np.array([[7], [3], [5]])
    check_text(model, module, ids, mask.astype(np.int64))
    # The mask matters: it must not be compared with a network that ignores it.
    ids[1, 1] += 1  # seen by the tokens that follow
    masked = np.asarray(run(module, jnp.asarray(ids), jnp.asarray(mask)).last)
    ids[1, 3:] = 9  # padding
    np.testing.assert_allclose(
        run(module, jnp.asarray(ids), jnp.asarray(mask)).last[1, :3], masked[1, :3], atol=1e-6
    )
    assert (
        np.abs(np.asarray(run(module, jnp.asarray(ids), jnp.asarray(mask | True)).last) - masked)[
            1, 4:
        ].max()
        > 0.01
    )


def test_a_token_sees_only_what_is_before_it(texts):
    _, _, module = texts["sd1"]
    ids = token_ids(TEXT["sd1"][1], 8)
    before = run(module, jnp.asarray(ids)).last
    ids[:, 5] = 9
    after = run(module, jnp.asarray(ids)).last
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(np.asarray(before - after))[:, 5:].max() > 0.01


@pytest.mark.parametrize("name", VISION)
def test_vision_states_equal_transformers(visions, name):
    model, _, module = visions[name]
    config = module.config
    images = normal(2, config.image_size, config.image_size, config.num_channels)
    with torch.no_grad():
        expected = model(nchw(images), output_hidden_states=True)
    output = run(module, jnp.asarray(images))
    assert_close(output.last, expected.last_hidden_state)
    if config.with_projection:
        assert_close(output.projected, expected.image_embeds)
    else:
        assert_close(output.pooled, expected.pooler_output)
    for ours, theirs in zip(output.hidden_states[1:], expected.hidden_states[1:], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", TEXT)
def test_a_saved_text_encoder_has_the_same_bits_and_transformers_reads_it(texts, tmp_path, name):
    model, folder, module = texts[name]
    save_clip_text(module, tmp_path)
    assert_same_tensors(folder, tmp_path)
    check_text(type(model).from_pretrained(tmp_path).eval(), module, token_ids(TEXT[name][1], 7))
    assert load_clip_text(tmp_path).config == module.config


@pytest.mark.parametrize("name", VISION)
def test_a_saved_vision_encoder_has_the_same_bits_and_transformers_reads_it(
    visions, tmp_path, name
):
    model, folder, module = visions[name]
    save_clip_vision(module, tmp_path)
    assert_same_tensors(folder, tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for (key, ours), theirs in zip(
        again.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
    assert load_clip_vision(tmp_path).config == module.config


def test_both_encoders_are_read_from_a_folder_of_the_whole_clip(tmp_path):
    text = TEXT["sd2"][1]
    config = transformers.CLIPConfig(
        text_config=text, vision_config=VISION["plain"][1], projection_dim=6
    )
    model = randomised(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    ids, images = token_ids(text, 6), normal(2, 12, 12, 3)
    with torch.no_grad():
        expected = model.get_text_features(torch.tensor(ids)).pooler_output
        expected_image = model.get_image_features(nchw(images)).pooler_output
    assert_close(run(load_clip_text(tmp_path), jnp.asarray(ids)).projected, expected)
    assert_close(run(load_clip_vision(tmp_path), jnp.asarray(images)).projected, expected_image)


def test_sizes_that_do_not_fit_are_named(texts, visions):
    _, _, module = texts["sd2"]
    with pytest.raises(ValueError, match="token_ids: 10 tokens; the model has 9 positions"):
        module(jnp.zeros((1, 10), jnp.int32))
    _, _, module = visions["plain"]
    with pytest.raises(ValueError, match="images: 12 x 8; the model reads 12 x 12"):
        module(jnp.zeros((1, 12, 8, 3)))
    with pytest.raises(ValueError, match="hidden_act='tanh': unknown; one of silu"):
        CLIPTextConfig(hidden_act="tanh")
    with pytest.raises(ValueError, match="num_attention_heads=5: must divide hidden_size=512"):
        CLIPTextConfig(num_attention_heads=5)
    with pytest.raises(ValueError, match=r"eos_token_id=\[1, 2\]: must be a whole number"):
        CLIPTextConfig(eos_token_id=[1, 2])


def test_new_encoders_are_initialised_and_bfloat16_products_keep_the_parameters(texts):
    fresh = nnx.jit(lambda: CLIPText(texts["xl"][2].config, rngs=nnx.Rngs(0)))()
    ids = jnp.asarray(token_ids(TEXT["xl"][1], 7))
    assert (
        np.isfinite(run(fresh, ids).projected).all()
        and np.asarray(run(fresh, ids).projected).std() > 0.01
    )
    half = load_clip_text(texts["xl"][1], dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    difference = np.abs(
        np.asarray(run(half, ids).last, np.float32) - np.asarray(run(texts["xl"][2], ids).last)
    )
    assert 0 < difference.max() < 0.3
