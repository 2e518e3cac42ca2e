"""python -m contextdiff_jax.convert --source=DIR --target=DIR
python -m contextdiff_jax.convert --source=DIR --target=DIR --reverse
python -m contextdiff_jax.convert --source=RUN --target=DIR --dtype=float16

Turn a Hugging Face or diffusers folder into our format, or back. The source is a folder of one
model or of a whole pipeline, or a single-file checkpoint of Stable Diffusion; the target has Orbax
parameters. --reverse goes back, with the same tensors bit for bit. Tokenizers, schedulers and
models that we don't have are copied. With --reverse the source may also be a run that began as a
diffusers folder (`model.pretrained`): it becomes one again.

Of a trained run the folder that `Pipeline.save` writes: EMA weights in safetensors, the config, the
tokenizer, the frozen networks and a card. `sample --model=DIR` opens it.
"""

from __future__ import annotations

import pathlib

from absl import flags

from contextdiff_jax import cli

SOURCE = cli.define_path(
    "source",
    None,
    "Folder to read, with config.json or model_index.json, a single .safetensors file, or "
    "ORG/NAME of the hub.",
)
TARGET = cli.define_path(
    "target", None, "Folder to write; must be new, or hold a run's card and licence alone."
)
REVERSE = flags.DEFINE_boolean("reverse", False, "From our format to Hugging Face's.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "float16", "bfloat16"], "Of a run's weights; default: float32."
)
LICENSE = flags.DEFINE_string("license", None, "Of a run: its licence in the card, as in mit.")
EMA_LENGTH = cli.define_ema_length()


def main() -> None:
    """Parses and converts."""
    for name, value in (("source", SOURCE.value), ("target", TARGET.value)):
        if not value:
            raise ValueError(f"--{name}: missing; name a folder")
    cli.output_folder("target", TARGET.value)

    import jax

    from contextdiff_jax.pretrained import conversion
    from contextdiff_jax.runtime.hub import find
    from contextdiff_jax.training import export

    # Nothing is computed: an accelerator's memory isn't needed.
    jax.config.update("jax_platforms", "cpu")
    source, target = pathlib.Path(find(SOURCE.value)), pathlib.Path(TARGET.value)
    is_run = export.is_run(source)
    of_run = [flag for flag in (DTYPE, LICENSE, EMA_LENGTH) if flag.value is not None]
    if of_run and (REVERSE.value or not is_run):
        raise ValueError(
            f"--{of_run[0].name}={of_run[0].value}: is for a run, without --reverse; {source} "
            f"{'is one' if is_run else 'is none'}"
        )
    if is_run:
        (export.export_run if REVERSE.value else save_run)(source, target)
    else:
        convert = conversion.from_native if REVERSE.value else conversion.to_native
        convert(source, target)
    print(f"written: {TARGET.value}")


def save_run(source: pathlib.Path, target: pathlib.Path) -> None:
    """The run's weights as `Pipeline.save` writes them."""
    from contextdiff_jax.runs import saved
    from contextdiff_jax.runs.reading import load_run

    run = load_run(str(source), ema_length=EMA_LENGTH.value)
    options = {"dtype": DTYPE.value or "float32", "license": LICENSE.value}
    saved.save(run.settings, run.params, target, saved.Description(step=run.step), **options)


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-convert begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
