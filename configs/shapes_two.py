"""Captioned scenes of two objects in a relation at 32x32, such as "a small red cross left of a
large green circle"; nothing to download. What it reaches: docs/quickstart.md.

    python -m contextdiff_jax.train --config=configs/shapes_two.py --workdir=runs/shapes_two
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import shapes


def get_config() -> ConfigDict:
    """shapes with two objects, and longer."""
    config = shapes.get_config()
    config.train.steps = 9000
    config.data.num_objects = (2, 2)
    return config
