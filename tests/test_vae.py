"""The autoencoder against diffusers' torch model with random weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from flax import nnx
from torch_models import assert_close, assert_same_tensors, nchw, nhwc, normal, randomised

from contextdiff_jax.models.layers import GroupNorm
from contextdiff_jax.models.vae import LatentGaussian, VAEConfig
from contextdiff_jax.pretrained import load_vae, save_vae

CASES = {
    # name: (size of the pictures, config)
    "sd": (
        (16, 24),
        dict(
            block_out_channels=(8, 16),
            layers_per_block=2,
            norm_num_groups=4,
            sample_size=16,
        ),
    ),
    "no_quant": (
        (17, 14),
        dict(
            block_out_channels=(6, 12, 6),
            layers_per_block=1,
            norm_num_groups=3,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            sample_size=12,
        ),
    ),
    "gelu": (
        (8, 6),
        dict(
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=8,
            act_fn="gelu",
            in_channels=4,
            out_channels=2,
            latent_channels=3,
            mid_block_add_attention=False,
            sample_size=5,
        ),
    ),
}


def torch_vae(config: dict) -> AutoencoderKL:
    levels = len(config["block_out_channels"])
    types = dict(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    return randomised(AutoencoderKL(**types, **config))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (torch model, its folder, our module)."""
    built = {}
    for name, (_, config) in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        model = torch_vae(config)
        model.save_pretrained(folder)
        built[name] = model, folder, load_vae(folder)
    return built


@functools.partial(nnx.jit, static_argnames=("tile", "slices"))
def encode(vae, images, tile=False, slices=False):
    return vae.encode(images, tile=tile, slices=slices)


@functools.partial(nnx.jit, static_argnames=("tile", "slices"))
def decode(vae, z, tile=False, slices=False):
    return vae.decode(z, tile=tile, slices=slices)


def torch_encode(model, images) -> LatentGaussian:
    with torch.no_grad():
        latents = model.encode(nchw(images)).latent_dist
    return LatentGaussian(nhwc(latents.mean), nhwc(latents.logvar))


def torch_decode(model, z) -> np.ndarray:
    with torch.no_grad():
        return nhwc(model.decode(nchw(z)).sample)


@pytest.mark.parametrize("name", CASES)
def test_mean_and_variance_of_the_latents_equal_diffusers(pairs, name):
    model, _, vae = pairs[name]
    size, config = CASES[name]
    images = normal(2, *size, config.get("in_channels", 3))
    expected, latents = torch_encode(model, images), encode(vae, jnp.asarray(images))
    assert_close(latents.mean, expected.mean)
    assert_close(latents.logvar, expected.logvar)
    assert latents.mean.shape[1:3] == tuple(side // vae.config.downscale for side in size)


@pytest.mark.parametrize("name", CASES)
def test_decoded_pictures_equal_diffusers(pairs, name):
    model, _, vae = pairs[name]
    z = normal(2, 3, 5, vae.config.latent_channels)
    assert_close(decode(vae, jnp.asarray(z)), torch_decode(model, z))


@pytest.mark.parametrize("name, size", [("sd", (36, 17)), ("gelu", (7, 11))])
def test_tiles_equal_those_of_diffusers(pairs, name, size):
    model, _, vae = pairs[name]
    images = normal(1, *size, vae.config.in_channels)
    model.enable_tiling()
    try:
        expected = torch_encode(model, images)
        pictures = torch_decode(model, expected.mean)
    finally:
        model.disable_tiling()
    assert_close(encode(vae, jnp.asarray(images), tile=True).mean, expected.mean)
    assert_close(decode(vae, jnp.asarray(expected.mean), tile=True), pictures)
    # Or the comparison would also hold for a decoder that doesn't tile. (Sides that a quarter of
    # the tile's doesn't divide give diffusers, and so us, pictures of another size.)
    whole = torch_decode(model, expected.mean)
    assert whole.shape != pictures.shape or np.abs(whole - pictures).max() > 1e-3


def test_slices_change_nothing_and_a_picture_of_one_tile_is_not_tiled(pairs):
    _, _, vae = pairs["sd"]
    images = jnp.asarray(normal(3, 16, 16, 3))
    whole = encode(vae, images)
    np.testing.assert_allclose(encode(vae, images, slices=True).mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(encode(vae, images, tile=True).mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(
        decode(vae, whole.mean, slices=True), decode(vae, whole.mean), atol=1e-4
    )
    large = jnp.asarray(normal(2, 8, 6, 4))
    tiled = decode(vae, large, tile=True)
    np.testing.assert_allclose(decode(vae, large, tile=True, slices=True), tiled, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_autoencoder_has_the_same_bits_and_diffusers_reads_it(pairs, tmp_path, name):
    _, folder, vae = pairs[name]
    save_vae(vae, tmp_path)
    assert_same_tensors(folder, tmp_path)
    z = normal(1, 3, 5, vae.config.latent_channels)
    assert_close(
        decode(vae, jnp.asarray(z)), torch_decode(AutoencoderKL.from_pretrained(tmp_path).eval(), z)
    )
    assert load_vae(tmp_path).config == vae.config


def test_the_attention_names_of_old_files_are_read(pairs, tmp_path):
    _, folder, vae = pairs["sd"]
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, old in names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    safetensors.torch.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    old = nnx.state(load_vae(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, old, nnx.state(vae))


@pytest.mark.parametrize("name", CASES)
def test_every_norm_has_the_epsilon_and_the_groups_of_diffusers(pairs, name):
    model, _, vae = pairs[name]
    theirs = sorted(
        (m.eps, m.num_groups, m.num_channels)
        for m in model.modules()
        if isinstance(m, torch.nn.GroupNorm)
    )
    ours = [
        (m.eps, m.num_groups, m.scale.shape[0])
        for _, m in nnx.iter_modules(vae)
        if isinstance(m, GroupNorm)
    ]
    assert sorted(ours) == theirs


def test_samples_have_the_latents_mean_and_variance_and_factors_invert(pairs):
    latents = LatentGaussian(
        jnp.full((4000, 1, 1, 1), 2.0), jnp.full((4000, 1, 1, 1), 2 * np.log(0.5))
    )
    samples = latents.sample(jax.random.key(0))
    assert abs(samples.mean() - 2) < 0.03 and abs(samples.std() - 0.5) < 0.02
    _, _, vae = pairs["no_quant"]
    z = normal(2, 3, 3, 16)
    np.testing.assert_allclose(vae.to_diffusion(z), (z - 0.1159) * 0.3611, rtol=1e-6)
    np.testing.assert_allclose(vae.from_diffusion(vae.to_diffusion(z)), z, atol=1e-6)
    _, _, plain = pairs["sd"]
    np.testing.assert_allclose(plain.to_diffusion(z), z * 0.18215, rtol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(act_fn="tanh"), "vae.act_fn='tanh': unknown; one of silu"),
        (
            dict(down_block_types=["AttnDownEncoderBlock2D"]),
            "vae.down_block_types=.*must be 'DownEncoderBlock2D'",
        ),
        (
            dict(up_block_types=["UpDecoderBlock2D"] * 2),
            "vae.up_block_types=.*each of the 1 levels",
        ),
        (dict(norm_num_groups=48), "vae.norm_num_groups=48: must divide"),
        (dict(latents_mean=[0.1]), r"vae.latents_mean=\[0.1\]: not supported; only None"),
        (
            dict(block_out_chanels=[8]),
            "vae.block_out_chanels=.*unknown field; nearest: block_out_channels",
        ),
    ],
)
def test_a_config_that_is_not_supported_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict(change)
