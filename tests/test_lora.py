"""LoRA: merged weights against torch layers applied beside the frozen ones, and written files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from lora_models import ALPHA, hooked, kohya, random_lora, save_models
from torch_models import assert_close, nchw, nhwc, normal, run

from contextdiff_jax.pretrained import load_clip_text, load_unet
from contextdiff_jax.pretrained.lora import LoraLayer, load_lora, merge_lora, save_lora


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the UNet and the text encoder, and their torch models."""
    return save_models(tmp_path_factory.mktemp("models"))


def test_a_merged_unet_equals_torch_with_the_lora_layers_beside_its_own(models, tmp_path):
    folder, unet, _ = models
    pairs = random_lora(unet)
    safetensors.numpy.save_file(kohya(pairs, "lora_unet_"), tmp_path / "lora.safetensors")
    ours = load_unet(folder / "unet")
    lora = load_lora(tmp_path / "lora.safetensors", {"unet": ours})
    assert lora["unet"].keys() == pairs.keys()
    before = nnx.state(ours)
    x, t, tokens = normal(2, 8, 8, 4), np.array([3, 500]), normal(2, 5, 12)
    merge_lora(ours, lora["unet"], 0.7)
    hooks = hooked(unet, pairs, 0.7 * ALPHA / 2)
    with torch.no_grad():
        expected = nhwc(unet(nchw(x), torch.tensor(t), torch.tensor(tokens)).sample)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        plain = nhwc(unet(nchw(x), torch.tensor(t), torch.tensor(tokens)).sample)
    assert np.abs(plain - expected).max() > 0.1
    assert_close(run(ours, jnp.asarray(x), jnp.asarray(t), jnp.asarray(tokens)), expected)
    merge_lora(ours, lora["unet"], -0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), nnx.state(ours), before)


def test_a_merged_text_encoder_equals_torch_with_the_lora_layers_beside_its_own(models, tmp_path):
    folder, _, text = models
    pairs = random_lora(text)
    safetensors.numpy.save_file(kohya(pairs, "lora_te_text_model_"), tmp_path / "lora.safetensors")
    ours = load_clip_text(folder / "text")
    lora = load_lora(tmp_path / "lora.safetensors", {"text_encoder": ours})
    merge_lora(ours, lora["text_encoder"])
    ids = np.random.default_rng(0).integers(1, 30, (2, 6))
    hooks = hooked(text, pairs, ALPHA / 2)
    with torch.no_grad():
        expected = text(torch.tensor(ids)).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert_close(run(ours, jnp.asarray(ids)).last, expected)


def test_the_files_for_xl_have_the_names_that_diffusers_and_kohya_read(tmp_path):
    layer = LoraLayer(np.ones((2, 4), np.float32), np.ones((4, 2), np.float32), 2.0)
    lora = {
        "unet": {"add_embedding.linear_1": layer},
        "text_encoder": {"encoder.layers.0.mlp.fc1": layer},
        "text_encoder_2": {"text_projection": layer},
    }
    for style, names in {
        "diffusers": [
            "unet.add_embedding.linear_1.lora_A.weight",
            "text_encoder_2.text_projection.lora_A.weight",
        ],
        "kohya": [
            "lora_unet_label_emb_0_0.lora_up.weight",
            "lora_te2_text_projection.lora_up.weight",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        ],
    }.items():
        save_lora(lora, tmp_path / style, style)
        assert set(names) <= safetensors.numpy.load_file(tmp_path / style).keys()


def test_both_styles_are_written_and_read_back_as_the_same_change(models, tmp_path):
    folder, unet, text = models
    modules = {"unet": load_unet(folder / "unet"), "text_encoder": load_clip_text(folder / "text")}
    lora = {
        "unet": {name: LoraLayer(*pair, ALPHA) for name, pair in random_lora(unet).items()},
        "text_encoder": {name: LoraLayer(*pair, ALPHA) for name, pair in random_lora(text).items()},
    }
    for style in ("kohya", "diffusers"):
        path = tmp_path / f"{style}.safetensors"
        save_lora(lora, path, style)
        again = load_lora(path, modules)
        assert {c: layers.keys() for c, layers in again.items()} == {
            c: layers.keys() for c, layers in lora.items()
        }
        for component, layers in lora.items():
            for name, layer in layers.items():
                np.testing.assert_allclose(
                    again[component][name].delta(), layer.delta(), rtol=1e-5, atol=1e-5
                )
        assert load_lora(path, {"unet": modules["unet"]}).keys() == {"unet"}
    names = safetensors.numpy.load_file(tmp_path / "diffusers.safetensors")
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "unet.mid_block.attentions.0.proj_in.lora_B.weight" in names
    names = safetensors.numpy.load_file(tmp_path / "kohya.safetensors")
    assert "lora_te_text_model_encoder_layers_1_mlp_fc1.alpha" in names


def test_half_weights_are_merged_in_float32_and_keep_their_type(models, tmp_path):
    folder, unet, _ = models
    ours = load_unet(folder / "unet", param_dtype=jnp.bfloat16)
    before = np.asarray(ours.conv_out.kernel[...], np.float32)
    down, up = random_lora(unet)["conv_out"]
    layer = LoraLayer(down, up, 2.0)
    merge_lora(ours, {"conv_out": layer})
    assert ours.conv_out.kernel[...].dtype == jnp.bfloat16
    delta = layer.delta().reshape(4, 8, 3, 3).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(
        np.asarray(ours.conv_out.kernel[...]), (before + delta).astype(jnp.bfloat16)
    )
