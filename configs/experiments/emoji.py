"""Real pictures: emoji at 16x16, held-out pairs of a person and a skin tone, two drawing styles.

Reads ../shared/data/emoji. At 32x32 (a level more, 4,000 steps) a cell took 50 minutes of a core:
too slow for seeds.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/emoji.py
"""

from contextdiff_jax.configs.experiments import shapes_one
from contextdiff_jax.experiments.plan import Plan, changed


def get_plan() -> Plan:
    """The shapes' variants, denoiser and budget; a classifier judges tone, style and category."""
    changes = {"data.source": "emoji", "data.path": "../shared/data/emoji", "data.max_length": 32}
    return Plan(
        title="Emoji",
        about=(
            "Held-out records are pairs of a person and a skin tone of which each was trained on. "
            "Exact: the classifier sees the caption's tone, style and category; it isn't always "
            "right on real pictures either."
        ),
        kind="pictures",
        config=changed(shapes_one.get_plan().config, changes),
        variants=shapes_one.VARIANTS,
        headline={
            "held-out, exact": "held-out records, ddim, guidance best/exact",
            "held-out, skin tone": "held-out records, ddim, guidance best/skin_tone",
            "held-out, style": "held-out records, ddim, guidance best/vendor",
            "held-out, FID": "held-out records, ddim, guidance best/fid",
            "seen, exact": "training records, ddim, guidance best/exact",
            "bits/dim": "bound/held-out records",
            "held-out, true context": "held-out records, ddim, guidance best, true context/exact",
        },
        baselines=("none", "text-prior"),
        options=dict(
            num=192,
            guidances=(1.0, 2.0, 4.0),
            validation=96,
            samplers={"ddim": 25, "ddpm": 25},
            classifier=1500,
            bound=64,
            bound_timesteps=50,
        ),
    )
