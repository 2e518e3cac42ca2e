"""Hugging Face / diffusers folders (config.json, safetensors) <-> NNX modules: one name map a model."""

from contextdiff_jax.pretrained.unet import load_unet, save_unet

__all__ = ["load_unet", "save_unet"]
