"""Common parts of comparisons with torch's models: random weights that matter, one tolerance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import safetensors
import torch
from diffusers.utils import logging as diffusers_logging
from flax import nnx
from transformers.utils import logging as transformers_logging

TOLERANCE = 2e-5  # of the output's largest value
# Of Stable Diffusion 1.x's DDIM scheduler.
SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
# A text encoder of `clip_tokenizer`'s words.
TEXT = dict(
    vocab_size=56,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    eos_token_id=55,
    bos_token_id=54,
    pad_token_id=55,
)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
diffusers_logging.disable_progress_bar()


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """`model` with weights whose every tensor matters: norms away from the identity, the others
    about unit gain.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim <= 1:
                p.copy_(float("norm" in name and name.endswith("weight")) + 0.3 * noise)
            elif "embed" in name or "bias" in name or "shared" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * 1.2 / p[0].numel() ** 0.5)
    return model.eval()


@nnx.jit
def run(module, *inputs):
    """Calls a module of ours, compiled."""
    return module(*inputs)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(actual, expected) -> None:
    """Equal within TOLERANCE of the largest value, and not vacuously so."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert expected.std() > 0.05
    assert np.abs(actual - expected).max() < TOLERANCE * max(np.abs(expected).max(), 1.0)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by torch (which has every float type)."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def assert_same_tensors(folder: Path, other: Path) -> None:
    """The same names, types and bits."""
    before, after = stored(folder), stored(other)
    assert before.keys() == after.keys() and before
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        bits = torch.int16 if tensor.element_size() == 2 else torch.int32
        assert torch.equal(tensor.view(bits), after[name].view(bits)), name


def edit_config(folder: Path, **changes) -> None:
    """Changes fields of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def clip_tokenizer(folder: Path, max_length: int = 9):
    """A CLIPTokenizer of 56 words: the letters, inside and at the end of a word, "re", "red" and
    the special ones.
    """
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "re",
        "red</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=max_length,
    )


def clip_model(folder: Path, image_size: int = 20, seed: int = 0, **preprocessing):
    """A tiny CLIPModel with random weights and its CLIPProcessor, written to `folder` as
    transformers does.
    """
    import transformers

    vision = dict(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=5,
    )
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=12)
    model = randomised(transformers.CLIPModel(config), seed)
    side = {"height": image_size, "width": image_size}
    options = {"size": {"shortest_edge": image_size}, "crop_size": side} | preprocessing
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(**options), clip_tokenizer(folder)
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def plain_pipeline(**parts):
    """A StableDiffusionPipeline of networks, tokenizer and scheduler alone."""
    import diffusers

    return diffusers.StableDiffusionPipeline(
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


SMALLEST = dict(
    block_out_channels=(8,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    mid_block_type=None,
)


def stable_diffusion(
    folder: Path,
    in_channels: int = 4,
    unet_changes: Mapping = MappingProxyType({}),
    **scheduler,
):
    """A tiny StableDiffusionPipeline with random weights; `folder` is for the tokenizer's files.
    `unet_changes`: of the UNet's config (`SMALLEST`: half of the compilation).
    """
    import diffusers
    import transformers

    unet = diffusers.UNet2DConditionModel(
        **dict(
            sample_size=8,
            in_channels=in_channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
        )
        | dict(unet_changes)
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = transformers.CLIPTextConfig(**TEXT)
    return plain_pipeline(
        unet=randomised(unet),
        vae=randomised(vae),
        text_encoder=randomised(transformers.CLIPTextModel(text)),
        tokenizer=clip_tokenizer(folder),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER | scheduler),
    )


def stable_diffusion_xl(folder: Path, unet_changes: Mapping = MappingProxyType({})):
    """A tiny StableDiffusionXLPipeline: `stable_diffusion` with two encoders of different widths
    and activations.
    """
    import diffusers
    import transformers

    plain = stable_diffusion(folder, unet_changes=unet_changes)
    text = dict(plain.text_encoder.config.to_dict(), hidden_act="quick_gelu", num_hidden_layers=3)
    text_2 = text | dict(
        hidden_size=20, num_attention_heads=2, projection_dim=12, hidden_act="gelu"
    )
    same = {key: value for key, value in plain.unet.config.items() if not key.startswith("_")}
    unet = diffusers.UNet2DConditionModel(
        **same
        | dict(
            cross_attention_dim=36,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
            transformer_layers_per_block=[1, 2][: len(same["block_out_channels"])],
            use_linear_projection=True,
        )
    )
    tokenizer_2 = clip_tokenizer(folder)
    tokenizer_2.pad_token = "a</w>"  # the two pad with different tokens
    encoders = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    first, second = (
        randomised(kind(transformers.CLIPTextConfig(**config)), seed)
        for seed, (kind, config) in enumerate(zip(encoders, (text, text_2), strict=True))
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=randomised(unet),
        vae=plain.vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=plain.tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=plain.scheduler,
        add_watermarker=False,
    )


def t5_encoder(folder: Path, width: int = 16):
    """A tiny T5EncoderModel with random weights and its tokenizer, both in `folder` as transformers
    writes them.
    """
    import transformers

    config = transformers.T5Config(
        vocab_size=32,
        d_model=width,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    model = randomised(transformers.T5EncoderModel(config))
    model.save_pretrained(folder)
    words = [
        "\u2581a",
        "\u2581red",
        "\u2581blue",
        "\u2581circle",
        "\u2581square",
        *"abcdefghijklmnopqrst",
    ]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((word, -1.0 - len(word) * 0.01) for word in words),
    ]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
