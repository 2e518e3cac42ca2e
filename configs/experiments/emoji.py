"""Real pictures: emoji at 32x32, held-out pairs of a person and a skin tone, two drawing styles.

Reads ../shared/data/emoji. About 40 minutes a cell on one core.

    taskset -c 0 python -m contextdiff_jax.experiment --plan=configs/experiments/emoji.py
"""

from configs.experiments import shapes_one
from contextdiff_jax.experiments.plan import Plan


def get_plan() -> Plan:
    """The shapes' variants and denoiser, a level deeper; judged by a classifier of tone, style and category."""
    config = {name: dict(section) if isinstance(section, dict) else section
              for name, section in shapes_one.get_plan().config.items()}
    config["train"] |= {"steps": 4000, "learning_rate": 2e-3}
    config["data"] |= {"source": "emoji", "path": "../shared/data/emoji", "image_size": 32, "max_length": 32}
    config["model"] |= {
        "block_out_channels": (16, 32, 64, 96), "down_block_types": ("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
    }
    return Plan(
        title="Emoji",
        about=(
            "Held-out records are pairs of a person and a skin tone of which each was trained on. Exact: the classifier sees "
            "the caption's tone, style and category; it isn't always right on real pictures either."
        ),
        kind="pictures",
        config=config,
        variants=shapes_one.VARIANTS,
        headline={
            "held-out, exact": "held-out records, ddim, guidance best/exact",
            "held-out, skin tone": "held-out records, ddim, guidance best/skin_tone",
            "held-out, FID": "held-out records, ddim, guidance best/fid",
            "seen, exact": "training records, ddim, guidance best/exact",
            "bits/dim": "bound/held-out records",
            "held-out, true context": "held-out records, ddim, guidance best, true context/exact",
        },
        more_seeds={"none": 5, "plugin": 5},
        baselines=("none", "text-prior"),
        options=dict(
            num=192, guidances=(1.0, 2.0, 4.0), validation=96, samplers={"ddim": 25, "ddpm": 25}, classifier=1500,
            bound=64, bound_timesteps=50,
        ),
    )
