"""Inference: from prompts to pictures, for a trained run and for a Stable Diffusion folder alike."""

from contextdiff_jax.inference.pipeline import Pipeline

__all__ = ["Pipeline"]
