"""A multimodal transformer of Stable Diffusion 3 medium's size whose heads are as wide as a TPU's
lanes: 24 layers, 12 heads of 128, with QK-norm, 1,024 patches and 512 tokens of text.

Like sd3_medium the shapes of a run, compiled for TPUs but never run here.

    python -m contextdiff_jax.benchmark --mode=aot --topology=v5p:2x2x1 --batch_per_chip=8
    --config=configs/mmdit_128.py
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import sd3_medium


def get_config() -> ConfigDict:
    """sd3_medium with wider heads, their norm and longer captions."""
    config = sd3_medium.get_config()
    config.data.max_length = config.text.max_length = 512
    config.model.update(num_attention_heads=12, attention_head_dim=128, qk_norm="rms_norm")
    return config
