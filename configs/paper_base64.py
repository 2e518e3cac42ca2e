"""The paper's text-to-image base: 64x64 pixels, r of CLIP's image and text tokens, Imagen's UNet.

Never run here: it is the shapes and the mesh of such a run, compiled for TPUs (docs/cascade.md).
The networks in configs/networks have no weights. To train, name folders that do:

    python -m contextdiff_jax.train --config=configs/paper_base64.py --config.data.path=FOLDER
    --config.context.clip=openai/clip-vit-base-patch32
    --config.text.pretrained=openai/clip-vit-large-patch14
    --config.data.tokenizer=openai/clip-vit-large-patch14 --workdir=runs/base64

    python -m contextdiff_jax.benchmark --mode=aot --config=configs/paper_base64.py
    --topology=v5p:4x4x4
"""

import pathlib

from ml_collections import ConfigDict

from contextdiff_jax.configs import base

NETWORKS = pathlib.Path(__file__).parent / "networks"
# Imagen's (Saharia et al. 2022, section 4.1 and appendix F): 2.5 M steps of 2,048 pictures, a rate
# of 1e-4 after 10,000 steps, a tenth of the captions dropped. Its base was trained by Adafactor;
# here AdamW trains all three. The paper (2402.16627) says none of these. Sizes agree with NVIDIA's
# reproduction, NeMo's base64-2b.yaml, but for what a comment says.
TRAIN = dict(
    steps=2_500_000,
    batch_size=2048,
    learning_rate=1e-4,
    warmup_steps=10_000,
    decay="constant",
    b2=0.999,  # not said
    ema_decay=0.9999,
    caption_dropout=0.1,
    precision="bfloat16",
    remat="products",
    checkpoint_every=1000,
    sample_every=5000,
)


def read_text(config: ConfigDict, name: str, width: int, length: int) -> None:
    """Has the frozen text encoder NAME in configs/networks read the captions."""
    config.text.pretrained = config.data.tokenizer = str(NETWORKS / name)
    config.data.max_length = length
    config.model.cross_attention_dim = width


def get_config() -> ConfigDict:
    """base at Imagen's sizes with the paper's context.

    Which CLIP reads the captions isn't said: Stable Diffusion's is taken. Imagen's T5-XXL, 4,096
    wide, is `read_text(config, "t5_xxl", 4096, 128)`.
    """
    config = base.get_config()
    config.train.update(TRAIN)
    config.data.update(source="folder", image_size=64, num_workers=16)
    # Imagen's network predicts the noise; the paper's r is plugged in
    config.diffusion.update(schedule="cosine", prediction_type="epsilon")
    config.context.update(
        tokens="clip",
        clip=str(NETWORKS / "clip_vit_b32"),
        fit_tokens=True,  # 7x7 tokens of 32 pixels, 8x8 patches
        patch_size=8,
        num_heads=8,  # the paper's
        width=768,  # as CLIP's tokens; with num_blocks not said
        num_blocks=2,
    )
    config.model.update(
        block_out_channels=(512, 1024, 1536, 2048),
        layers_per_block=3,
        # attention at 32x32, 16x16 and 8x8, in heads of 64 features
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=32,
        use_linear_projection=True,
    )
    with config.ignore_type():  # a number a level where base has one for all
        config.model.attention_head_dim = (8, 16, 24, 32)
    read_text(config, "clip_vit_l14", 768, 77)
    config.mesh.update(data=-1, fsdp=16)
    # Thresholds are dynamic as Imagen's. Neither paper says the percentile or one best scale.
    config.sample.update(sampler="ddpm", steps=256, guidance=7.5, dynamic_threshold=99.5)
    return config
