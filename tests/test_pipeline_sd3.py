"""Pictures from a Stable Diffusion 3 or 3.5 folder against diffusers'."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from conftest import one_line
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flax import nnx
from safetensors.numpy import save_file
from same_pictures import (
    PROMPTS,
    assert_same_pictures,
    compare,
    holes,
    pictures,
    saved,
    theirs_from,
)
from torch_models import assert_same_tensors, nhwc, t5_encoder
from torch_sd3 import MEDIUM, PARTS, stable_diffusion_3

from contextdiff_jax import Pipeline
from contextdiff_jax.pretrained.conversion import from_native, to_native
from contextdiff_jax.pretrained.kinds import Options
from contextdiff_jax.pretrained.pipeline import read_pipeline

T5_LENGTH = 12
KINDS = {
    "3": {},
    "3.5 medium": dict(transformer=MEDIUM),
    "3.5 large": dict(transformer=dict(qk_norm="rms_norm")),
    "without T5": dict(absent=PARTS[2:]),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """kind -> (diffusers' pipeline, its folder)."""
    made = {}

    def pair(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("sd3")
            made[kind] = saved(lambda words: stable_diffusion_3(words, **KINDS[kind]), folder)
        return made[kind]

    return pair


def check(pair, size=(8, 8), **options):
    """The pictures of both pipelines from the same noise are the same."""
    pipe, folder = pair
    length = {"max_sequence_length": T5_LENGTH}
    pipeline = Pipeline.open(folder, **length)
    return compare(pipe, pipeline, 16, size, steps=28, guidance=7.0, options=options, **length)


@pytest.mark.parametrize("kind", ["3.5 medium", "without T5"])
def test_pictures_of_20_steps_are_diffusers(pairs, kind):
    check(pairs(kind), steps=20, guidance=4.5, negative="blue", size=(8, 12))


@pytest.mark.slow  # pytest -m slow tests/test_pipeline_sd3.py -k 28
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_28_steps_are_diffusers(pairs, kind):
    guided = check(pairs(kind))
    again = check(pairs(kind), guidance=4.5, steps=20)
    assert np.abs(guided - again).max() > 0.02
    check(pairs(kind), guidance=1.0, steps=20)


@pytest.fixture
def same_noise(monkeypatch):
    """diffusers' noise; it draws the latents around their mean, which we take."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    return nhwc(torch.randn((2, 16, 8, 12), generator=torch.Generator().manual_seed(3)))


def theirs_of(pipe, kind, **options):
    """diffusers' pictures of 10 steps from `pictures()`."""
    options = dict(height=16, width=24, guidance_scale=5.0, max_sequence_length=T5_LENGTH) | options
    return theirs_from(pipe, kind, **options)


def test_a_part_of_a_step_counts_as_one_as_in_diffusers(pairs, same_noise):
    pipe, folder = pairs("3.5 medium")
    expected = theirs_of(pipe, StableDiffusion3Img2ImgPipeline, strength=0.65)  # 7 steps of 10
    pipeline = Pipeline.open(folder, max_sequence_length=T5_LENGTH)
    options = dict(steps=10, guidance=5.0, noise=same_noise)
    images = pipeline.image_to_image(PROMPTS, pictures(), strength=0.65, **options)
    assert_same_pictures(images, expected)


@pytest.mark.slow  # pytest -m slow tests/test_pipeline_sd3.py -k inpainting
@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting_gives_the_latents_of_diffusers(pairs, same_noise, strength, monkeypatch):
    """Its inpainting pipeline decodes without the autoencoder's `shift_factor`, which its other
    pipelines add: here it decodes with it.
    """
    pipe, folder = pairs("3.5 medium")
    masks, mask_image = holes()
    decode, config = pipe.vae.decode, pipe.vae.config
    monkeypatch.setattr(
        pipe.vae, "decode", lambda z, **more: decode(z + config.shift_factor, **more)
    )
    expected = theirs_of(
        pipe, StableDiffusion3InpaintPipeline, strength=strength, mask_image=mask_image
    )
    pipeline = Pipeline.open(folder, max_sequence_length=T5_LENGTH)
    options = dict(steps=10, guidance=5.0, noise=same_noise)
    images = pipeline.inpaint(PROMPTS, pictures(), masks, strength=strength, **options)
    assert_same_pictures(images, expected)


def test_a_folder_says_how_it_is_sampled(pairs):
    pipeline = Pipeline.open(pairs("3.5 medium")[1])
    options = pipeline.options()
    assert (options.sampler, options.steps, options.guidance) == ("euler", 28, 7.0)
    assert pipeline.latent_shape() == (8, 8, 16) and pipeline.model.encoder.longest == 9 + 256
    for size in ((18, 16), (2, 16)):
        with pytest.raises(ValueError, match="height and width must be multiples of 4"):
            pipeline.latent_shape(size)
    with pytest.raises(ValueError, match="size: 13 x 4 patches; model.pos_embed_max_size=12"):
        pipeline.text_to_image(["red"], size=(52, 16), steps=1)


def test_shards_and_our_format_hold_the_same_networks(pairs, tmp_path):
    pipe, folder = pairs("3.5 medium")
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    for name in ("transformer", "text_encoder_3"):
        shutil.rmtree(sharded / name)
        getattr(pipe, name).save_pretrained(sharded / name, max_shard_size="20KB")
        assert len(list((sharded / name).glob("*.safetensors"))) > 1
    quiet = dict(report=lambda line: None)
    to_native(sharded, tmp_path / "ours", Options(), **quiet)
    from_native(tmp_path / "ours", tmp_path / "again", Options(), **quiet)
    whole = read_pipeline(folder)
    for other in (sharded, tmp_path / "ours"):
        read = read_pipeline(other)
        for name in ("transformer", "vae", "encoder"):
            states = (nnx.state(getattr(each, name), nnx.Param) for each in (whole, read))
            jax.tree.map(np.testing.assert_array_equal, *states)
    for name in ("transformer", "vae", *PARTS):
        assert_same_tensors(folder / name, tmp_path / "again" / name)


def copied(folder, target):
    """The folder's parts as links, to be replaced."""
    target.mkdir()
    for part in folder.iterdir():
        if part.is_dir():
            (target / part.name).symlink_to(part)
        else:
            shutil.copy(part, target)
    return target


def with_config(folder, part, name, **changes):
    """Changes fields of a part's JSON, in a copy of the part."""
    source = (folder / part).resolve()
    (folder / part).unlink()
    shutil.copytree(source, folder / part)
    values = json.loads((folder / part / name).read_text())
    (folder / part / name).write_text(json.dumps(values | changes))


def with_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))


NOTHING = [None, None]
TRANSFORMER = ("transformer", "config.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f: with_config(
                f, "scheduler", "scheduler_config.json", _class_name="EulerDiscreteScheduler"
            ),
            "scheduler: _class_name='EulerDiscreteScheduler': Stable Diffusion 3 needs a flow",
        ),
        (
            lambda f: with_index(f, tokenizer_3=NOTHING),
            "tokenizer_3: null in model_index.json, though text_encoder_3 is there",
        ),
        (
            lambda f: with_index(f, **dict.fromkeys(PARTS, NOTHING)),
            "text_encoder: all three are null; at least one must be there",
        ),
        (
            lambda f: with_config(f, *TRANSFORMER, in_channels=12),
            "tensors do not fit.*pos_embed.proj.weight",
        ),
        (
            lambda f: with_config(f, *TRANSFORMER, pooled_projection_dim=40),
            "tensors do not fit.*text_embedder",
        ),
        (
            lambda f: with_config(f, *TRANSFORMER, qk_norm="layer_norm"),
            "model.qk_norm='layer_norm': unknown; one of None, rms_norm",
        ),
        (
            lambda f: with_config(f, *TRANSFORMER, new_option=3),
            "model.new_option=3",
        ),
        (
            lambda f: with_config(f, "vae", "config.json", latent_channels=4),
            "tensors do not fit",
        ),
        (lambda f: (f / "text_encoder_2").unlink(), "text_encoder_2/config.json: no such file"),
        (lambda f: (f / "transformer").unlink(), "transformer/config.json: no such file"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(pairs, tmp_path, change, message):
    folder = copied(pairs("3.5 medium")[1], tmp_path / "sd")
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        Pipeline.open(folder)
    one_line(error)


def test_encoders_of_other_widths_are_refused(pairs, tmp_path):
    folder = copied(pairs("3.5 medium")[1], tmp_path / "sd")
    (folder / "text_encoder_2").unlink()
    (folder / "text_encoder_2").symlink_to((folder / "text_encoder").resolve())
    message = "the CLIPs' states are 32 wide and their projections 32; the transformer reads 40"
    with pytest.raises(ValueError, match=message):
        Pipeline.open(folder)
    (folder / "text_encoder_3").unlink()
    t5_encoder(folder / "text_encoder_3", 16)
    with pytest.raises(ValueError, match="text_encoder_3 has states 16 wide; must be .* 40"):
        Pipeline.open(folder)


def test_lengths_of_text_that_cannot_be_are_refused(pairs):
    with pytest.raises(ValueError, match="max_sequence_length=513: must lie in 1..512"):
        Pipeline.open(pairs("3.5 medium")[1], max_sequence_length=513)


def test_a_single_file_of_stable_diffusion_3_is_refused(tmp_path):
    prefix = "model.diffusion_model."
    names = ["joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed"]
    tensors = {prefix + name: np.zeros((2, 2), np.float32) for name in names}
    file = tmp_path / "sd3_medium.safetensors"
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match="is of Stable Diffusion 3, which is read from its diffusers"
    ) as e:
        Pipeline.open(file)
    one_line(e)
