"""Captioned scenes of two objects in a relation at 32x32, such as "a small red cross left of a
large green circle"; nothing to download. Takes half an hour on one core. What it reaches, and what
each of its changes is for: docs/quickstart.md.

    python -m contextdiff_jax.train --config=configs/shapes_two.py --workdir=runs/shapes_two
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import shapes


def get_config() -> ConfigDict:
    """shapes with two objects, by a model that learns which words belong to which of them."""
    config = shapes.get_config()
    config.train.update(steps=4500, sample_every=1500)
    config.data.num_objects = (2, 2)
    # A network of no knowledge reads a caption as a bag of words, and stays there: that the first
    # object lies left for "left of" and right for "right of" shows in no average. So most captions
    # begin with the left or the upper object, and the others are learned as exceptions.
    config.data.reading_order = 0.8
    config.text.directed = True
    # What lies where is decided at much noise, of which this schedule has three times as much as
    # `cosine`.
    config.diffusion.schedule = "linear"
    # Text attention at 8x8 too: two objects lie closer than the 8 pixels of 4x4.
    config.model.update(
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    )
    return config
