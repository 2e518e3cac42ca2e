"""Runs in the latents of a tiny Stable Diffusion folder: their configs, starts and batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from conftest import config_dict

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.parallel.mesh import make_mesh, state_shardings
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.settings import parse
from contextdiff_jax.training import loop
from contextdiff_jax.training.first_state import first_state
from contextdiff_jax.training.loop import train
from contextdiff_jax.training.state import init_state

PROMPTS = ["a red circle", "the blue square is left of a rather long description"]
SMALL = {
    "train.batch_size": 4,
    "train.steps": 2,
    "train.checkpoint_every": 2,
    "train.learning_rate": 1e-2,
    "train.warmup_steps": 0,
    "train.decay": "constant",
    "context.patch_size": 2,
    "sample.guidance": 7.5,
    "sample.prompts": "('a red circle',)",
}


def config_of(folder, **changes):
    return adopt(config_dict(**{"model.pretrained": str(folder)} | SMALL | changes))


def run_of(folder, workdir, **changes):
    """Two steps of a fine-tune: its config; without the pictures at its end, whose program takes
    longer than all else.
    """
    config = config_of(folder, **changes)
    reporter, loop.Reporter = loop.Reporter, lambda *_: lambda *_: None
    try:
        train(parse(config), config, workdir)
    finally:
        loop.Reporter = reporter
    return config


def start_of(config):
    """The parameters that a run begins with."""
    settings = parse(config)
    abstract = jax.eval_shape(lambda: init_state(settings))
    return first_state(settings, state_shardings(make_mesh(settings.mesh), abstract)).params


def batch_of(settings, seed=0):
    rng = np.random.default_rng(seed)
    ids, mask = load_tokenizer(settings.data.tokenizer).encode(PROMPTS, settings.data.max_length)
    images = rng.integers(
        0, 256, (2, settings.data.image_size, settings.data.image_size, 3)
    ).astype(np.uint8)
    return {
        "image": jnp.asarray(images),
        "token_ids": jnp.asarray(ids),
        "token_mask": jnp.asarray(mask),
    }
