"""python -m contextdiff_jax.convert --source=DIR --target=DIR
python -m contextdiff_jax.convert --source=RUN --target=DIR --reverse

Turn a Hugging Face or diffusers folder into our format, or back. The source is a folder of one
model or of a whole pipeline, or a single-file checkpoint of Stable Diffusion; the target has Orbax
parameters. --reverse goes back, with the same tensors bit for bit. Tokenizers, schedulers and
models that we don't have are copied. With --reverse the source may also be a run that began as a
diffusers folder (`model.pretrained`): it becomes one again.
"""

from __future__ import annotations

import pathlib

from absl import flags

from contextdiff_jax import cli

SOURCE = cli.define_path(
    "source",
    None,
    "Folder to read, with config.json or model_index.json, or a single .safetensors file.",
)
TARGET = cli.define_path("target", None, "Folder to write; must be new.")
REVERSE = flags.DEFINE_boolean("reverse", False, "From our format to Hugging Face's.")


def main() -> None:
    """Parses and converts."""
    for name, value in (("source", SOURCE.value), ("target", TARGET.value)):
        if not value:
            raise ValueError(f"--{name}: missing; name a folder")
    cli.output_folder("target", TARGET.value)

    import jax

    from contextdiff_jax.pretrained import conversion
    from contextdiff_jax.training import export

    # Nothing is computed: an accelerator's memory isn't needed.
    jax.config.update("jax_platforms", "cpu")
    if REVERSE.value and export.is_run(pathlib.Path(SOURCE.value)):
        export.export_run(pathlib.Path(SOURCE.value), pathlib.Path(TARGET.value))
        print(f"written: {TARGET.value}")
        return
    convert = conversion.from_native if REVERSE.value else conversion.to_native
    convert(pathlib.Path(SOURCE.value), pathlib.Path(TARGET.value))
    print(f"written: {TARGET.value}")


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-convert begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
