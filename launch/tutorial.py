"""Executes docs/tutorial.ipynb and keeps what its cells print and draw.

cd docs && PYTHONPATH=.. python ../launch/tutorial.py [NOTEBOOK]

Jupyter would do; this needs nothing but the package. TUTORIAL_STEPS and TUTORIAL_RUNS are the
notebook's own: the steps of each training, and the folder of the runs.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import pathlib
import sys
from typing import Any


def execute(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of a cell: what it prints, and the picture of a last line that is one."""
    body = ast.parse(code).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    outputs = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if hasattr(value, "save"):
        png = io.BytesIO()
        value.save(png, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["picture"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def main(path: pathlib.Path) -> None:
    """Executes the notebook in the file and writes it back."""
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code, 1):
        print(f"cell {number} of {len(code)}", file=sys.stderr)
        cell["outputs"], cell["execution_count"] = execute("".join(cell["source"]), names), number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tutorial.ipynb"))
