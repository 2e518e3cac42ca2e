"""Edits of animated 3D emoji, whose true edits are known: the same person in another skin tone.

    bash launch/emoji_data.sh data
    python -m contextdiff_jax.edit --config=configs/edit_emoji.py --workdir=runs/edit_emoji

edits one clip, and `--benchmark=60 --config.video.path=data/emoji3d` scores that many against the
clips that show the answer (docs/video.md).
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import emoji3d
from contextdiff_jax.configs.edit_shapes import video_sections


def get_config() -> ConfigDict:
    """The model that ships with the package, tuned for a second on eight frames."""
    config = emoji3d.get_config()
    config.update(video_sections())
    config.train.update(
        steps=5,
        batch_size=1,
        learning_rate=1e-3,
        warmup_steps=5,
        decay="constant",
        ema_decay=0.9,
        log_every=10,
        checkpoint_every=100,
    )
    config.video.update(
        path="data/emoji3d/clips/1f3c3-1f3fb-200d-2642-fe0f",
        model="emoji",
        prompt="man running, light skin tone, 3d style",
        edit_prompts=("man running, dark skin tone, 3d style",),
    )
    # of guidance 1 to 10, strengths 0.7 to 1 and 1 to 20 steps of tuning, on four clips
    config.edit.update(
        method="flowedit",
        steps=20,
        strength=0.9,
        negative="empty",
        inversion="exact",
        iterations=10,
    )
    return config
