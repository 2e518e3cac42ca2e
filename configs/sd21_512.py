"""The paper's scale written out: SD-2.1's UNet (865.9 M parameters) on 512x512 pictures' 64x64x4
latents.

Never run here: it needs a pod slice. It is the shapes and the mesh of such a run, from nothing and
with our text encoder; what is trained in practice, from Stable Diffusion's folder and on its
latents, is configs/sd21_latent.py. Published on real chips, for the same UNet's PyTorch/XLA
finetune: 1.0 s a step of 2048 on 32 v5p chips.

    python -m contextdiff_jax.train --config=configs/sd21_512.py --config.data.path=FOLDER
    --workdir=DIR
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base

# of runs at Stable Diffusion's sizes
TRAIN = dict(
    steps=50_000,
    batch_size=2048,
    learning_rate=2e-5,
    warmup_steps=1000,
    decay="constant",
    weight_decay=0.01,
    b2=0.999,
    ema_decay=0.9999,
    precision="bfloat16",
    checkpoint_every=1000,
    sample_every=5000,
)


def get_config() -> ConfigDict:
    """base at Stable Diffusion 2.1's sizes, with its schedule made to end in pure noise."""
    config = base.get_config()
    config.train.update(TRAIN)
    config.data.update(source="folder", image_size=64, max_length=77, num_workers=16)
    config.diffusion.update(
        schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, zero_terminal_snr=True
    )
    config.context.update(patch_size=4, width=768, num_blocks=4, num_heads=12)
    config.text.update(max_length=77, width=1024, num_layers=23, num_heads=16)
    config.model.update(
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=1024,
        norm_num_groups=32,
        use_linear_projection=True,
    )
    with config.ignore_type():  # a number a level where base has one for all
        config.model.attention_head_dim = (5, 10, 20, 20)
    config.mesh.update(data=-1, fsdp=8)
    config.sample.update(guidance=7.5, guidance_rescale=0.7)
    return config
