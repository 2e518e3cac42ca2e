"""Inference: from prompts to pictures, for trained runs and Stable Diffusion folders alike."""

from contextdiff_jax.inference.pipeline import Pipeline

__all__ = ["Pipeline"]
