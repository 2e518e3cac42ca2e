"""LoRA of Stable Diffusion 3 in diffusers' names, with its own loading as the reference."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders import SD3LoraLoaderMixin
from flax import nnx
from peft.utils import get_peft_model_state_dict
from torch_models import randomised
from torch_sd3 import MEDIUM

from contextdiff_jax.pretrained import load_mmdit
from contextdiff_jax.pretrained.lora import LoraLayer, load_lora, merge_lora, save_lora
from contextdiff_jax.pretrained.mmdit import MODEL
from contextdiff_jax.pretrained.names import state_to_torch

SIZES = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    pos_embed_max_size=8,
    **MEDIUM,
)
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "to_add_out"]


@pytest.fixture
def pair(tmp_path):
    """A torch transformer and ours with the same weights."""
    network = randomised(SD3Transformer2DModel(**SIZES))
    network.save_pretrained(tmp_path / "transformer")
    return network, load_mmdit(tmp_path / "transformer")


def adapted(network: torch.nn.Module) -> torch.nn.Module:
    """The network with a random PEFT adapter."""
    network.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=LAYERS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return network


def assert_same_weights(ours, theirs: torch.nn.Module) -> None:
    tensors = state_to_torch(ours, MODEL.rules(ours.config))
    for name, p in theirs.state_dict().items():
        np.testing.assert_allclose(tensors[name], p.numpy(), atol=2e-5, err_msg=name)


def test_a_file_that_diffusers_writes_is_merged_as_peft_merges_it(pair, tmp_path):
    network, ours = pair
    adapted(network)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(network),
        transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )
    layers = load_lora(tmp_path, {"transformer": ours})["transformer"]
    assert {name.split(".", 2)[2] for name in layers} >= {f"attn.{layer}" for layer in LAYERS}
    assert {layer.alpha for layer in layers.values()} == {6}
    before = nnx.state(ours, nnx.Param)["proj_out"]["kernel"].get_value()
    merge_lora(ours, layers)
    network.fuse_lora()
    network.unload_lora()
    assert_same_weights(ours, network)
    np.testing.assert_array_equal(
        nnx.state(ours, nnx.Param)["proj_out"]["kernel"].get_value(), before
    )


def test_a_file_that_we_write_is_what_diffusers_loads(pair, tmp_path):
    network, ours = pair
    rng = np.random.default_rng(0)
    layers = {}
    for name, _ in network.named_parameters():
        if any(name.endswith(f"{layer}.weight") for layer in LAYERS):
            down, up = (rng.standard_normal(s).astype(np.float32) for s in ((2, 16), (16, 2)))
            layers[name.removesuffix(".weight")] = LoraLayer(down, up, 1.0)
    save_lora({"transformer": layers}, tmp_path / "lora.safetensors")
    stored = safetensors.numpy.load_file(tmp_path / "lora.safetensors")
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in stored
    assert "transformer.transformer_blocks.1.attn2.to_out.0.lora_B.weight" in stored
    state = SD3LoraLoaderMixin.lora_state_dict(tmp_path / "lora.safetensors")
    SD3LoraLoaderMixin.load_lora_into_transformer(state, network)
    network.fuse_lora()
    network.unload_lora()
    merge_lora(ours, load_lora(tmp_path / "lora.safetensors", {"transformer": ours})["transformer"])
    assert_same_weights(ours, network)
    merge_lora(ours, layers, -1.0)
    assert_same_weights(ours, randomised(SD3Transformer2DModel(**SIZES)))


def test_other_writers_names_and_what_is_no_layer(pair, tmp_path):
    _, ours = pair
    path, layer = tmp_path / "lora.safetensors", "transformer_blocks.1.attn.add_v_proj"
    down, up = np.ones((1, 16), np.float32), np.ones((16, 1), np.float32)
    flat = "lora_transformer_" + layer.replace(".", "_")
    for first, second in [
        (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"),
        (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"),
        (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"),
    ]:
        safetensors.numpy.save_file({first: down, second: up}, path)
        assert load_lora(path, {"transformer": ours})["transformer"].keys() == {layer}
    safetensors.numpy.save_file(
        {
            f"transformer.{layer[:-1]}.lora_A.weight": down,
            f"transformer.{layer[:-1]}.lora_B.weight": up,
        },
        path,
    )
    with pytest.raises(ValueError, match="add_v_pro: unknown layer"):
        load_lora(path, {"transformer": ours})
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"  # the original code's, q, k and v in one
    safetensors.numpy.save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path
    )
    with pytest.raises(ValueError, match="holds no layers for transformer; it has unet"):
        load_lora(path, {"transformer": ours})
