"""python -m contextdiff_jax [COMMAND --flag=value ...]

List the commands, or run one.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import pathlib
import sys

# In the order in which a newcomer needs them; what each does is said by its own docstring.
COMMANDS = (
    "train",
    "sample",
    "edit",
    "demo",
    "evaluate",
    "experiment",
    "benchmark",
    "convert",
    "cache_latents",
    "train_vae",
    "train_classifier",
    "train_tokenizer",
    "draw_clip",
)
HEAD = "ContextDiff in JAX: python -m contextdiff_jax.COMMAND, or contextdiff-COMMAND."
FOOT = """A first run: python -m contextdiff_jax.train --config=shapes --workdir=runs/shapes
A command's flags: python -m contextdiff_jax.COMMAND --help"""


def read_sentence(name: str) -> str:
    """Return what a command does: the first sentence after its examples. Nothing is imported."""
    text = pathlib.Path(__file__).with_name(f"{name}.py").read_text()
    described = ast.get_docstring(ast.parse(text)).split("\n\n")[1]
    return " ".join(described.split()).partition(". ")[0].removesuffix(".")


def make_list() -> str:
    """Return the list of commands, each with its sentence."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {read_sentence(name)}" for name in COMMANDS]
    return "\n".join([HEAD, "", *lines, "", FOOT])


def command() -> None:
    """Print the list, or run the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(make_list())
        return
    name = arguments[0].replace("-", "_")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS)
        known = f"nearest: {', '.join(near)}" if near else f"one of {', '.join(COMMANDS)}"
        print(f"error: {arguments[0]}: no such command; {known}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"{sys.argv[0]} {name}", *arguments[1:]]
    importlib.import_module(f"contextdiff_jax.{name}").command()


if __name__ == "__main__":
    command()
