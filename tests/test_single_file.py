"""Single-file checkpoints in the original code's names against the diffusers pipelines that they
were written from.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs
from original_checkpoints import KINDS, TEXT, networks, original
from torch_models import SCHEDULER, clip_tokenizer, nchw, normal, plain_pipeline

from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.models.vae import VAEConfig
from contextdiff_jax.pretrained import conversion, load_unet
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.pretrained.folder_files import FolderTensors, read_json
from contextdiff_jax.pretrained.kinds import Options
from contextdiff_jax.pretrained.pipeline import load_pipeline
from contextdiff_jax.pretrained.scheduler import load_scheduler

CONFIG = dict.fromkeys(("sample", "latent", "text", "data"), {}) | {
    "diffusion": {"zero_terminal_snr": False}
}


@dataclasses.dataclass(frozen=True)
class Made:
    """A single file, the networks in it, and a diffusers folder of the same."""

    file: object
    parts: dict
    folder: object


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each kind, each in a folder with its tokenizers."""
    found = {}
    for kind in KINDS:
        root = tmp_path_factory.mktemp(kind)
        parts = networks(kind)
        file = root / "model.safetensors"
        safetensors.torch.save_file(original(kind, parts), file)
        tokenizer = clip_tokenizer(root / "words")
        tokenizer.save_pretrained(root / "tokenizer")
        tokenizer.save_pretrained(root / "tokenizer_2")
        found[kind] = Made(file, parts, root)
    return found


def numbers(tensors) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("text_model."): np.asarray(tensor) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_the_name_and_the_form_that_diffusers_gives_it(made, kind):
    file, parts = made[kind].file, made[kind].parts
    whole = safetensors.torch.load_file(file)
    config = {name: module.config for name, module in parts.items()}
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(whole, config["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(whole, config["vae"]),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(whole),
    }
    if kind == "v2":
        converted["text_encoder"] = theirs.convert_open_clip_checkpoint(
            parts["text_encoder"], whole
        )
    if kind == "xl":
        prefix = "conditioner.embedders.1.model."
        model = parts["text_encoder_2"]
        converted["text_encoder_2"] = theirs.convert_open_clip_checkpoint(model, whole, prefix)
    for part, module in parts.items():
        ours, expected = numbers(FolderTensors(file / part, "")), numbers(module.state_dict())
        if part != "text_encoder_2":  # theirs takes the projection's width for the encoder's
            assert numbers(converted[part]).keys() == expected.keys(), part
        assert ours.keys() == expected.keys(), part
        for name, tensor in expected.items():
            np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_are_those_of_the_networks(made, kind):
    file, parts = made[kind].file, made[kind].parts
    for part, cls in (("unet", UNetConfig), ("vae", VAEConfig)):
        values = read_json(file / part / "config.json", "")
        found = cls.from_dict(values)
        expected = cls.from_dict(parts[part].config)
        if part == "unet":
            assert found.levels() == expected.levels()
            found, expected = (
                dataclasses.replace(
                    one, attention_head_dim=1, num_attention_heads=None, cross_attention_dim=1
                )
                for one in (found, expected)
            )
        assert found == expected
    for part in parts.keys() - {"unet", "vae"}:
        values, theirs_ = read_json(file / part / "config.json", ""), parts[part].config.to_dict()
        same = ("hidden_act", "eos_token_id", "bos_token_id", "pad_token_id", "projection_dim")
        for name in (*TEXT, *(name for name in same if name in values)):
            assert values[name] == theirs_[name], (part, name)
    scheduler = load_scheduler(file / "scheduler")
    assert scheduler.prediction == ("v" if kind == "v2" else "epsilon")
    assert (scheduler.beta_start, scheduler.beta_end) == (0.00085, 0.012)
    assert (scheduler.steps_offset, scheduler.set_alpha_to_one) == (1, False)


def test_a_files_pictures_are_those_of_the_pipeline(made):
    file, parts, root = (getattr(made["v1"], name) for name in ("file", "parts", "folder"))
    pipe = plain_pipeline(
        **parts,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(root / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
    )
    pipe.set_progress_bar_config(disable=True)
    prompts, latents = ["a red circle", "b"], normal(2, 8, 8, 4)
    with torch.no_grad():
        expected = pipe(
            prompts,
            latents=nchw(latents),
            height=16,
            width=16,
            output_type="np",
            num_inference_steps=4,
        ).images
    images = load_pipeline(file).text_to_image(prompts, noise=latents, size=(16, 16), steps=4)
    assert expected.std() > 0.05
    assert (np.abs(images - np.round(255 * expected)) <= 1).mean() > 0.999


def test_a_file_is_converted_and_fine_tuned_as_a_folder_is(made, tmp_path):
    file, root = made["v1"].file, made["v1"].folder
    conversion.copy_folder(file, tmp_path / "again")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    for name, tensor in made["v1"].parts["unet"].state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], tensor), name
    lines = []
    conversion.to_native(file / "text_encoder", tmp_path / "ours", Options(), lines.append)
    assert lines[0].startswith("clip_text, ")
    adopted = adopt(CONFIG | {"model": {"pretrained": str(file)}})
    assert adopted["latent"]["vae"] == f"{file}/vae"
    assert adopted["text"]["pretrained"] == f"{file}/text_encoder"
    assert adopted["data"]["tokenizer"] == str(root / "tokenizer")
    assert adopted["model"]["block_out_channels"] == [32, 64]


def test_a_file_in_its_pipelines_folder_takes_the_configs_there(made, tmp_path):
    shutil.copy(made["v1"].file, tmp_path / "model.safetensors")
    made["v1"].parts["unet"].save_pretrained(tmp_path / "unet")
    values = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(values | {"attention_head_dim": 4}))
    file = tmp_path / "model.safetensors"
    assert load_unet(file / "unet").config.levels()[0].num_heads == 8
    (tmp_path / "model_index.json").write_text("{}")
    assert load_unet(file / "unet").config.levels()[0].num_heads == 4


def test_what_a_file_says_of_its_prediction_counts(made, tmp_path):
    tensors = safetensors.torch.load_file(made["xl"].file)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors | {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, path)
    scheduler = load_scheduler(path / "scheduler")
    assert (scheduler.prediction, scheduler.rescale_betas_zero_snr) == ("v", True)
    assert scheduler.timestep_spacing == "trailing"
    tensors = safetensors.torch.load_file(made["v2"].file)
    for said in ("epsilon", "v"):
        safetensors.torch.save_file(tensors, path, metadata={"modelspec.prediction_type": said})
        assert load_scheduler(path / "scheduler").prediction == said


def test_files_that_are_no_such_checkpoint_are_refused_in_one_line(made, tmp_path):
    whole = safetensors.torch.load_file(made["v1"].file)
    path = tmp_path / "model.safetensors"

    start = {"model": {"pretrained": str(path)}}

    def refused(tensors, *parts, load=lambda: load_pipeline(path)):
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(ValueError) as error:
            load()
        for part in ("model.safetensors", *parts):
            assert part in str(error.value) and "\n" not in str(error.value)

    one = torch.ones(1)
    refused({"lora_unet_conv_in.lora_up.weight": one}, "is a LoRA file")
    refused(
        {"double_blocks.0.img_attn.norm.key_norm.scale": one},
        "lacks model.diffusion_model.input_blocks.0.0",
    )
    refused(whole | {"edm_mean": one}, "Playground")
    refused(whole | {"conditioner.embedders.0.model.ln_final.weight": one}, "is XL's refiner")
    strange = {"model.diffusion_model.label_emb.weight": one}
    unet = path / "unet"
    refused(whole | strange, "label_emb.weight: unknown", load=lambda: load_unet(unet))
    for prefix, part in (("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")):
        less = {name: tensor for name, tensor in whole.items() if not name.startswith(prefix)}
        refused(less, f"holds no {part}", load=lambda: read_json(path / part / "config.json", ""))  # noqa: B023
    lacking = {n: t for n, t in whole.items() if "input_blocks.1.0.in_layers.2" not in n}
    refused(lacking, "its unet lacks", load=lambda: load_unet(unet))
    words = "put the folder tokenizer"
    refused(
        whole,
        f"{tmp_path / 'tokenizer'}: no such folder",
        words,
        load=lambda: adopt(CONFIG | start),
    )
    for name in ("model.ckpt", "model.gguf"):
        (tmp_path / name).write_bytes(b"pickle")
        with pytest.raises(ValueError, match=f"{name}: refused.*only .safetensors are read"):
            load_pipeline(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: refused"):
            conversion.to_native(tmp_path / name, tmp_path / "target", Options())
    with pytest.raises(ValueError, match="model.safetensors/unet"):
        load_unet(path)
