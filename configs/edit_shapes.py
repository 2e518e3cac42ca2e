"""The editing default: a clip of a moving shape, edited by the model that configs/shapes.py
trains; nothing to download.

Where `video.path` does not exist yet, make the clip and its true edits:

    python -m contextdiff_jax.train --config=configs/shapes.py --workdir=runs/shapes
    python -m contextdiff_jax.draw_clip --out=runs/clip
    python -m contextdiff_jax.edit --config=configs/edit_shapes.py --workdir=runs/edit
"""

from ml_collections import ConfigDict

from contextdiff_jax.configs import shapes
from contextdiff_jax.editing.settings import EditConfig, VideoConfig
from contextdiff_jax.runtime.fields import defaults


def video_sections() -> dict:
    """`video` and `edit` with every field, at its default."""
    return {"video": defaults(VideoConfig), "edit": defaults(EditConfig)}


def tuned(config: ConfigDict, steps: int) -> ConfigDict:
    """`config` of a model, with the sections of an edit: a tuning of seconds on one clip, no
    inversion.
    """
    config.update(video_sections())
    config.train.update(
        optimizer="adamw",
        steps=steps,
        batch_size=1,
        learning_rate=1e-3,
        warmup_steps=5,
        decay="constant",
        ema_decay=0.9,
        log_every=10,
        checkpoint_every=100,
    )
    config.edit.update(
        method="flowedit", steps=20, negative="empty", inversion="exact", iterations=10
    )
    return config


def get_config() -> ConfigDict:
    """shapes, tuned for seconds on eight frames. Of strengths 0.5 to 1, guidance 1.5 to 6 and both
    negatives, these kept the most of twelve other edits exact, by inversion and the model of
    shapes_16: with more noise undone the shape is lost, away from the source's prompt the colours.
    """
    config = tuned(shapes.get_config(), steps=20)
    config.video.update(
        path="runs/clip/source",
        model="runs/shapes",
        prompt="a large red circle",
        edit_prompts=("a large blue circle", "a large red square"),
    )
    config.edit.strength = (0.55,)
    return config
