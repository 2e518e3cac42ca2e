"""The editing default: a clip of a moving shape, edited by the model that configs/shapes.py trains;
nothing to download.

Where `video.path` does not exist yet, make the clip and its true edits:

    python -m contextdiff_jax.train --config=configs/shapes.py --workdir=runs/shapes
    python -m contextdiff_jax.draw_clip --out=runs/clip
    python -m contextdiff_jax.edit --config=configs/edit_shapes.py --workdir=runs/edit
"""

from ml_collections import ConfigDict

from configs import shapes


def video_sections() -> dict:
    """`video` and `edit` with every field."""
    return dict(
        video=dict(
            path="",
            prompt="",
            edit_prompts=(),
            num_frames=8,
            size=(0, 0),
            start=0,
            stride=1,
            model="",
            weights="ema",
            tune="temporal",
            transfer_context=True,
            window=0,
            overlap=2,
            remat=False,
            fps=8.0,
        ),
        edit=dict(
            steps=50,
            strength=1.0,
            guidance=3.0,
            negative="source",
            inversion="ddim",
            iterations=30,
            tolerance=1e-4,
            control="none",
            cross_range=(0.0, 0.8),
            self_range=(0.0, 0.5),
            self_tokens=1024,
            reweight=(),
            blend="",
            blend_threshold=0.3,
            blend_range=(0.2, 1.0),
            attention_maps=False,
            clip="",
            pickscore="",
            lpips="",
        ),
    )


def get_config() -> ConfigDict:
    """shapes, tuned for seconds on eight frames. Of strengths 0.5 to 1, guidance 1.5 to 6 and both
    negatives, these kept the most of twelve other edits exact: with more noise undone the shape is
    lost, away from the source's prompt the colours.
    """
    config = shapes.get_config()
    config.update(video_sections())
    config.train.update(
        steps=20,
        batch_size=1,
        learning_rate=1e-3,
        warmup_steps=5,
        decay="constant",
        ema_decay=0.9,
        log_every=10,
        checkpoint_every=100,
    )
    config.video.update(
        path="runs/clip/source",
        model="runs/shapes",
        prompt="a large red circle",
        edit_prompts=("a large blue circle", "a large red square"),
    )
    config.edit.update(steps=20, strength=0.55, negative="empty", inversion="exact", iterations=10)
    return config
