"""The embedded default: captioned scenes of one object at 32x32, nothing to download.

Reaches: see README.md (`bash launch/quickstart.sh`). Takes 8 minutes of training on 2 CPU
cores. What was tried, and plain diffusion beside it: docs/quickstart.md.

    python -m contextdiff_jax.train --config=configs/shapes.py --workdir=runs/shapes
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import shapes_16


def get_config() -> ConfigDict:
    """shapes_16 on 2x2 patches of pictures twice as large, with the context of docs/results."""
    config = shapes_16.get_config()
    config.train.update(optimizer="muon", steps=2000, sample_every=1000)
    config.data.image_size = 32
    config.model.patch_size = 2  # the UNet's finest level is 16x16 still
    config.context.update(kind="linear", max_gain=0.4)
    # Without noise in the sampler, what its first steps began as two shapes stays one of both.
    config.sample.update(sampler="ddpm", steps=50, guidance=2.0)
    return config
