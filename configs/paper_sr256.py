"""The paper's first upsampler, 64x64 to 256x256 pixels: Imagen's efficient UNet, with a context of
the low-resolution picture and the caption.

Never run here: it is the shapes and the mesh of such a run, compiled for TPUs (docs/cascade.md).
The text encoder in configs/networks has no weights. To train, name a folder that does:

    python -m contextdiff_jax.train --config=configs/paper_sr256.py --config.data.path=FOLDER
    --config.text.pretrained=openai/clip-vit-large-patch14
    --config.data.tokenizer=openai/clip-vit-large-patch14 --workdir=runs/sr256

    python -m contextdiff_jax.benchmark --mode=aot --config=configs/paper_sr256.py
    --topology=v5p:4x4x4
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import base, paper_base64


def get_config() -> ConfigDict:
    """base with Imagen's network (appendix F.2): 128 channels times 1, 2, 4, 8, residual blocks 2,
    4, 8, 8, self-attention and attention to the text at the coarsest level.

    Imagen's first level halves the picture too: here that is 2x2 patches. Whether the paper's
    upsampler has a context isn't said; this one is exact in both processes.
    """
    config = base.get_config()
    config.train.update(paper_base64.TRAIN)
    config.data.update(source="folder", image_size=256, num_workers=16)
    # v, which colours stay true with where pictures are large (Imagen Video), is a choice
    config.diffusion.update(schedule="cosine", prediction_type="v")
    config.super_resolution.update(factor=4, max_level=1.0)  # levels evenly in [0, 1], Imagen's
    config.context.update(
        kind="low_resolution", patch_size=16, num_heads=8, width=768, num_blocks=2
    )
    config.model = base.backbone(
        "efficient_unet",
        block_out_channels=(128, 256, 512, 1024),
        layers_per_block=(2, 4, 8, 8),
        attention=("none", "none", "none", "all"),
        num_attention_heads=8,
        pooled_projection_dim=768,
        patch_size=2,
    )
    paper_base64.read_text(config, "clip_vit_l14", 768, 77)
    config.mesh.update(data=-1, fsdp=8)
    # steps, scale and level are choices
    config.sample.update(
        sampler="ddpm", steps=128, guidance=4.0, dynamic_threshold=99.5, augmentation=0.1
    )
    return config
