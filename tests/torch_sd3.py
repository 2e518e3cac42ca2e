"""Tiny Stable Diffusion 3 pipelines with random weights, as diffusers builds them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch_models import TEXT, clip_tokenizer, randomised, t5_encoder

PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TRANSFORMER = dict(
    sample_size=8,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=40,
    caption_projection_dim=16,
    pooled_projection_dim=36,
    pos_embed_max_size=12,
)
# 3.5 medium's options, in two layers of three.
MEDIUM = dict(num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm")


def stable_diffusion_3(
    folder: Path,
    absent: Collection[str] = (),
    transformer: Mapping = MappingProxyType({}),
    **scheduler,
):
    """A tiny StableDiffusion3Pipeline without the text encoders that are `absent`; `folder` is for
    the tokenizers' files.
    """
    import diffusers
    import transformers

    text = TEXT | dict(hidden_act="quick_gelu", num_hidden_layers=3, projection_dim=16)
    text_2 = text | dict(hidden_size=20, hidden_act="gelu", projection_dim=20)
    clips = [
        randomised(
            transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)), seed
        )
        for seed, config in enumerate((text, text_2))
    ]
    t5, words = t5_encoder(folder / "t5", 40)
    tokenizer_2 = clip_tokenizer(folder)
    tokenizer_2.pad_token = "a</w>"  # the two pad with different tokens
    encoders = dict(zip(PARTS, (*clips, t5), strict=True))
    tokenizers = dict(zip(PARTS, (clip_tokenizer(folder), tokenizer_2, words), strict=True))
    parts = {name: None if name in absent else encoder for name, encoder in encoders.items()}
    parts |= {
        name.replace("text_encoder", "tokenizer"): None if name in absent else each
        for name, each in tokenizers.items()
    }
    network = diffusers.SD3Transformer2DModel(**TRANSFORMER | dict(transformer))
    randomised(network)
    with torch.no_grad():
        # Random layers that change a token by more than it is, and sharp attention without a norm
        # of queries and keys, are chaotic: torch's own pictures in float32 and float64 are others.
        normed = network.config.qk_norm is not None
        for name, p in network.named_parameters():
            if ".norm1" in name:
                p *= 0.4 if normed else 0.2
            if not normed and re.search(r"(to_q|add_q_proj)\.", name):
                p *= 0.2
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        vae=randomised(vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | scheduler),
        **parts,
    )
