"""The edit of configs/edit_sd15.py in shapes alone: Stable Diffusion 1.5's UNet on a clip of
512x512 pixels' 64x64x4 latents (`video.size` is that of the latents), compiled for TPUs and never
run.

    python -m contextdiff_jax.benchmark --mode=aot --program=edit --topology=v5p:1x1x1
    --config=configs/edit_sd15_512.py --config.video.num_frames=24
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import edit_sd15, sd15_512


def get_config() -> ConfigDict:
    """sd15_512's networks, edit_sd15's clip, tuning and edit; frames over all chips."""
    config, edit = sd15_512.get_config(), edit_sd15.get_config()
    config.update(video=edit.video, edit=edit.edit)
    config.train.update(edit.train, precision="bfloat16")
    config.video.update(model="", size=(64, 64))
    config.context.update(edit.context)
    config.mesh.update(data=1, fsdp=1, sequence=-1)
    return config
