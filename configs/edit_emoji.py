"""Edits of animated 3D emoji, whose true edits are known: the same person in another skin tone.

    bash launch/emoji_data.sh data
    python -m contextdiff_jax.edit --config=configs/edit_emoji.py --workdir=runs/edit_emoji

edits one clip, and `--benchmark=60 --config.video.path=data/emoji3d` scores that many against the
clips that show the answer (docs/video.md).
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import emoji3d
from contextdiff_jax.configs.edit_shapes import tuned


def get_config() -> ConfigDict:
    """The model that ships with the package, tuned for a second on eight frames."""
    config = tuned(emoji3d.get_config(), steps=5)
    config.video.update(
        path="data/emoji3d/clips/1f469-1f3ff-200d-2695-fe0f",
        model="emoji",
        prompt="woman health worker, dark skin tone, 3d style",
        edit_prompts=("woman health worker, medium-light skin tone, 3d style",),
    )
    # Guidance finds the tone while there is much noise; later it would overshoot the colours
    # (docs/video.md has what was tried).
    config.edit.update(strength=(0.95,), guidance=4.0, guidance_interval=(0.67, 1.0))
    return config
