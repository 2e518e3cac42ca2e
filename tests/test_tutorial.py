"""The notebook docs/tutorial.ipynb: whole, small, and runs as it stands."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs/tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def texts(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]


def test_its_code_parses_and_its_links_lead_somewhere():
    for code in texts("code"):
        ast.parse(code)
    for target in re.findall(r"\]\(([^)#\s]+)", "\n".join(texts("markdown"))):
        assert "://" in target or (NOTEBOOK.parent / target).is_file(), target


def test_it_was_executed_in_order_and_is_small():
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in CELLS for output in cell.get("outputs", ())]
    kinds = [kind for output in outputs for kind in output.get("data", ())]
    assert 1 <= kinds.count("image/png") <= 3
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_it_runs_at_reduced_size(tmp_path):
    """`bash launch/test.sh -m slow tests/test_tutorial.py`; three minutes of a core, mostly
    compilation.
    """
    code = "\n".join(texts("code"))
    environment = os.environ | {
        "TUTORIAL_STEPS": "4",
        "TUTORIAL_RUNS": str(tmp_path),
        "CONTEXTDIFF_SOURCE": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"context: \d of 6 captions\nplain: \d of 6 captions\n", done.stdout)
    assert re.search(r"mean error of the way back: \d", done.stdout)
