"""Networks to measure on an accelerator beside torch's: `sd15`, the UNet of Stable Diffusion 1.5,
`sd3`, the transformer of Stable Diffusion 3 medium, both on 64x64 latents; `tiny-unet` and
`tiny-mmdit` to see on a CPU that all of it runs. Random weights: for timing alone.

    python -m contextdiff_jax.benchmark --mode=accelerator --minutes=8 --json=accelerator.json
    python -m contextdiff_jax.benchmark --mode=train --compare=torch \\
        --config=configs/benchmark_gpu.py:sd15
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base

NAMES = ("sd15", "sd3", "tiny-unet", "tiny-mmdit")


def get_config(name: str = "sd15") -> ConfigDict:
    """base with the network `name` in bfloat16; ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"configs/benchmark_gpu.py:{name}: unknown; one of {', '.join(NAMES)}")
    config = base.get_config()
    config.train.update(precision="bfloat16", batch_size=8, learning_rate=1e-4, weight_decay=0.01)
    config.sample.update(steps=10, guidance=5.0)
    {"sd15": _sd15, "sd3": _sd3, "tiny-unet": _tiny_unet, "tiny-mmdit": _tiny_mmdit}[name](config)
    return config


def _sd15(config: ConfigDict) -> None:
    config.data.update(source="folder", image_size=64, max_length=77)
    config.text.update(max_length=77, width=768, num_heads=12)
    config.context.update(width=256, patch_size=4)
    config.model = base.backbone("unet", cross_attention_dim=768)  # diffusers' defaults: its sizes


def _transformer(config: ConfigDict, width: int, **sizes: int) -> None:
    config.diffusion.update(schedule="flow", prediction_type="velocity")
    config.context.update(kind="joint", estimate="velocity")
    config.model = base.backbone(
        "mmdit",
        caption_projection_dim=width,
        joint_attention_dim=config.text.width,
        pooled_projection_dim=config.text.width,
        **sizes,
    )


def _sd3(config: ConfigDict) -> None:
    config.data.update(source="folder", image_size=64, max_length=154)
    config.text.update(max_length=154, width=1024, num_heads=16)
    config.context.update(width=384, num_heads=6, patch_size=4)
    _transformer(
        config,
        1536,
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        pos_embed_max_size=192,
    )


def _tiny(config: ConfigDict) -> None:
    config.train.batch_size = 2
    config.sample.steps = 2
    config.data.update(image_size=8, max_length=8)
    config.text.update(max_length=8, width=16, num_layers=1, num_heads=2)
    config.context.update(width=16, num_blocks=1, num_heads=2)


def _tiny_unet(config: ConfigDict) -> None:
    _tiny(config)
    config.model.update(
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )


def _tiny_mmdit(config: ConfigDict) -> None:
    _tiny(config)
    _transformer(
        config,
        16,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        pos_embed_max_size=8,
    )
