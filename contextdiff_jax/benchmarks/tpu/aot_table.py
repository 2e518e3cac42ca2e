"""The text of what `benchmarks.tpu.aot` found."""

from __future__ import annotations

import math
from typing import Any

from contextdiff_jax.parallel.chips import GiB
from contextdiff_jax.runtime.tables import aligned


def table(rows: list[dict[str, Any]], program: str, topology: str, efficiency: float) -> str:
    """The programs' rows, and the details of the first; `efficiency`: of the kernels."""
    level = rows[0]["optimization_level"]
    level = "" if level == "UNKNOWN" else f" at JAX_OPTIMIZATION_LEVEL={level}"
    head = ["", "fits", "HBM GiB", "TFLOP", "s", "kernels", "sent in", "of peak", "compile"]
    lines = [
        f"{program} on {topology}, a chip; predicted by the compiler "
        f"(libtpu{level}), nothing run on a TPU",
        aligned(head, [_entries(row) for row in rows]),
        *(f"{row['name']}: {row['reason']}" for row in rows if row["seconds"] is None),
        *(_days(row) for row in rows if "days" in row),
        "s: the compiler's estimate and the attention kernels, whose operations it doesn't see, at "
        f"{efficiency:.0%} of the peak, padding counted; sent in: collectives, not in s, if "
        "nothing hid them",
    ]
    return "\n".join(lines + (_details(rows[0]) if rows[0]["fits"] else []))


def training_days(row: dict[str, Any], images: int, batch: int) -> dict[str, Any]:
    """How long a training on so many images takes: where all of a step's collectives are hidden
    behind its computation, and where none is.
    """
    days = images / batch / 86400
    shown = row["seconds"] + row["collective_seconds"]
    return {"images": images, "days": days * row["seconds"], "days_nothing_hidden": days * shown}


def _days(row: dict[str, Any]) -> str:
    """How long the whole training takes."""
    return (
        f"{row['name']}: {row['images']:.4g} images take {row['days']:.3g} days, "
        f"{row['days_nothing_hidden']:.3g} if nothing hid what is sent"
    )


def _entries(row: dict[str, Any]) -> list[str]:
    """The row's texts; a program that didn't compile has no figures."""
    name, fits, seconds = row["name"], "yes" if row["fits"] else "no", row["compile_seconds"]
    if row["seconds"] is None:
        return [name, fits, *["-"] * 6, f"{seconds:.0f} s"]
    return [
        name,
        fits,
        f"{row['peak_hbm'] / GiB:.2f} / {row['hbm'] / GiB:.4g}",
        f"{row['flops'] / 1e12:.2f}",
        *(f"{row[part]:.4f}" for part in ("seconds", "kernel_seconds", "collective_seconds")),
        f"{row['utilisation']:.1%}",
        f"{seconds:.0f} s",
    ]


def _details(row: dict[str, Any]) -> list[str]:
    """Lines on one program: what a chip sends, and its largest arrays."""
    sent = [
        [each["kind"], each["axes"], str(each["count"]), f"{each['sent_bytes'] / 2**20:.2f}"]
        for each in row["collectives"]
    ]
    return [
        "",
        *row.get("layers", ()),
        f"{row['name']}: sent by a chip",
        *([aligned(["collective", "axes", "times", "MiB in all"], sent)] if sent else []),
        f"  state and batch {row['arguments'] / GiB:.2f} GiB, of which "
        f"{row['aliased'] / GiB:.2f} are written in place",
        "largest arrays",
        *(
            f"  {math.floor(a['bytes'] / 2**20):8} MiB {a['array']:32} {a['made_by'][-70:]}"
            for a in row["largest"]
        ),
    ]
