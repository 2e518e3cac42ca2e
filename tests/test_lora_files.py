"""LoRA files: every writer's names, the settings that count, and what is refused by name."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from lora_models import TEXT, kohya, random_lora, save_models
from torch_models import randomised

from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained import load_clip_text, load_unet
from contextdiff_jax.pretrained.ldm import ldm_name
from contextdiff_jax.pretrained.lora import load_lora, save_lora


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the UNet and the text encoder, and their torch models."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def ours(models):
    """Our network of the UNet's folder, for what only reads it."""
    return load_unet(models[0] / "unet")


def test_every_writers_names_mean_the_same_layer(models, ours, tmp_path):
    _, unet, _ = models
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    old = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    down, up = random_lora(unet)[layer]
    flat = "lora_unet_" + layer.replace(".", "_")
    for first, second in [
        (f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"),
        (f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"),
        (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"),
        (
            f"base_model.model.{layer}.lora_A.my-style_2.weight",
            f"base_model.model.{layer}.lora_B.my-style_2.weight",
        ),
        (
            f"unet.base_model.model.{layer}.lora_A.weight",
            f"unet.base_model.model.{layer}.lora_B.weight",
        ),
        (f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight"),
        (f"{old}_lora.down.weight", f"{old}_lora.up.weight"),
        (
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.lora_A.weight",
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.lora_B.weight",
        ),
        (
            f"{flat.replace('lora_unet_', 'lycoris_')}.lora_down.weight",
            f"{flat.replace('lora_unet_', 'lycoris_')}.lora_up.weight",
        ),
        (f"unet.{old}_lora.down.weight", f"unet.{old}_lora.up.weight"),
        (f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"),
        (
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
        ),
    ]:
        safetensors.numpy.save_file({first: down, second: up}, tmp_path / "lora.safetensors")
        layers = load_lora(tmp_path / "lora.safetensors", {"unet": ours})["unet"]
        assert layers.keys() == {layer}, first
        np.testing.assert_array_equal(layers[layer].down, down)
        np.testing.assert_array_equal(layers[layer].up, up)
        assert layers[layer].alpha == 2  # no alpha: the rank, a scale of 1


def test_every_writers_names_of_a_text_encoder_mean_the_same_layer(models, tmp_path):
    folder, _, text = models
    modules = {"text_encoder": load_clip_text(folder / "text")}
    for layer, names in {
        "encoder.layers.0.self_attn.q_proj": [
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.{}.weight",
            "text_encoder.encoder.layers.0.self_attn.q_proj.lora.{}.weight",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight",
            "text_model.encoder.layers.0.self_attn.to_q_lora.{}.weight",
            "base_model.model.encoder.layers.0.self_attn.q_proj.lora_{}.weight",
        ],
        "encoder.layers.1.self_attn.out_proj": [
            "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.{}.weight",
        ],
        "encoder.layers.1.mlp.fc2": [
            "text_encoder.text_model.encoder.layers.1.mlp.fc2.lora_linear_layer.{}.weight",
        ],
    }.items():
        down, up = random_lora(text)[layer]
        for name in names:
            tensors = {name.format("down"): down, name.format("up"): up}
            safetensors.numpy.save_file(tensors, tmp_path / "lora.safetensors")
            layers = load_lora(tmp_path / "lora.safetensors", modules)["text_encoder"]
            assert layers.keys() == {layer}, name
            np.testing.assert_array_equal(layers[layer].up, up)


def adapter(model: torch.nn.Module, folder, **config) -> peft.PeftModel:
    """A random PEFT adapter, written to `folder` as PEFT does; the weights of `model` stay."""
    made = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    made.save_pretrained(folder)
    return made


def changes(made: peft.PeftModel) -> dict[str, np.ndarray]:
    """layer -> the change of its weight, as PEFT merges it."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for name, module in made.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(
    "config",
    [
        dict(lora_alpha=8),
        dict(lora_alpha=2, use_rslora=True),
        dict(lora_alpha=3, r=3, alpha_pattern={"to_q": 6, r".*attentions\.0.*to_v": 5}),
        dict(
            lora_alpha=4,
            rank_pattern={"attn2.to_v": 3},
            alpha_pattern={"attn2.to_v": 1},
            use_rslora=True,
        ),
        dict(lora_alpha=1, init_lora_weights="gaussian", fan_in_fan_out=True, lora_dropout=0.1),
        dict(lora_alpha=5, target_modules=["conv1", "proj_in", "time_emb_proj"]),
    ],
)
def test_a_peft_adapter_has_the_strength_that_its_settings_say(models, ours, tmp_path, config):
    _, unet, _ = models
    made = adapter(unet, tmp_path, **dict(r=2, target_modules=["to_q", "to_v"]) | config)
    expected = changes(made)
    made.unload()
    # The folder, and the file in it.
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        layers = load_lora(path, {"unet": ours})["unet"]
        assert layers.keys() == expected.keys()
        for name, change in expected.items():
            delta = layers[name].delta().reshape(change.shape)
            np.testing.assert_allclose(delta, change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, part",
    [
        (dict(use_dora=True), "use_dora=True: not supported; only plain LoRA is read"),
        (dict(peft_type="LOHA"), "peft_type='LOHA': not supported; only LORA"),
        (dict(bias="lora_only"), "bias='lora_only': not supported; only none"),
        (dict(lora_bias=True), "lora_bias=True"),
        (dict(modules_to_save=["conv_out"]), "modules_to_save=['conv_out']"),
        (
            dict(init_lora_weights="pissa"),
            "init_lora_weights='pissa': not supported; only True, False, gaussian",
        ),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(a_setting_of_the_future=1), "a_setting_of_the_future=1"),
        (dict(lora_alpha="16"), "lora_alpha='16': must be a positive number"),
        (dict(lora_alpha=None), "lora_alpha=None: must be a positive number"),
        (
            dict(alpha_pattern={"conv_in": -1}),
            "alpha_pattern['conv_in']=-1: must be a positive number",
        ),
        (dict(alpha_pattern={"conv_(": 1}), "alpha_pattern: 'conv_('"),
        (dict(alpha_pattern=[1]), "alpha_pattern=[1]: not supported; must map"),
        (dict(r=4), "r=4 for conv_in, whose weights have rank 2"),
    ],
)
def test_settings_that_would_make_it_another_change_are_refused_by_name(
    models, ours, tmp_path, settings, part
):
    _, unet, _ = models
    down, up = random_lora(unet)["conv_in"]
    path = tmp_path / "adapter_model.safetensors"
    names = (f"base_model.model.conv_in.lora_{letter}.weight" for letter in "AB")
    safetensors.numpy.save_file(dict(zip(names, (down, up), strict=True)), path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | settings))
    with pytest.raises(ValueError) as error:
        load_lora(path, {"unet": ours})
    assert "\n" not in str(error.value)
    assert str(config) in str(error.value) and part in str(error.value)
    config.unlink()
    with pytest.raises(
        ValueError, match="adapter_config.json: no such file; expected the settings"
    ):
        load_lora(tmp_path, {"unet": ours})


def test_a_text_encoders_adapter_alone_is_not_the_unets(models, ours, tmp_path):
    folder, _, text = models
    made = adapter(text, tmp_path, r=2, lora_alpha=7, target_modules=["q_proj", "fc1"])
    expected = changes(made)
    made.unload()
    wide = transformers.CLIPTextConfig(**TEXT | dict(hidden_size=18))
    randomised(transformers.CLIPTextModel(wide)).save_pretrained(tmp_path / "wide")
    own, other = load_clip_text(folder / "text"), load_clip_text(tmp_path / "wide")
    for modules, found in (
        ({"text_encoder": own}, "text_encoder"),
        ({"unet": ours, "text_encoder": own}, "text_encoder"),
        ({"text_encoder": other, "text_encoder_2": own}, "text_encoder_2"),
    ):
        lora = load_lora(tmp_path, modules)
        assert lora.keys() == {found}
        for name, change in expected.items():
            name = name.removeprefix("text_model.")
            np.testing.assert_allclose(lora[found][name].delta(), change, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="holds no layers for unet; it has a text encoder"):
        load_lora(tmp_path, {"unet": ours})
    with pytest.raises(ValueError, match="fits text_encoder and text_encoder_2; give `modules`"):
        load_lora(tmp_path, {"text_encoder": own, "text_encoder_2": own})


def test_alphas_of_every_type_and_locons_middle_kernels_are_read(ours, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "lora.safetensors"
    down, up = rng.standard_normal((3, 8, 1, 1)), rng.standard_normal((8, 3, 1, 1))
    mid = rng.standard_normal((3, 3, 3, 3))
    delta = np.einsum("op,prhw,ri->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    stem = "lora_unet_down_blocks_0_resnets_0_conv2"
    tensors = {
        f"{stem}.lora_down.weight": down.astype(ml_dtypes.bfloat16),
        f"{stem}.lora_up.weight": up.astype(np.float16),
        f"{stem}.lora_mid.weight": mid.astype(np.float32),
    }
    for alpha in (
        np.float32(2),
        np.array([2], np.float16),
        np.array(2, np.int64),
        np.array(2, ml_dtypes.bfloat16),
    ):
        safetensors.numpy.save_file(tensors | {f"{stem}.alpha": np.asarray(alpha)}, path)
        (layer,) = load_lora(path, {"unet": ours})["unet"].values()
        assert layer.alpha == 2
        np.testing.assert_allclose(
            layer.delta().reshape(8, 8, 3, 3), 2 / 3 * delta, atol=0.02 * np.abs(delta).max()
        )
    safetensors.numpy.save_file(tensors | {f"{stem}.alpha": np.ones(3, np.float32)}, path)
    with pytest.raises(ValueError, match=r"conv2: alpha \(3,\); must be one number"):
        load_lora(path, {"unet": ours})


def test_the_original_codes_names_of_a_full_size_xl_unet():
    # https://github.com/Stability-AI/generative-models numbers its blocks so; levels of 0, 2 and 10
    # transformer layers.
    config = UNetConfig(
        block_out_channels=(320, 640, 1280),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    for ours, original in {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2": (
            "input_blocks.4.1.transformer_blocks.1.ff.net.2"
        ),
        "down_blocks.2.resnets.1.conv2": "input_blocks.8.0.out_layers.3",
        "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
        "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.attentions.0.proj_in": "output_blocks.3.1.proj_in",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "context_head.conv": None,
    }.items():
        assert ldm_name(ours, config) == original


def test_settings_in_the_metadata_count_and_what_is_not_read_is_refused(models, ours, tmp_path):
    _, unet, _ = models
    modules = {"unet": ours}
    down, up = random_lora(unet)["conv_in"]
    tensors = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
    path = tmp_path / "lora.safetensors"
    for values, alpha in (
        ({"unet.lora_alpha": 8, "unet.r": 2, "unet.use_dora": False}, 8),
        (
            {
                "unet.lora_alpha": 8,
                "unet.alpha_pattern": {"conv_in": 3},
                "text_encoder.lora_alpha": 1,
            },
            3,
        ),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 * math.sqrt(2)),
        ({"lora_alpha": 8, "r": 2}, 2),  # of layers without a component
        ({}, 2),
    ):
        safetensors.numpy.save_file(
            tensors, path, metadata={"lora_adapter_metadata": json.dumps(values)}
        )
        assert load_lora(path, modules)["unet"]["conv_in"].alpha == pytest.approx(alpha)
    for values, part in (
        ('{"unet.use_dora": true}', "metadata: use_dora=True: not supported"),
        ("[1]", "lora_adapter_metadata: not a JSON object"),
        ("[" * 100_000, "lora_adapter_metadata: not a JSON object"),
    ):
        safetensors.numpy.save_file(tensors, path, metadata={"lora_adapter_metadata": values})
        with pytest.raises(ValueError, match=part):
            load_lora(path, modules)


def test_layers_that_do_not_fit_are_all_named_in_one_line(models, ours, tmp_path):
    _, unet, _ = models
    modules = {"unet": ours}
    good = kohya({"conv_in": random_lora(unet)["conv_in"]}, "lora_unet_")
    path = tmp_path / "lora.safetensors"

    def refused(tensors, *parts):
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(ValueError) as error:
            load_lora(path, modules)
        assert "\n" not in str(error.value)
        for part in (str(path), *parts):
            assert part in str(error.value)

    wrong = {
        f"lora_unet_conv_out.lora_{part}.weight": np.ones((2, 3), np.float32)
        for part in ("down", "up")
    }
    half = {"lora_unet_time_embedding_linear_1.lora_down.weight": np.ones((2, 8), np.float32)}
    unknown = {"lora_unet_conv_middle.lora_up.weight": np.ones((2, 8), np.float32)}
    refused(
        good | wrong | half | unknown,
        "3 layers do not fit",
        "unet conv_out: up (2, 3), down (2, 3); the layer's",
        "unet time_embedding_linear_1: lacks up or down",
        "unet conv_middle: unknown layer",
    )
    refused(
        good | {"lora_unet_conv_in.hada_w1_a": np.ones((2, 2), np.float32)},
        "1 tensors are unknown",
        "hada_w1_a",
    )
    dora = {"lora_unet_conv_in.dora_scale": np.ones((2, 2), np.float32)}
    refused(good | dora, "not LoHa, LoKr or DoRA", "dora_scale")
    refused({k.replace("_unet_", "_te_"): v for k, v in good.items()}, "holds no layers for unet")
    nan = dict(good)
    nan["lora_unet_conv_in.lora_up.weight"] = np.full_like(
        nan["lora_unet_conv_in.lora_up.weight"], np.nan
    )
    refused(nan, "lora_unet_conv_in.lora_up.weight: holds NaN or infinity")
    twice = {
        k.replace("_unet_conv_in", "_unet_input_blocks_0_0"): np.asarray(2 * v)
        for k, v in good.items()
    }
    refused(good | twice, "input_blocks_0_0: is there twice, with other values")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="truncated"):
        load_lora(path, modules)
    with pytest.raises(ValueError, match="nowhere.safetensors: no such file"):
        load_lora(tmp_path / "nowhere.safetensors", modules)
    with pytest.raises(ValueError, match="style='peft': unknown; one of diffusers, kohya"):
        save_lora({}, path, "peft")
