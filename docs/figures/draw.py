"""Draws the figures of docs/concepts.md, by the package's own functions on data of one dimension.

JAX_PLATFORMS=cpu PYTHONPATH=. python docs/figures/draw.py docs/figures
"""

from __future__ import annotations

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from contextdiff_jax import diffusion

matplotlib.use("Agg")
SCHEDULE = diffusion.make_schedule("cosine")
TIMES = np.arange(1000)
# x0 of a caption is Gaussian about its mean; the captions are equally frequent.
MEANS, DEVIATION = {"right": 1.0, "left": -1.0}, 0.35
GRID = jnp.linspace(-2.5, 2.5, 501)
RED, BLUE, GREY = "#d2452f", "#2a6fb0", "#777777"


def context(x0):
    """A context that says which side x0 is on."""
    return jnp.tanh(2 * x0)


def posterior_mean(x_t, t, shift, caption):
    """(E[x0 | x_t, caption], E[r | x_t, caption]) by summing over a grid of x0; no caption: any."""
    means = [MEANS[caption]] if caption else list(MEANS.values())
    prior = sum(jnp.exp(-((GRID - mean) ** 2) / (2 * DEVIATION**2)) for mean in means)
    mean = diffusion.marginal_mean(SCHEDULE, GRID, context(GRID), jnp.full(GRID.shape, t), shift)
    spread = SCHEDULE.variance(t)
    logits = jnp.log(prior) - (x_t[:, None] - mean) ** 2 / (2 * spread)
    weights = jax.nn.softmax(logits, axis=1)
    return weights @ GRID, weights @ context(GRID)


def reverse(noise, shift, caption, guidance, steps=200):
    """[steps + 1, N]: where DDIM goes from each noise, with the exact estimates."""
    times = diffusion.spaced_timesteps(1000, steps)
    x, path = noise, [noise]
    for t, s in zip(times, [*times[1:], -1], strict=True):
        pair = [posterior_mean(x, t, shift, words) for words in (caption, None)]
        x0, r = (
            guidance * with_ + (1 - guidance) * without
            for with_, without in zip(*pair, strict=True)
        )
        here = diffusion.marginal_mean(SCHEDULE, x0, r, jnp.full(x.shape, t), shift)
        there = diffusion.marginal_mean(SCHEDULE, x0, r, jnp.full(x.shape, s), shift)
        ratio = jnp.sqrt(SCHEDULE.variance(s) / SCHEDULE.variance(t))
        x = there + ratio * (x - here)
        path.append(x)
    return np.array([*times, -1]), np.stack(path)


def style(axes, title, left="t, from data to noise"):
    """The common looks."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(left, fontsize=9)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_forward(folder):
    """Where noise takes the two captions, without and with a context; the shifts by name."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    for axes, shift, title in zip(
        panels, ("none", "quadratic"), ("plain diffusion", "with a context"), strict=False
    ):
        for (caption, mean), colour in zip(MEANS.items(), (RED, BLUE), strict=True):
            x0 = jnp.full(TIMES.shape, mean)
            centre = diffusion.marginal_mean(SCHEDULE, x0, context(x0), TIMES, shift)
            spread = jnp.sqrt(SCHEDULE.variance(TIMES) + (SCHEDULE.alpha(TIMES) * DEVIATION) ** 2)
            axes.plot(TIMES, centre, color=colour, label=f"“{caption}”")
            axes.fill_between(TIMES, centre - spread, centre + spread, color=colour, alpha=0.18)
        style(axes, title)
        axes.set_ylim(-2.2, 2.2)
    panels[0].set_ylabel("x_t: mean ± deviation", fontsize=9)
    panels[1].legend(fontsize=8, frameon=False, loc="lower right")
    for name in ("quadratic", "prior", "data_normalization", "constant"):
        k = [diffusion.shift_coefficient(SCHEDULE, jnp.array([t]), name)[0] for t in TIMES[::10]]
        panels[2].plot(TIMES[::10], k, label=name)
    style(panels[2], "k_t, the shift's size, by name")
    panels[2].legend(fontsize=8, frameon=False)
    figure.savefig(folder / "forward.png", dpi=130)


def draw_reverse(folder):
    """DDIM from the same noises: with a caption, without, and guided."""
    noise = jnp.linspace(-2, 2, 16)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3), constrained_layout=True, sharey=True)
    cases = (
        (None, 1, "no caption: either side"),
        ("right", 1, "“right”, guidance 1: as the data"),
        ("right", 4, "“right”, guidance 4: past the data"),
    )
    for axes, (caption, guidance, title) in zip(panels, cases, strict=True):
        times, path = reverse(noise, "quadratic", caption, guidance)
        for line in path.T:
            axes.plot(times, line, color=RED if line[-1] > 0 else BLUE, lw=0.9)
        for mean in MEANS.values():
            axes.axhline(mean, color=GREY, lw=0.6, ls=":")
        axes.invert_xaxis()
        style(axes, title, "t, from noise to data")
    panels[0].set_ylabel("x_t", fontsize=9)
    figure.savefig(folder / "reverse.png", dpi=130)


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    draw_forward(out)
    draw_reverse(out)
