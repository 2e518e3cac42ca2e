"""python -m contextdiff_jax.demo --workdir=RUN
python -m contextdiff_jax.demo --model=FOLDER --port=8000 --password=SECRET

A web page where a model makes pictures and edits clips by clicking. Pictures from words, with plain
diffusion beside them; from a picture, or into a drawn hole of it; a gallery that restores settings.
Only this machine reaches it unless --host says otherwise. It needs Gradio:
pip install -r requirements-demo.txt.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import tempfile

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host

WORKDIR = cli.define_path("workdir", None, "Folder of a trained run.")
MODEL = cli.define_path(
    "model", None, "A Stable Diffusion folder, or any name that Pipeline.open takes."
)
WEIGHTS = flags.DEFINE_string("weights", "ema", "A run's ema or params.")
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "The address to listen at; 0.0.0.0: the page is for the whole network."
)
PORT = flags.DEFINE_integer("port", 7860, "Its port.", lower_bound=1, upper_bound=65535)
PASSWORD = flags.DEFINE_string(
    "password",
    None,
    "Visitors must give it. The variable CONTEXTDIFF_PASSWORD keeps it out of the list of "
    "processes.",
)


def read_name() -> str:
    """The model's folder or name. ValueError unless exactly one is given."""
    if MODEL.value and WORKDIR.value:
        raise ValueError(f"--model={MODEL.value}: can't be given with --workdir={WORKDIR.value}")
    if not (MODEL.value or WORKDIR.value):
        raise ValueError("--workdir: missing; name a run's folder, or --model=FOLDER")
    return MODEL.value or WORKDIR.value


def main() -> None:
    """Parses, opens, serves."""
    name = read_name()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the visitors' files are removed
    password = PASSWORD.value or os.environ.get("CONTEXTDIFF_PASSWORD")
    with tempfile.TemporaryDirectory(prefix="contextdiff-demo-") as folder:
        files = pathlib.Path(folder)
        try:
            from contextdiff_jax.demo_page import server
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("contextdiff_jax"):
                raise
            raise ValueError(
                f"the page needs {error.name}: pip install -r requirements-demo.txt"
            ) from None
        from etils import epath

        from contextdiff_jax.inference import Pipeline

        host.set_compilation_cache(host.user_cache() if MODEL.value else epath.Path(name))
        pipeline = Pipeline.open(name, WEIGHTS.value)
        page = server.make_page(pipeline, name, files)
        server.serve(page, files, host=HOST.value, port=PORT.value, password=password)


def command() -> None:
    """Run `main` with the flags of the command line."""
    cli.run(main)


if __name__ == "__main__":
    command()
