"""A run's seconds a step beside what the compiler predicted for it (`--mode=aot --json=FILE`)."""

from __future__ import annotations

import statistics

from etils import epath

from contextdiff_jax.benchmarks.loading import Result
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runtime.files import read_lines


def run(workdir: str, prediction: str) -> Result:
    """One row: measured, predicted, and their ratio. The first log line is left out: the pipeline
    and the caches fill in it.

    Raises ValueError for a run of fewer than two log lines, and for a file without a prediction
    that fits.
    """
    file = epath.Path(workdir) / "metrics.jsonl"
    if not file.exists():
        raise ValueError(f"--workdir={workdir}: has no metrics.jsonl")
    seconds = [line["seconds_per_step"] for line in read_lines(file)][1:]
    if not seconds:
        raise ValueError(f"--workdir={workdir}: fewer than two log lines; nothing to compare")
    rows = read_json(epath.Path(prediction), "a prediction of --mode=aot").get("rows", [])
    predicted = next((row["seconds"] for row in rows if row.get("seconds")), None)
    if predicted is None:
        raise ValueError(f"--prediction={prediction}: no program that fits the chip")
    measured = statistics.median(seconds)
    row = {"measured": measured, "predicted": predicted, "ratio": measured / predicted}
    text = f"{measured:.4f} s a step, {predicted:.4f} predicted: {row['ratio']:.2f} times as long"
    return Result(text, [row])
