"""Each solver's error against its number of steps, where everything is known, as a log-log plot.

JAX_PLATFORMS=cpu PYTHONPATH=. python tests/plot_solver_orders.py docs/solver_orders.png
"""

from __future__ import annotations

import sys

from matplotlib.figure import Figure
from test_solver_orders import SECOND, context, error

STEPS = (4, 6, 8, 12, 16, 24, 32, 48, 64)


def main(out: str) -> None:
    """Draw both paths, and lines of the orders 1 and 2."""
    figure = Figure(figsize=(11, 4.4))
    for axes, path in zip(figure.subplots(1, 2, sharey=True), ("flow", "cosine"), strict=True):
        for name in ("ddim", *SECOND):
            axes.loglog(STEPS, [error(path, name, n, context) for n in STEPS], "o-", label=name)
        for order, style in ((1, ":"), (2, "--")):
            line = [0.9 * (STEPS[0] / n) ** order * 0.3 for n in STEPS]
            axes.loglog(STEPS, line, "k" + style, alpha=0.5, label=f"order {order}")
        axes.set(title=path, xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("root mean square error")
    figure.axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main(sys.argv[1])
