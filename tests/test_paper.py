"""The paper's configs, in small: what is compiled for them where neither weights nor chips are."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config_dict
from flax import nnx

from contextdiff_jax.benchmarks.tpu import aot, aot_table, hlo
from contextdiff_jax.configs import paper_base64, paper_sr256, paper_sr1024
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork, fitted
from contextdiff_jax.parallel.mesh import MeshConfig, make_mesh
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.settings import parse

# Widths and counts alone: what is read and where stays the config's.
SMALL = {
    "train": {"batch_size": 2, "remat": "none"},
    "text": {"width": 16},
    "context": {"width": 16, "num_blocks": 1, "num_heads": 2},
    "mesh": {"data": 1, "fsdp": 1},
    "sample": {"steps": 2},
}
EFFICIENT = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "num_attention_heads": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "pooled_projection_dim": 16,
}
BASE = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with the description of a CLIP alone, 2x2 tokens a picture."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    values = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": sizes,
        "vision_config": sizes | {"image_size": 8, "patch_size": 4},
    }
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def small(module, clip, model, **sections):
    """The config with small networks."""
    config = module.get_config().to_dict()
    for section, fields in (*SMALL.items(), *sections.items()):
        config[section] |= fields
    config["model"] |= model
    config["text"]["pretrained"] = config["data"]["tokenizer"] = clip
    if config["context"]["clip"]:
        config["context"]["clip"] = clip
    return parse(config)


def pictures_of(lowered):
    """The shapes of the arrays of bytes that a lowered program reads."""
    leaves = jax.tree.leaves(lowered.in_avals)
    return [leaf.shape for leaf in leaves if leaf.dtype == jnp.uint8]


def test_an_upsampler_is_compiled_for_pieces_in_training_and_whole_pictures_in_sampling(clip):
    pieces = {"data": {"image_size": 32, "crop_size": 16}, "context": {"patch_size": 8}}
    model = EFFICIENT | {"attention": ("none", "text")}
    settings = small(paper_sr1024, clip, model, **pieces)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    frozen = load_frozen(settings, described=True)
    assert pictures_of(aot.lower(settings, "train", mesh, frozen)) == [(2, 16, 16, 3)]
    assert pictures_of(aot.lower(settings, "sample", mesh, frozen)) == [(2, 8, 8, 3)]


def test_the_base_is_compiled_with_clips_image_tokens(clip):
    settings = small(paper_base64, clip, BASE, data={"image_size": 16}, context={"patch_size": 4})
    assert settings.context.fit_tokens and settings.context.visual_width == 16
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    frozen = load_frozen(settings, described=True)
    assert frozen.vision is not None and frozen.text is not None
    assert pictures_of(aot.lower(settings, "train", mesh, frozen)) == [(2, 16, 16, 3)]


def test_frozen_networks_are_gathered_and_no_activations_are_sent(clip):
    """Sampling by 4 chips that share all parameters."""
    shared = {"mesh": {"fsdp": 4}, "train": {"batch_size": 8, "remat": "none"}}
    settings = small(
        paper_base64, clip, BASE, data={"image_size": 16}, context={"patch_size": 4}, **shared
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), devices=aot.described_devices("v5e:2x2"))
    lowered = aot.lower(settings, "sample", mesh, load_frozen(settings, described=True))
    sent = hlo.collectives(hlo.instructions(lowered.compile().as_text()), mesh.shape)
    # Biases, and states of the one empty caption. By split kernels it was 440 kB, of which each of
    # 8 captions and pictures had its part.
    others = sum(traffic.sent_bytes for traffic in sent if traffic.kind != "all-gather")
    assert others < 50_000


def test_the_three_configs_have_imagens_sizes():
    base, first, second = (
        parse(module.get_config().to_dict()) for module in (paper_base64, paper_sr256, paper_sr1024)
    )
    for settings in (base, first, second):
        assert settings.train.steps * settings.train.batch_size == 2_500_000 * 2048
        assert settings.context.num_heads == 8
    assert base.shape == (64, 64, 3) and base.context.visual_width == 768
    assert (base.model.block_out_channels, base.model.layers_per_block) == (
        (512, 1024, 1536, 2048),
        3,
    )
    assert first.shape[0] // first.super_resolution.factor == base.shape[0]
    assert second.shape[0] // second.super_resolution.factor == first.shape[0]
    assert second.data.crop_size == 256
    for settings in (first, second):
        assert settings.model.block_out_channels == (128, 256, 512, 1024)
        assert settings.model.layers_per_block == (2, 4, 8, 8)
        assert settings.context.is_known
    assert (first.model.attention[-1], second.model.attention[-1]) == ("all", "text")


def test_a_folder_with_a_description_alone_gives_shapes_to_compile_for_and_no_weights(clip):
    settings = small(paper_sr256, clip, EFFICIENT | {"attention": ("none", "text")})
    text = load_frozen(settings, described=True).text
    leaves = jax.tree.leaves(nnx.state(text, nnx.Param))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    with pytest.raises(ValueError, match="safetensors"):
        load_frozen(settings)


def test_clips_grid_of_tokens_is_resized_to_that_of_the_patches():
    rows = np.arange(4, dtype=np.float32)
    tokens = np.broadcast_to(np.repeat(rows, 4)[None, :, None], (1, 16, 2))  # a token is its row
    found = np.asarray(fitted(jnp.asarray(tokens), (8, 2))).reshape(8, 2, 2)
    wanted = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)  # bilinear, by the centres
    np.testing.assert_allclose(
        found, np.broadcast_to(wanted[:, None, None], found.shape), atol=1e-6
    )
    np.testing.assert_array_equal(fitted(jnp.asarray(tokens), (4, 4)), tokens)


def test_r_reads_clips_resized_tokens_only_where_the_config_says_so():
    sizes = dict(width=16, num_blocks=1, num_heads=2, text_width=16, patch_size=4)
    x0, text = jnp.zeros((1, 12, 12, 3)), jnp.ones((1, 5, 16))
    visual = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 6), np.float32))

    def relate(fit_tokens):
        config = ContextConfig(
            tokens="clip", clip="x", visual_width=6, fit_tokens=fit_tokens, **sizes
        )
        network = RelationalNetwork(config, rngs=nnx.Rngs(0))
        network.gamma[...] = jnp.ones(())
        return network(x0, text, jnp.ones((1, 5), bool), jnp.zeros(1), visual)

    assert float(jnp.abs(relate(True)).max()) > 1e-3
    with pytest.raises(ValueError, match="gives 9 patches of x0; CLIP has 4 tokens; .*fit_tokens"):
        relate(False)


def test_the_days_of_a_training_follow_from_the_seconds_of_a_step():
    row = {"seconds": 0.4, "collective_seconds": 0.1}
    found = aot_table.training_days(row, 2_500_000 * 2048, 2048)
    assert found["days"] == pytest.approx(2_500_000 * 0.4 / 86400)
    assert found["days_nothing_hidden"] == pytest.approx(2_500_000 * 0.5 / 86400)
    line = aot_table._days(row | found | {"name": "train data=4"})
    assert line == (
        "train data=4: 5.12e+09 images take 11.6 days, 14.5 if nothing hid what is sent"
    )


def test_the_layers_of_an_efficient_unet_are_no_roofline():
    from contextdiff_jax.benchmarks.tpu.roofline import parts

    config = config_dict() | {"model": {"kind": "efficient_unet", **EFFICIENT}}
    config["model"] |= {"attention": ("none", "text")}
    with pytest.raises(ValueError, match="model.kind='efficient_unet': its layers aren't taken"):
        next(parts(parse(config), 2))
