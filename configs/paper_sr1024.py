"""Imagen's second upsampler, 256x256 to 1024x1024 pixels, trained on pieces of 256x256.

Never run here: it is the shapes and the mesh of such a run, compiled for TPUs (docs/cascade.md).

    python -m contextdiff_jax.train --config=configs/paper_sr1024.py --config.data.path=FOLDER
    --config.text.pretrained=openai/clip-vit-large-patch14
    --config.data.tokenizer=openai/clip-vit-large-patch14 --workdir=runs/sr1024

    python -m contextdiff_jax.benchmark --mode=aot --config=configs/paper_sr1024.py
    --topology=v5p:4x4x4
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import paper_sr256


def get_config() -> ConfigDict:
    """paper_sr256 without self-attention (appendix F.3), so that larger pictures than those of
    training can be made, whole or in tiles. NVIDIA's reproduction has a fifth level.
    """
    config = paper_sr256.get_config()
    config.data.update(image_size=1024, crop="random", crop_size=256)
    config.model.attention = ("none", "none", "none", "text")
    config.sample.update(steps=32)
    return config
