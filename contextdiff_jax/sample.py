"""python -m contextdiff_jax.sample --workdir=DIR --prompt="a large red circle" [--prompt=...]
--num=4 --out=grid.png python -m contextdiff_jax.sample --model=FOLDER --prompt="..."
[--negative=... --image=FILE --strength=0.8 --mask=FILE]

Pictures for prompts, from a run's EMA weights or from a Stable Diffusion folder, as one grid with
the prompts under them; --images=FOLDER writes each alone too, with its prompt, seed, sampler, steps
and guidance in the PNG's text.
"""

from __future__ import annotations

import dataclasses

from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.texts import read_lines

WORKDIR = cli.define_path("workdir", None, "Folder of a trained run.")
MODEL = cli.define_path(
    "model",
    None,
    "A Stable Diffusion folder (1.x, 2.x, XL) or single .safetensors file, instead of --workdir.",
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A caption; may be given many times.")
PROMPTS_FILE = cli.define_path("prompts_file", None, "A text file with one caption a line.")
NUM = flags.DEFINE_integer("num", 1, "Pictures a prompt.", lower_bound=1)
SAMPLER = flags.DEFINE_string(
    "sampler", None, "ddim or ddpm; default: the run's config. With --model: ddim."
)
STEPS = flags.DEFINE_integer(
    "steps", None, "Sampling steps; default: the run's config. With --model: 50."
)
ETA = cli.define_float(
    "eta", None, "DDIM's noise, 0 to 1; default: the run's config. With --model: 0."
)
GUIDANCE = cli.define_float(
    "guidance", None, "Guidance scale, 1 is none; default: the run's. With --model: 7.5."
)
REUSE = flags.DEFINE_integer(
    "reuse", None, "Steps that share the UNet's coarser levels (DeepCache): faster, not the same."
)
SEED = cli.define_seed("The same seed gives the same pictures.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "ema or params.")
OUT = cli.define_path("out", "grid.png", "The grid.")
IMAGES = cli.define_path("images", None, "A folder for the pictures one by one.")
COLUMNS = flags.DEFINE_integer("columns", 4, "Pictures a row.", lower_bound=1)
NEGATIVE = flags.DEFINE_string(
    "negative", None, "With --model: the text that guidance leads away from; default: none."
)
SIZE = flags.DEFINE_list(
    "size", None, "With --model: HEIGHT,WIDTH; default: the model's, or --image's."
)
IMAGE = cli.define_path("image", None, "With --model: the picture to start from.")
STRENGTH = cli.define_float(
    "strength", None, "With --image: share of the steps made; default 0.8, with --mask 1."
)
MASK = cli.define_path("mask", None, "With --image: paint anew where this picture is white.")
OF_MODELS = (NEGATIVE, SIZE, IMAGE, STRENGTH, MASK)


def from_run(prompts: list[str]):
    """(pictures, how they were made, of which step)."""
    from etils import epath

    from contextdiff_jax.generation import Generator
    from contextdiff_jax.parallel.mesh import local_mesh
    from contextdiff_jax.run import load_run
    from contextdiff_jax.settings import SampleConfig

    for flag in OF_MODELS:
        if flag.value is not None:
            raise ValueError(f"--{flag.name}={flag.value}: needs --model")
    given = {
        "sampler": SAMPLER.value,
        "steps": STEPS.value,
        "eta": ETA.value,
        "guidance": GUIDANCE.value,
        "reuse": REUSE.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    SampleConfig(
        **given | {"reuse": 1}
    )  # refuses a wrong flag before a checkpoint is read; reuse divides the run's steps
    run = load_run(WORKDIR.value, WEIGHTS.value)
    options = dataclasses.replace(run.settings.sample, **given)
    folder = cli.set_compilation_cache(epath.Path(WORKDIR.value))
    generator = Generator(run.settings, run.tokenizer, options, mesh=local_mesh(), programs=folder)
    images = generator(run.params, prompts, SEED.value)
    made = {
        name: getattr(options, name) for name in ("sampler", "steps", "eta", "guidance", "reuse")
    }
    return images, made, f"step {run.step}"


def from_model(prompts: list[str]):
    """(pictures, how they were made, of which folder): text to image, or from --image, or inside
    its --mask.
    """
    from contextdiff_jax.pretrained.command import FolderRequest, sample_folder

    if WORKDIR.value:
        raise ValueError(f"--model={MODEL.value}: can't be given with --workdir={WORKDIR.value}")
    made = {
        "sampler": SAMPLER.value or "ddim",
        "steps": 50 if STEPS.value is None else STEPS.value,
        "eta": ETA.value or 0.0,
        "guidance": 7.5 if GUIDANCE.value is None else GUIDANCE.value,
        "reuse": 1 if REUSE.value is None else REUSE.value,
    }
    request = FolderRequest(
        **made,
        negative=NEGATIVE.value,
        size=SIZE.value,
        image=IMAGE.value,
        mask=MASK.value,
        strength=STRENGTH.value,
        seed=SEED.value,
    )
    return sample_folder(MODEL.value, prompts, request), made, MODEL.value


def main() -> None:
    """Parses, samples, draws."""
    prompts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        prompts += read_lines(PROMPTS_FILE.value, "--prompts_file")
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(
            "--prompt: the list is empty; give at least one, as in --prompt='a large red circle'"
        )
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
            raise ValueError(f"--prompt={prompt!a}: is not UTF-8") from None
    prompts = [prompt for prompt in prompts for _ in range(NUM.value)]
    # Refused now, not when the pictures are made.
    out = cli.output_file("out", OUT.value, cli.PICTURES)
    folder = cli.output_folder("images", IMAGES.value) if IMAGES.value else None
    images, made, source = from_model(prompts) if MODEL.value else from_run(prompts)

    from contextdiff_jax import pictures

    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.caption_grid(images, prompts, columns=COLUMNS.value).save(out)
    print(f"{len(images)} pictures of {source}: {out}")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            metadata = {"prompt": prompt, "seed": SEED.value, "index": i, "source": source, **made}
            pictures.save_png(image, folder / f"{i:04d}.png", metadata)
        print(f"each alone: {folder}")


if __name__ == "__main__":
    cli.run(main)
