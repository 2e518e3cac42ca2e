"""The page that is made of an accelerator's measurements (`benchmark --mode=accelerator`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def page(told: Mapping[str, Any]) -> str:
    """Markdown of the file that the command writes: a verdict, then each part as it was printed."""
    lines = [
        "# Measured on an accelerator",
        "",
        f"Written by `python -m contextdiff_jax.benchmark --mode=accelerator "
        f"--minutes={told['minutes']:g}`, begun {told['began']}.",
        "",
        *_verdict(told),
    ]
    for name, part in told["parts"].items():
        lines += ["", f"## {name[0].upper()}{name[1:]}", ""]
        lines += (
            ["```", part["text"], "```"] if "text" in part else [f"Not measured: {part['error']}"]
        )
    return "\n".join(lines) + "\n"


def _verdict(told: Mapping[str, Any]) -> list[str]:
    """A row a network and program that has a peer."""
    rows = []
    for name, part in told["parts"].items():
        ours = next((row for row in part.get("rows", []) if "ratio" in row), None)
        if ours is None:
            continue
        low, high = ours["ratio_quartiles"]
        rate = ours["batch"] / ours["seconds"]
        rows.append(
            f"| {name} | {ours['precision']}, {ours['batch']} | {rate:.2f} | {ours['peer']} | "
            f"{ours['ratio']:.2f} [{low:.2f}, {high:.2f}] |"
        )
    if not rows:
        missing = ", ".join(told["lacking"]) or "no part with a peer was finished"
        return [f"Nothing stands beside ours: {missing}."]
    return [
        "Times as fast as the fastest of torch's; above 1 ours is ahead. Brackets: quartiles.",
        "",
        "| what | precision, batch | images/s | torch's fastest | times as fast |",
        "|---|---|---|---|---|",
        *rows,
    ]
