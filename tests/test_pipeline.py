"""Pictures from a Stable Diffusion folder against diffusers' pipelines, from the same noise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ON_EIGHT, ROOT, command
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.numpy import load_file, save_file
from same_pictures import (
    PROMPTS,
    assert_same_pictures,
    check,
    holes,
    pictures,
    saved,
    share_noise,
    theirs_from,
)
from torch_models import normal, stable_diffusion

from contextdiff_jax.diffusion.samplers import SAMPLERS, ddim_sample
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained import conversion
from contextdiff_jax.pretrained.kinds import Options
from contextdiff_jax.pretrained.pipeline import _corrected, load_pipeline
from contextdiff_jax.pretrained.scheduler import load_scheduler
from contextdiff_jax.runtime.pictures import read_png_metadata


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' pipeline and its folder."""
    return saved(stable_diffusion, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def same_noise(monkeypatch):
    return share_noise(monkeypatch)


def test_fifty_steps_with_guidance_give_the_pictures_of_diffusers(pair):
    check(*pair, scheduler={})


def test_a_negative_prompt_and_another_size_give_the_pictures_of_diffusers(pair):
    check(*pair, size=(12, 8), steps=5, negative="blue")


def test_without_guidance_the_pictures_are_those_of_diffusers(pair):
    check(*pair, steps=5, guidance=1.0)


def test_reuse_is_the_loop_with_the_deep_features_of_every_second_step(pair):
    """Four steps by two with guidance, against a loop of DDIM's equation with torch's schedule."""
    pipeline = load_pipeline(pair[1])
    noise, unet, vae = normal(2, 8, 8, 4), pipeline.model.unet, pipeline.model.vae
    images = pipeline.text_to_image(
        PROMPTS[:2], noise=noise, size=(16, 16), steps=4, guidance=3.0, reuse=2
    )
    ids = (pipeline.token_ids(texts)[0] for texts in (["", ""], PROMPTS[:2]))
    nothing, tokens = texts = [pipeline.model.text(each).last for each in ids]
    alphas_cumprod, x = np.asarray(pipeline.scheduler.schedule().alphas_cumprod), noise
    for i, (t, s) in enumerate(zip(*pipeline.scheduler.steps(4), strict=True)):
        if i % 2 == 0:
            deep = [unet.deep_features(x, t, Captions(e, None), None, (16, 16)) for e in texts]
        without, with_text = (
            unet(x, t, text, deep=kept) for text, kept in zip((nothing, tokens), deep, strict=True)
        )
        noise_hat = without + 3 * (with_text - without)
        x0 = (x - np.sqrt(1 - alphas_cumprod[t]) * noise_hat) / np.sqrt(alphas_cumprod[t])
        after = alphas_cumprod[s] if s >= 0 else 1.0
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * noise_hat
    expected = np.clip(0.5 * vae.decode(vae.from_diffusion(x)) + 0.5, 0, 1)
    assert np.abs(images - np.round(255 * expected)).max() <= 1
    with pytest.raises(ValueError, match="reuse=3: must be a positive divisor of steps=4"):
        pipeline.text_to_image(PROMPTS[:2], noise=noise, size=(16, 16), steps=4, reuse=3)


def test_a_sampler_of_the_documented_signature_works_for_a_folder(pair, monkeypatch):
    """Its last step ends at clean data, where the folder's own may end at index 0."""

    def sample(denoise, x_T, schedule, timesteps, eta=0.0, key=None, shift="quadratic"):
        return ddim_sample(denoise, x_T, schedule, timesteps, eta, key, shift)

    monkeypatch.setitem(SAMPLERS, "mine", sample)
    options = {"noise": normal(2, 8, 8, 4), "size": (16, 16), "steps": 2, "guidance": 1.0}
    pipeline = load_pipeline(pair[1])
    mine, ddim = (
        pipeline.text_to_image(PROMPTS, sampler=name, set_alpha_to_one=True, **options)
        for name in ("mine", "ddim")
    )
    np.testing.assert_array_equal(mine, ddim)
    without = pipeline.text_to_image(PROMPTS, sampler="mine", set_alpha_to_one=False, **options)
    np.testing.assert_array_equal(mine, without)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_spacing_gives_the_pictures_of_diffusers(pair, prediction_type):
    pipe, folder = pair
    pictures = []
    for spacing, more in (
        ("leading", {}),
        ("trailing", dict(set_alpha_to_one=True)),
        ("linspace", {}),
    ):
        scheduler = dict(timestep_spacing=spacing, prediction_type=prediction_type, **more)
        pictures.append(check(pipe, folder, scheduler=scheduler, steps=20))
    # Or one spacing would do for all.
    assert min(np.abs(pictures[i] - pictures[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.02


def json_changed(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_old_scheduler_is_put_right_as_diffusers_does(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "sd")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=True
    ).save_pretrained(folder / "scheduler")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    check(pipe, folder, steps=10)
    kept = "StableDiffusionInpaintPipeline", "StableDiffusionXLPipeline"  # by diffusers, too
    for name in kept:
        with pytest.raises(ValueError, match="clip_sample=True: not supported"):
            load_scheduler(folder / "scheduler", name)
    json_changed(folder / "scheduler" / "scheduler_config.json", clip_sample=False)
    offsets = [load_scheduler(folder / "scheduler", name).steps_offset for name in kept]
    assert offsets == [1, 0]


def test_a_unet_from_before_diffusers_0_9_has_latents_of_64(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "sd")
    json_changed(folder / "unet" / "config.json", _diffusers_version="0.8.1", sample_size=32)
    assert load_pipeline(folder).latent_shape() == (64, 64, 4)
    for version, side in (("0.6.0", 64), ("0.9.0.dev0", 8), ("0.10.2", 8), ("1.0", 8), (None, 8)):
        json_changed(folder / "unet" / "config.json", _diffusers_version=version, sample_size=8)
        found = _corrected(UNetConfig(sample_size=8), folder / "unet")
        assert found.sample_size == side, version
        if version is not None:
            theirs = StableDiffusionPipeline.from_pretrained(folder, vae=None, text_encoder=None)
            assert theirs.unet.config.sample_size == side, version
    json_changed(folder / "unet" / "config.json", _diffusers_version="0.6.0")
    assert _corrected(UNetConfig(sample_size=96), folder / "unet").sample_size == 96


def test_a_text_encoder_that_reads_its_mask_gives_the_pictures_of_diffusers(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "sd")
    json_changed(folder / "text_encoder" / "config.json", use_attention_mask=True)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    masked = check(pipe, folder, steps=5)
    pipe.text_encoder.config.use_attention_mask = False
    json_changed(folder / "text_encoder" / "config.json", use_attention_mask=False)
    assert np.abs(check(pipe, folder, steps=5) - masked).max() > 0.02


def test_image_to_image_gives_the_pictures_of_diffusers(pair, same_noise):
    pipe, folder = pair
    expected = theirs_from(pipe, StableDiffusionImg2ImgPipeline, strength=0.65, guidance_scale=5.0)
    options = dict(steps=10, guidance=5.0, noise=same_noise)
    images = load_pipeline(folder).image_to_image(PROMPTS, pictures(), strength=0.65, **options)
    assert_same_pictures(images, expected)


@pytest.mark.parametrize("in_channels, strength", [(4, 1.0), (4, 0.6), (9, 1.0)])
def test_inpainting_gives_the_pictures_of_diffusers(
    pair, same_noise, tmp_path, in_channels, strength
):
    pipe, folder = pair
    if in_channels == 9:  # a network that reads the mask and the rest of the picture
        pipe, folder = stable_diffusion(tmp_path / "words", in_channels), tmp_path / "sd"
        pipe.save_pretrained(folder)
    masks, mask_image = holes()
    expected = theirs_from(
        pipe,
        StableDiffusionInpaintPipeline,
        strength=strength,
        height=16,
        width=24,
        mask_image=mask_image,
    )
    ours = load_pipeline(folder)
    images = ours.inpaint(PROMPTS, pictures(), masks, strength=strength, steps=10, noise=same_noise)
    assert_same_pictures(images, expected)
    if in_channels == 9:
        with pytest.raises(
            ValueError, match="the model reads a picture with a hole: it is only for inpainting"
        ):
            ours.text_to_image(PROMPTS)


def test_a_converted_pipeline_is_the_same(pair, tmp_path):
    _, folder = pair
    conversion.to_native(folder, tmp_path / "ours", Options(), lambda line: None)
    theirs, ours = load_pipeline(folder), load_pipeline(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, ours.opened.weights, theirs.opened.weights)
    assert ours.scheduler == theirs.scheduler
    np.testing.assert_array_equal(ours.token_ids(PROMPTS), theirs.token_ids(PROMPTS))
    assert len(ours.token_ids(PROMPTS)) == 1


def test_what_does_not_fit_is_named(pair, tmp_path):
    _, folder = pair
    pipeline = load_pipeline(folder)
    with pytest.raises(
        ValueError, match=r"size=\(16, 15\): height and width must be multiples of 2"
    ):
        pipeline.text_to_image(PROMPTS, size=(16, 15))
    with pytest.raises(
        ValueError, match="negative: 1 texts; must be one, or as many as prompts, 2"
    ):
        pipeline.text_to_image(PROMPTS, negative=["a"])
    with pytest.raises(ValueError, match="prompts='red': the list is empty or no list"):
        pipeline.text_to_image("red")
    with pytest.raises(ValueError, match=r"noise: shape \(2, 8, 7, 4\); must be \(2, 8, 8, 4\)"):
        pipeline.text_to_image(PROMPTS, noise=normal(2, 8, 7, 4))
    with pytest.raises(ValueError, match="images: 1; one for each of the 2 pictures"):
        pipeline.image_to_image(PROMPTS, pictures()[:1])
    with pytest.raises(ValueError, match="strength=0.05: must lie in .* at least one of 10 steps"):
        pipeline.image_to_image(PROMPTS, pictures(), strength=0.05, steps=10)
    with pytest.raises(
        ValueError, match=r"masks: shape \(2, 16, 16\); must be the images', \(2, 16, 24\)"
    ):
        pipeline.inpaint(PROMPTS, pictures(), np.zeros((2, 16, 16)))
    assert pipeline.latent_shape() == (8, 8, 4)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="_class_name='FluxPipeline': another pipeline"):
        load_pipeline(tmp_path)


def test_the_product_never_imports_torch(pair):
    code = (
        "import sys; from contextdiff_jax.pretrained import conversion, lora, pipeline\n"
        "assert not {'torch', 'transformers', 'diffusers'} & sys.modules.keys()\n"
        "pipeline.load_pipeline(sys.argv[1]).token_ids(['a red circle'])\n"
        "from contextdiff_jax.training import loop\n"
        "assert not {'torch', 'diffusers'} & sys.modules.keys()\n"
        "import torch\n"  # nothing is left in its way
    )
    subprocess.run(
        [sys.executable, "-c", code, pair[1]],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )


def test_the_sample_command_makes_pictures_from_a_folder_a_picture_and_a_mask(pair, tmp_path):
    _, folder = pair
    Image.fromarray(pictures()[0]).save(tmp_path / "image.png")
    mask = np.zeros((16, 24), np.uint8)
    mask[4:12, 8:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")

    def sample(*flags):
        run = command(
            "sample",
            f"--model={folder}",
            "--prompt=a red circle",
            "--steps=3",
            f"--out={tmp_path}/grid.png",
            f"--images={tmp_path}/images",
            *flags,
        )
        assert run.returncode == 0, run.stderr
        return np.asarray(Image.open(tmp_path / "images" / "0000.png")).astype(int)

    # All of guidance's branches, in some of the steps.
    guidance = "--negative=blue", "--perpendicular=0.5", "--guidance_interval=0.2,0.95"
    assert sample("--size=16,24", *guidance).shape == (16, 24, 3)
    metadata = read_png_metadata(tmp_path / "images" / "0000.png")
    assert (metadata["negative"], metadata["perpendicular"]) == ("blue", "0.5")
    assert metadata["guidance_interval"] == "(0.2, 0.95)"
    assert (
        metadata["prompt"] == "a red circle"
        and metadata["steps"] == "3"
        and metadata["guidance"] == "7.5"
    )
    expected = load_pipeline(folder).image_to_image(
        ["a red circle"], pictures()[:1], strength=0.7, steps=3
    )
    again = sample(f"--image={tmp_path}/image.png", "--strength=0.7")
    assert np.abs(again - expected[0]).max() <= 1
    expected = load_pipeline(folder).inpaint(
        ["a red circle"], pictures()[:1], mask[None] / 255, steps=3
    )
    assert (
        np.abs(
            sample(f"--image={tmp_path}/image.png", f"--mask={tmp_path}/mask.png") - expected[0]
        ).max()
        <= 1
    )


@pytest.mark.slow  # a quarter of a minute: pytest -m slow tests/test_pipeline.py
def test_a_second_process_on_a_folder_neither_traces_nor_compiles(pair, tmp_path):
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # programs this small are kept, too
    }

    def sample(out, *flags):
        flags = (f"--model={pair[1]}", "--prompt=a red circle", f"--out={tmp_path / out}", *flags)
        run = command("sample", "--steps=2", *flags, env=environment)
        assert run.returncode == 0, run.stderr
        files = list((tmp_path / "cache").rglob("*"))
        traced = {f.name: f.stat().st_mtime_ns for f in files if f.suffix == ".stablehlo"}
        return traced, {f.name for f in files if f.name.endswith("-cache")}

    traced, compiled = sample("first.png")
    assert len(traced) == 1 and any(name.startswith("jit_call") for name in compiled)
    assert sample("second.png") == (traced, compiled)
    assert (tmp_path / "second.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    traced_too, compiled_too = sample("another.png", "--size=16,24")
    assert len(traced_too) == 2 and compiled < compiled_too  # another program is seen


def test_a_folder_in_float16_is_held_in_the_type_of_its_products(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "sd")
    for file in folder.rglob("*.safetensors"):
        halves = {name: tensor.astype(np.float16) for name, tensor in load_file(file).items()}
        save_file(halves, file, {"format": "pt"})
    options = dict(noise=normal(2, 8, 8, 4), size=(16, 16), steps=3)

    def types(pipeline):
        return {str(leaf.dtype) for leaf in jax.tree.leaves(pipeline.opened.weights)}

    wide, half = load_pipeline(folder), load_pipeline(folder, param_dtype=jnp.float16)
    assert types(wide) == {"float32"} and "float16" in types(half)
    pictures = wide.text_to_image(PROMPTS, **options).astype(int)
    assert np.abs(pictures - half.text_to_image(PROMPTS, **options)).max() <= 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--model=nowhere", "--mask=m.png"), "--mask=m.png: needs --image"),
        (("--model=nowhere", "--size=12"), "--size=12: must be HEIGHT,WIDTH"),
        (("--model=nowhere", "--workdir=there"), "can't be given with --workdir"),
        (("--model=nowhere",), "nowhere: holds neither a trained run (config.json) nor a Stable"),
        ((), "--workdir: missing; name a run's folder, or --model=FOLDER"),
        (("--model=nowhere", "--image=gone.png"), "--image=gone.png: can't be read as a picture"),
        (("--workdir=there", "--strength=0.5"), "--strength=0.5: needs --image"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "".join(value[-1:]),
)
def test_flags_that_do_not_fit_a_folder_are_refused_in_one_line(flags, message):
    run = command("sample", "--prompt=a", *flags)
    assert run.returncode == 2 and message in run.stderr, run.stderr
    assert "Traceback" not in run.stderr


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from contextdiff_jax.pretrained.pipeline import load_pipeline
assert len(jax.devices()) == 8
pipeline, prompts = load_pipeline(sys.argv[1]), ["a cat", "a dog", "a cat"]
np.save(sys.argv[2], pipeline.text_to_image(prompts, size=(16, 16), steps=3, guidance=2.0))
"""


def test_a_batch_that_eight_devices_do_not_divide_gives_the_pictures_of_one(pair, tmp_path):
    folder = pair[1]
    environment = os.environ | {
        **ON_EIGHT,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, folder, tmp_path / "many.npy"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    options = dict(size=(16, 16), steps=3, guidance=2.0)
    alone = load_pipeline(folder).text_to_image(["a cat", "a dog", "a cat"], **options)
    many = np.load(tmp_path / "many.npy")
    assert many.shape == alone.shape and np.abs(many.astype(int) - alone).max() <= 1
    assert np.abs(many[0].astype(int) - many[2]).max() > 20  # each prompt has noise of its own
