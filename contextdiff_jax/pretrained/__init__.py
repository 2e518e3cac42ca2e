"""Hugging Face / diffusers folders (config.json, safetensors) <-> NNX modules: one name map a
model.
"""

from contextdiff_jax.pretrained.clip import (
    load_clip_text,
    load_clip_vision,
    save_clip_text,
    save_clip_vision,
)
from contextdiff_jax.pretrained.mmdit import load_mmdit, save_mmdit
from contextdiff_jax.pretrained.t5 import load_t5, save_t5
from contextdiff_jax.pretrained.unet import load_unet, save_unet
from contextdiff_jax.pretrained.vae import load_vae, save_vae

__all__ = [
    "load_clip_text",
    "load_clip_vision",
    "load_mmdit",
    "load_t5",
    "load_unet",
    "load_vae",
    "save_clip_text",
    "save_clip_vision",
    "save_mmdit",
    "save_t5",
    "save_unet",
    "save_vae",
]
