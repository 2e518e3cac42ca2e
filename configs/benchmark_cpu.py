"""UNets to compare with torch's on a CPU: `24m` (the default), `wide` and `64px`. For timing, not
to be trained to an end.

Figures: docs/performance.md.

    python -m contextdiff_jax.benchmark --mode=train --compare=torch
    --config=configs/benchmark_cpu.py python -m contextdiff_jax.benchmark --mode=sample
    --compare=torch --config=configs/benchmark_cpu.py:wide
"""

from ml_collections import ConfigDict

from configs import base

# (channels a level, pixels a side, batch). Attention is on the two lower levels: at 64 pixels over
# 1,024 tokens, not 256.
SIZES = {
    "24m": ((64, 128, 256), 32, 16),
    "wide": ((96, 192, 384), 32, 8),
    "64px": ((64, 128, 256), 64, 4),
}


def get_config(name: str = "24m") -> ConfigDict:
    """base with two resnets a level, 8 heads, and the size `name`."""
    config = base.get_config()
    channels, pixels, batch = SIZES[name]
    config.train.update(batch_size=batch, learning_rate=1e-4, weight_decay=0.01)
    config.data.update(image_size=pixels, max_length=16)
    config.model.update(
        block_out_channels=channels, layers_per_block=2, attention_head_dim=8, norm_num_groups=32
    )
    config.sample.steps = 4
    return config
