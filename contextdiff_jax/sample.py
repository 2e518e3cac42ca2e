"""python -m contextdiff_jax.sample --workdir=DIR --prompt="a large red circle" [--prompt=...] --num=4 --out=grid.png

Pictures for prompts, from a run's EMA weights, as one grid with the prompts under them; --images=FOLDER writes each
alone too, with its prompt, seed, sampler, steps and guidance in the PNG's text.
"""

from __future__ import annotations

import dataclasses
import pathlib

from absl import flags

from contextdiff_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A caption; may be given many times.")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file with one caption a line.")
NUM = flags.DEFINE_integer("num", 1, "Pictures a prompt.", lower_bound=1)
SAMPLER = flags.DEFINE_string("sampler", None, "ddim or ddpm; default: the run's config.")
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; default: the run's config.")
ETA = flags.DEFINE_float("eta", None, "DDIM's noise, 0 to 1; default: the run's config.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale, 1 is none; default: the run's config.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same pictures.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "ema or params.")
OUT = flags.DEFINE_string("out", "grid.png", "The grid.")
IMAGES = flags.DEFINE_string("images", None, "A folder for the pictures one by one.")
COLUMNS = flags.DEFINE_integer("columns", 4, "Pictures a row.", lower_bound=1)


def main() -> None:
    """Parses, samples, draws."""
    prompts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        prompts += [line.strip() for line in pathlib.Path(PROMPTS_FILE.value).read_text().splitlines() if line.strip()]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt: the list is empty; give at least one, as in --prompt='a large red circle'")

    from contextdiff_jax import pictures
    from contextdiff_jax.generation import Generator
    from contextdiff_jax.run import load_run
    from contextdiff_jax.settings import SampleConfig

    given = {"sampler": SAMPLER.value, "steps": STEPS.value, "eta": ETA.value, "guidance": GUIDANCE.value}
    given = {name: value for name, value in given.items() if value is not None}
    SampleConfig(**given)  # refuses a wrong flag before a checkpoint is read
    run = load_run(WORKDIR.value, WEIGHTS.value)
    options = dataclasses.replace(run.settings.sample, **given)
    prompts = [prompt for prompt in prompts for _ in range(NUM.value)]
    cli.set_compilation_cache(pathlib.Path(WORKDIR.value))
    images = Generator(run.settings, run.tokenizer, options)(run.params, prompts, SEED.value)

    out = pathlib.Path(OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.caption_grid(images, prompts, columns=COLUMNS.value).save(out)
    print(f"{len(images)} pictures of step {run.step}: {out}")
    if IMAGES.value:
        folder = pathlib.Path(IMAGES.value)
        folder.mkdir(parents=True, exist_ok=True)
        common = {name: getattr(options, name) for name in ("sampler", "steps", "eta", "guidance")}
        for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            metadata = {"prompt": prompt, "seed": SEED.value, "index": i, "step": run.step, **common}
            pictures.save_png(image, folder / f"{i:04d}.png", metadata)
        print(f"each alone: {folder}")


if __name__ == "__main__":
    cli.run(main)
