"""The efficient UNet against torch's functions, what it reads, and its config's errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_MMDIT
from flax import nnx

from contextdiff_jax.benchmarks.torch_peer import layouts, make_network
from contextdiff_jax.models.backbones import BACKBONES, build_backbone
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.efficient_unet_config import EfficientUNetConfig
from contextdiff_jax.models.low_resolution import LowResolution
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.pretrained.conversion import backbone_model

TINY = dict(
    block_out_channels=(8, 16),
    layers_per_block=(1, 2),
    attention=("none", "none"),
    num_attention_heads=2,
    cross_attention_dim=16,
    norm_num_groups=4,
)
UNET = dict(
    in_channels=3,
    out_channels=3,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    mid_block_type=None,
    cross_attention_dim=16,
    norm_num_groups=4,
    layers_per_block=1,
)


def network(config):
    """One of random weights, none at 0."""
    module = nnx.eval_shape(lambda: build_backbone(config, rngs=Undrawn()))
    rng = np.random.default_rng(3)

    def drawn(leaf):
        fan = max(np.prod(leaf.shape[:-1]), 4)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan))

    nnx.update(module, jax.tree.map(drawn, nnx.state(module, nnx.Param)))
    return module


def given(height=16, width=16, low=False, batch=2):
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731 short
    picture = normal(batch, height, width, 3)
    level = jnp.asarray([0.2, 0.7])[:batch]
    captions = Captions(
        normal(batch, 5, 16),
        jnp.ones((batch, 5), bool),
        low=LowResolution(picture, level) if low else None,
    )
    x = normal(batch, height, width, 3)
    x = jnp.concatenate([x, picture], axis=-1) if low else x
    return x, jnp.asarray([3.0, 700.0])[:batch], captions


@nnx.jit
def run(module, x, t, captions):
    return module.predict(x, t, captions, None, x.shape[1:3])


class InTorch:
    """The network without attention, by torch's functions from its parameters' paths."""

    def __init__(self, module):
        state = nnx.to_flat_state(nnx.state(module, nnx.Param))
        self.values = {path: torch.tensor(np.asarray(leaf[...])) for path, leaf in state}
        self.groups, self.config = module.config.norm_num_groups, module.config

    def conv(self, h, *path, stride=1):
        kernel = self.values[*path, "kernel"].permute(3, 2, 0, 1)
        return F.conv2d(h, kernel, self.values[*path, "bias"], stride=stride, padding=1)

    def norm(self, h, *path):
        weights = self.values[*path, "scale"], self.values[*path, "bias"]
        return F.group_norm(h, self.groups, *weights, eps=1e-5)

    def linear(self, h, *path):
        return h @ self.values[*path, "kernel"] + self.values[*path, "bias"]

    def embed(self, t, name):
        half = self.config.block_out_channels[0] // 2
        angles = t[:, None] * torch.exp(-np.log(10000.0) * torch.arange(half) / half)
        h = torch.cat([angles.cos(), angles.sin()], -1)
        return self.linear(F.silu(self.linear(h, name, "linear_1")), name, "linear_2")

    def resnet(self, x, temb, *path):
        h = self.conv(F.silu(self.norm(x, *path, "norm1")), *path, "conv1")
        time = self.linear(F.silu(temb), *path, "time_emb_proj")[:, :, None, None]
        scale, shift = time.chunk(2, dim=1)
        h = self.norm(h, *path, "norm2") * (1 + scale) + shift
        h = self.conv(F.silu(h), *path, "conv2")
        if (*path, "conv_shortcut", "kernel") in self.values:
            x = self.linear(x.movedim(1, -1), *path, "conv_shortcut").movedim(-1, 1)
        return (x + h) / 2**0.5

    def block(self, x, temb, *path):
        for i in range(
            len([p for p in self.values if p[:2] == path and p[4:] == ("conv1", "bias")])
        ):
            x = self.resnet(x, temb, *path, "resnets", i)
        return x

    def __call__(self, x, t, level):
        x, t, level = (torch.tensor(np.asarray(a)) for a in (x, t, level))
        temb = self.embed(t, "time_embedding") + self.embed(1000 * level, "level_embedding")
        first = self.conv(x.movedim(-1, 1), "conv_in")
        fine = self.block(first, temb, "down_blocks", 0)
        h = self.conv(fine, "downsamplers", 0, "conv", stride=2)
        h = self.block(self.block(h, temb, "down_blocks", 1), temb, "up_blocks", 0)
        h = F.interpolate(h, scale_factor=2)[:, :, : x.shape[1], : x.shape[2]]
        h = torch.cat([self.conv(h, "upsamplers", 0, "conv"), fine], 1)
        h = self.block(h, temb, "up_blocks", 1)
        return self.conv(F.silu(self.norm(h, "conv_norm_out")), "conv_out").movedim(1, -1)


def test_it_is_imagens_network_by_torchs_functions_on_odd_sides_too():
    module = network(EfficientUNetConfig(**TINY, low_resolution=True))
    x, t, captions = given(15, 10, low=True)
    found = run(module, x, t, captions)
    wanted = InTorch(module)(x, t, captions.low.level).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block))) for block in module.down_blocks
    ]
    assert counts[1] > 4 * counts[0]  # the parameters lie where the picture is small


def test_a_new_one_gives_zero_and_its_context_head_too():
    config = EfficientUNetConfig(**TINY | {"attention": ("none", "all")}, context_head=True)
    module = jax.jit(lambda: nnx.split(build_backbone(config, rngs=nnx.Rngs(0))))
    out, context = run(nnx.merge(*module()), *given())
    assert out.shape == context.shape == (2, 16, 16, 3)
    assert not out.any() and not context.any()


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_backbone_reads_the_low_resolution_picture_its_level_and_the_text(kind):
    fields = {"unet": UNET, "mmdit": TINY_MMDIT, "efficient_unet": TINY}[kind]
    if kind == "efficient_unet":
        fields = fields | {"attention": ("none", "text"), "pooled_projection_dim": 16}
    if kind == "unet":
        fields = fields | {"down_block_types": ("CrossAttnDownBlock2D",), "attention_head_dim": 2}
    config = BACKBONES[kind].config.from_dict({**fields, "low_resolution": True})
    assert "low_resolution" in config.to_dict()
    module, (x, t, captions) = network(config), given(low=True)
    out = run(module, x, t, captions)
    assert out.shape == (2, 16, 16, 3)

    def change(x=x, **changed):
        return float(jnp.abs(run(module, x, t, captions._replace(**changed)) - out).max())

    other = captions.low._replace(level=jnp.asarray([0.3, 0.1]))
    assert change(low=other) > 1e-4
    assert change(tokens=jnp.flip(captions.tokens, 0)) > 1e-4
    assert change(x=x.at[..., 3:].multiply(-1)) > 1e-3


def test_without_attention_to_its_own_pixels_a_piece_is_made_as_in_the_whole():
    config = EfficientUNetConfig(**TINY | {"attention": ("none", "text")}, patch_size=2)
    module, (x, t, captions) = network(config), given(96, 8, batch=1)
    whole = run(module, x, t, captions)
    # What differs is the group norms' statistics: of a picture that repeats, there are none.
    tiled = jnp.concatenate([x[:, :48]] * 2, axis=1)
    twice = run(module, tiled, t, captions)
    piece = run(module, tiled[:, :48], t, captions)
    middle = slice(20, 28)  # beyond the reach of the borders, 20 pixels
    assert float(jnp.abs(whole[:, middle] - piece[:, middle]).max()) > 1e-3
    np.testing.assert_allclose(twice[:, middle], piece[:, middle], atol=2e-2)


def test_diffusers_has_no_such_network():
    config = EfficientUNetConfig(**TINY)
    for call in (make_network, layouts):
        with pytest.raises(ValueError, match="model: diffusers has no efficient_unet"):
            call(config)
    with pytest.raises(ValueError, match="model.kind='efficient_unet': unknown for folders"):
        backbone_model(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"attention": ("none", "self")},
            "model.attention='self': unknown; one of none, text, all",
        ),
        ({"layers_per_block": (1, 2, 3)}, "must have 2 values, one a level"),
        ({"layers_per_block": 0}, "all its sizes must be at least 1"),
        ({"norm_num_groups": 3}, r"model.norm_num_groups=3: must divide .*block_out_channels\[0\]"),
        ({"num_attention_heads": 3}, "model.num_attention_heads=3: must divide"),
        ({"act_fn": "sine"}, "model.act_fn='sine': unknown"),
        ({"patch_size": 0}, "model.patch_size=0: must be at least 1"),
        ({"widths": 3}, "model.widths=3: unknown field"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        EfficientUNetConfig.from_dict(TINY | changes)
