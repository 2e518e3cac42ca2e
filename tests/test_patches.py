"""The UNet on patches of the picture (`model.patch_size`)."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_unet import TINY, inputs, run

from contextdiff_jax.benchmarks.torch_peer import make_network
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained import save_unet
from contextdiff_jax.pretrained.folder import read_config
from contextdiff_jax.pretrained.unet import MODEL


def test_a_network_on_patches_is_the_same_network_between_two_rearrangements():
    config = dict(TINY, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    inner = UNetConfig(**config | dict(in_channels=16, out_channels=16), context_head=True)
    values = inputs(config | dict(in_channels=16))
    outer = dataclasses.replace(inner, in_channels=4, out_channels=4, patch_size=2)
    networks = [nnx.eval_shape(lambda c=c: UNet(c, rngs=nnx.Rngs(0))) for c in (inner, outer)]
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)),
        nnx.state(networks[0], nnx.Param),
    )
    for network in networks:
        nnx.update(network, state)
    deep = values["x"]
    pixels = np.zeros((2, 16, 32, 4), np.float32)  # pixel (2h + p, 2w + q), channel 8p + 4q + c
    for p, q in itertools.product(range(2), range(2)):
        pixels[:, p::2, q::2] = deep[..., 8 * p + 4 * q :][..., :4]
    wanted = run(networks[0], **values)
    found = run(networks[1], **values | dict(x=pixels))
    for a, b in zip(wanted, found, strict=True):
        assert b.shape == pixels.shape
        for p, q in itertools.product(range(2), range(2)):
            part = b[:, p::2, q::2]
            np.testing.assert_array_equal(part, a[..., 8 * p + 4 * q :][..., :4])


def test_patches_that_dont_fit_and_folders_of_networks_on_patches_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model.patch_size=0: must be at least 1"):
        UNetConfig(**TINY, patch_size=0)
    config = UNetConfig(**TINY, patch_size=2)
    unet = nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0)))
    size = r"model.patch_size=2: must divide the picture's height and width, 8 x 15"
    with pytest.raises(ValueError, match=size):
        nnx.eval_shape(lambda net: net(**inputs(TINY, size=(8, 15))), unet)
    with pytest.raises(ValueError, match=r"model.patch_size=2: must be 1, as in diffusers'"):
        save_unet(unet, tmp_path / "written")
    assert not (tmp_path / "written").exists()
    values = {"_class_name": "UNet2DConditionModel", **config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"model.patch_size=2: must be 1, as in diffusers'"):
        read_config(MODEL, tmp_path)
    with pytest.raises(ValueError, match=r"model.patch_size=2: must be 1, as in diffusers'"):
        make_network(config)
    assert "patch_size" not in UNetConfig(**TINY).to_dict()
