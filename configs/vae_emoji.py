"""A small AutoencoderKL (0.7 M parameters) for 64x64 pictures: 16x16x4 latents, a twelfth of the
numbers.

What it reaches and how long it takes: docs/pretrained.md. Any folder of captioned pictures will do
(`data.source=folder`).

    python -m contextdiff_jax.train_vae --config=configs/vae_emoji.py --config.data.path=FOLDER
    --workdir=runs/vae
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base


def get_config() -> ConfigDict:
    """Its own sections `vae` (diffusers' AutoencoderKL fields) and `loss`; data and mesh are
    base's.
    """
    config = base.get_config()
    config.data.update(source="emoji", image_size=64)
    return ConfigDict(
        dict(
            seed=0,
            train=dict(
                steps=1500,
                batch_size=8,
                learning_rate=2e-3,
                warmup_steps=50,
                decay="cosine",
                weight_decay=0.0,
                b1=0.9,
                b2=0.99,
                clip_norm=1.0,
                ema_decay=0.99,
                log_every=25,
                checkpoint_every=250,
                keep_checkpoints=2,
            ),
            data=config.data,
            loss=dict(l1=1.0, l2=1.0, kl=1e-3),
            vae=dict(
                block_out_channels=(16, 32, 64),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=8,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                sample_size=64,
            ),
            mesh=config.mesh,
            log=config.log,
        )
    )
