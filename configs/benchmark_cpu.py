"""Networks to compare with torch's on a CPU: UNets `24m` (the default), `wide` and `64px`, and
transformers `mmdit-2m`, `mmdit-10m` and `mmdit-40m`. For timing, not to be trained to an end.

Figures: docs/performance.md.

    python -m contextdiff_jax.benchmark --mode=train --compare=torch \\
        --config=configs/benchmark_cpu.py
    python -m contextdiff_jax.benchmark --mode=sample --compare=torch \\
        --config=configs/benchmark_cpu.py:mmdit-10m
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base

# (channels a level, pixels a side, batch). Attention is on the two lower levels: at 64 pixels over
# 1,024 tokens, not 256.
SIZES = {
    "24m": ((64, 128, 256), 32, 16),
    "wide": ((96, 192, 384), 32, 8),
    "64px": ((64, 128, 256), 64, 4),
}
# (layers, heads, features a head, pixels a side, batch, what else), on patches of 2 x 2: 64, 256
# and 1,024 tokens of a picture. As Stable Diffusion 3, 3.5 large and 3.5 medium.
TRANSFORMERS = {
    "mmdit-2m": (4, 4, 32, 16, 32, {}),
    "mmdit-10m": (4, 4, 64, 32, 16, {"qk_norm": "rms_norm"}),
    "mmdit-40m": (8, 6, 64, 64, 4, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)}),
}


def get_config(name: str = "24m") -> ConfigDict:
    """base with the network `name`; ValueError for an unknown one."""
    if name not in SIZES | TRANSFORMERS:
        known = ", ".join(SIZES | TRANSFORMERS)
        raise ValueError(f"configs/benchmark_cpu.py:{name}: unknown; one of {known}")
    config = base.get_config()
    config.train.update(learning_rate=1e-4, weight_decay=0.01)
    config.data.max_length = 16
    config.sample.steps = 4
    return _transformer(config, name) if name in TRANSFORMERS else _unet(config, name)


def _unet(config: ConfigDict, name: str) -> ConfigDict:
    """Two resnets a level, 8 heads, and the size `name`."""
    channels, pixels, config.train.batch_size = SIZES[name]
    config.data.image_size = pixels
    config.model.update(
        block_out_channels=channels, layers_per_block=2, attention_head_dim=8, norm_num_groups=32
    )
    return config


def _transformer(config: ConfigDict, name: str) -> ConfigDict:
    """The straight path, and the transformer `name`."""
    layers, heads, features, pixels, config.train.batch_size, options = TRANSFORMERS[name]
    config.train.unroll = layers <= 4  # a loop copies each layer's weights and what it keeps
    config.data.image_size = pixels
    config.model = base.backbone(
        "mmdit",
        sample_size=pixels,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=features,
        caption_projection_dim=heads * features,
        joint_attention_dim=config.text.width,
        pooled_projection_dim=config.text.width,
        pos_embed_max_size=64,
        **options,
    )
    config.diffusion.update(schedule="flow", prediction_type="velocity")
    config.context.update(kind="joint", estimate="velocity")
    return config
