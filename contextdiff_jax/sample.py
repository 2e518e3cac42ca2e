"""python -m contextdiff_jax.sample --workdir=RUN --prompt="a large red circle" --num=4
python -m contextdiff_jax.sample --model=emoji --prompt="woman running, dark skin tone, 3d style"
python -m contextdiff_jax.sample --model=FOLDER --prompt="a horse" --negative="blurred"
python -m contextdiff_jax.sample --model=FOLDER --prompts_file=FILE --layout=geneval --images=DIR

Draw pictures for prompts. The model is a trained run, one that ships with the package, a Stable
Diffusion folder, or ORG/NAME of the hub. The pictures come as one grid with the prompts under them,
a run's by its EMA weights. All flags work for all of them; where one isn't given, the
model's own value counts. From noise; or from a picture, --image=FILE --strength=0.8; or into a hole
of it, --image=FILE --mask=FILE; an upsampler enlarges --image=FILE. --images=FOLDER writes each
picture alone too, with its prompt, seed, sampler, steps and guidance in the PNG's text. --layout
writes them alone, as a benchmark reads them, and goes on where it was killed.
--optimise_spacing=8 prints a grid of 8 steps that is made for the model.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.texts import read_lines

if TYPE_CHECKING:  # JAX starts after the flags are read
    from contextdiff_jax.inference import Pipeline

cli.group("Model and prompts")
WORKDIR = cli.define_path("workdir", None, "Folder of a trained run.")
MODEL = cli.define_path(
    "model",
    None,
    "Not --workdir: a model that ships with the package, by its name; a folder that Pipeline.save "
    "wrote; a Stable Diffusion folder (1.x, 2.x, XL, 3) or single .safetensors file; or "
    "ORG/NAME[@REVISION] of the hub, which is downloaded once.",
)
PROMPT = flags.DEFINE_multi_string("prompt", [], "A caption; may be given many times.")
PROMPTS_FILE = cli.define_path(
    "prompts_file", None, "A text file with one caption a line; with --layout its own."
)
NUM = flags.DEFINE_integer("num", 1, "Pictures a prompt.", lower_bound=1)
NEGATIVE = flags.DEFINE_string(
    "negative", None, "The text that guidance leads away from; default: none."
)
cli.group("Steps")
SAMPLER = flags.DEFINE_string("sampler", None, "Default: the run's or the folder's own.")
cli.list_names("sampler", {"one of": cli.SAMPLERS})
STEPS = flags.DEFINE_integer("steps", None, "Sampling steps; of a folder by default 50.")
SPACING = flags.DEFINE_string(
    "spacing",
    None,
    "Where the steps are: a name, or their times, as in 900,600,300,0 (floats on a path).",
)
cli.list_names("spacing", {"one of": cli.SPACINGS})
SPACING_FACTOR = cli.define_float("spacing_factor", None, "Of --spacing=sd3; default 3.")
OPTIMISE = flags.DEFINE_integer(
    "optimise_spacing",
    None,
    "Make no pictures: print the times of this many of the steps, for --spacing, whose errors for "
    "the prompts sum to the least.",
    lower_bound=1,
)
ETA = cli.define_float("eta", None, "DDIM's noise, 0 to 1.")
DYNAMIC_THRESHOLD = cli.define_float(
    "dynamic_threshold", None, "Percentile for dynamic thresholding; 0 clips."
)
REUSE = flags.DEFINE_integer(
    "reuse", None, "Steps that share the UNet's coarser levels (DeepCache): faster, not the same."
)
cli.group("Guidance and context")
GUIDANCE = cli.define_float(
    "guidance", None, "Guidance scale, 1 is none; of a folder by default 7.5."
)
GUIDANCE_RESCALE = cli.define_float(
    "guidance_rescale", None, "Share of the picture at its deviation without guidance, 0 to 1."
)
GUIDANCE_INTERVAL = flags.DEFINE_list(
    "guidance_interval",
    None,
    "LOW,HIGH: guidance only where the share of noise, b / (a + b), lies between; 0,1: always.",
)
PERPENDICULAR = cli.define_float(
    "perpendicular", None, "With --negative: weight of its part that is perpendicular to --prompt."
)
AUTOGUIDANCE = cli.define_path(
    "autoguidance", None, "Folder of a weaker model, which guidance leads away from."
)
CONTEXT_SCALE = cli.define_float("context_scale", None, "Factor of the context's estimate.")
cli.group("Seed, weights, size")
SEED = cli.define_seed("The same seed gives the same pictures.")
WEIGHTS = flags.DEFINE_string("weights", "ema", "A run's ema or params.")
EMA_LENGTH = cli.define_ema_length()
SIZE = flags.DEFINE_list(
    "size", None, "HEIGHT,WIDTH in pixels; default: the model's own, or --image's."
)
cli.group("From a picture")
IMAGE = cli.define_path("image", None, "The picture to start from.")
AUGMENTATION = cli.define_float(
    "augmentation",
    None,
    "Of an upsampler: level of the noise on --image, 0 (none) to 1; more makes up more.",
)
STRENGTH = cli.define_float(
    "strength", None, "With --image: share of the steps made; default 0.8, with --mask 1."
)
MASK = cli.define_path("mask", None, "With --image: paint anew where this picture is white.")
cli.group("Output")
OUT = cli.define_path("out", "grid.png", "The grid.")
IMAGES = cli.define_path("images", None, "A folder for the pictures one by one.")
LAYOUT = flags.DEFINE_string(
    "layout",
    None,
    "Whose files --prompts_file and --images are, without a grid: pictures are written as they "
    "come, and the same command goes on.",
)
cli.list_names("layout", {"one of": "contextdiff_jax.inference.layouts:LAYOUTS"})
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Pictures at once.", lower_bound=1)
COLUMNS = flags.DEFINE_integer("columns", 4, "Pictures a row.", lower_bound=1)
OPTIONS = (
    SAMPLER,
    STEPS,
    SPACING,
    SPACING_FACTOR,
    ETA,
    GUIDANCE,
    GUIDANCE_RESCALE,
    GUIDANCE_INTERVAL,
    CONTEXT_SCALE,
    DYNAMIC_THRESHOLD,
    REUSE,
    AUGMENTATION,
)


def read_prompts() -> list[str]:
    """The captions of --prompt and --prompts_file. ValueError if there are none, or one is blank or
    no Unicode.
    """
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
    return prompts


def read_size() -> tuple[int, int] | None:
    """(height, width) of --size."""
    size = SIZE.value
    if size is None:
        return None
    if len(size) != 2 or not all(side.isdecimal() for side in size):
        raise ValueError(f"--size={','.join(size)}: must be HEIGHT,WIDTH in pixels, as in 512,768")
    return int(size[0]), int(size[1])


def read_interval() -> tuple[float, float]:
    """The two numbers of --guidance_interval."""
    try:
        low, high = map(float, GUIDANCE_INTERVAL.value)
    except ValueError:
        given = ",".join(GUIDANCE_INTERVAL.value)
        raise ValueError(f"--guidance_interval={given}: must be LOW,HIGH, as in 0.2,0.8") from None
    return low, high


def check_flags() -> dict[str, Any]:
    """The sampling options that are given. ValueError for flags that don't fit together."""
    from contextdiff_jax.runtime.keys import check_seed
    from contextdiff_jax.settings import SampleConfig

    if MODEL.value and WORKDIR.value:
        raise ValueError(f"--model={MODEL.value}: can't be given with --workdir={WORKDIR.value}")
    if not (MODEL.value or WORKDIR.value):
        raise ValueError("--workdir: missing; name a run's folder, or --model=FOLDER")
    for flag in (MASK, STRENGTH):
        if flag.value is not None and IMAGE.value is None:
            raise ValueError(f"--{flag.name}={flag.value}: needs --image")
    check_seed(SEED.value, "--seed")
    if PERPENDICULAR.value and NEGATIVE.value is None:
        raise ValueError(f"--perpendicular={PERPENDICULAR.value}: needs --negative")
    if AUTOGUIDANCE.value and NEGATIVE.value is not None:
        raise ValueError(
            f"--negative={NEGATIVE.value}: isn't read with --autoguidance={AUTOGUIDANCE.value}"
        )
    options = {flag.name: flag.value for flag in OPTIONS if flag.value is not None}
    if GUIDANCE_INTERVAL.value is not None:
        options["guidance_interval"] = read_interval()
    # `reuse` must divide the steps, which only the run may know.
    SampleConfig(**options | {"reuse": min(options.get("reuse", 1), 1)})
    return options


def read_pictures(size: tuple[int, int] | None, count: int) -> dict[str, np.ndarray]:
    """`images` and `masks` of --image and --mask, once for each of the pictures to be made."""
    from contextdiff_jax.pretrained.command import read_picture

    read = {}
    if IMAGE.value is not None:
        image = np.asarray(read_picture(IMAGE.value, "RGB", size, "image"))
        read["images"] = np.tile(image, (count, 1, 1, 1))
    if MASK.value is not None:
        mask = np.asarray(read_picture(MASK.value, "L", image.shape[:2], "mask"), np.float32) / 255
        read["masks"] = np.tile(mask, (count, 1, 1))
    return read


def open_pipeline() -> Pipeline:
    """The model, with its programs kept beside a run, for all else in the user's cache."""
    from etils import epath

    from contextdiff_jax.inference import Pipeline

    # What --workdir names on the hub is the user's, too.
    beside = WORKDIR.value and (host.is_remote(WORKDIR.value) or os.path.isdir(WORKDIR.value))
    kept = epath.Path(WORKDIR.value) if beside else host.user_cache()
    programs = host.set_compilation_cache(kept)
    read = {"weights": WEIGHTS.value, "ema_length": EMA_LENGTH.value}
    return Pipeline.open(MODEL.value or WORKDIR.value, **read, programs=programs)


def guided(pipeline: Pipeline) -> Pipeline:
    """The pipeline, led away from --autoguidance's."""
    from contextdiff_jax.inference import Pipeline

    if not AUTOGUIDANCE.value:
        return pipeline
    return pipeline.guided_by(Pipeline.open(AUTOGUIDANCE.value, WEIGHTS.value))


def of_request() -> dict[str, Any]:
    """The options of a request that aren't of sampling."""
    return {
        "negative": NEGATIVE.value,
        "perpendicular": PERPENDICULAR.value,
        "seed": SEED.value,
        "batch_size": BATCH_SIZE.value,
    }


def fill_layout() -> None:
    """Writes a benchmark's samples, those that aren't there; many processes share them."""
    size, options = read_size(), check_flags()
    others = PROMPT.value or IMAGE.value or MASK.value or OPTIMISE.value
    if others or not PROMPTS_FILE.value:
        raise ValueError(
            f"--layout={LAYOUT.value}: reads --prompts_file alone; not --prompt, --image, --mask, "
            "--optimise_spacing"
        )
    folder = cli.output_folder("images", IMAGES.value)

    from contextdiff_jax.evaluation.shares import share
    from contextdiff_jax.inference import filling, layouts
    from contextdiff_jax.parallel import processes

    check_choice("--layout", LAYOUT.value, layouts.LAYOUTS)
    layout = layouts.LAYOUTS[LAYOUT.value]
    entries = layout.read(PROMPTS_FILE.value)
    if not entries:
        raise ValueError(f"--prompts_file={PROMPTS_FILE.value}: holds no prompts")
    processes.start(None, None, None, os.environ, processes.TIMEOUT)
    pipeline = guided(open_pipeline())
    prompts = [entry.prompt for entry in entries]
    options |= of_request() | {"size": size}
    filling.claim(
        folder,
        {
            "layout": LAYOUT.value,
            "prompts": filling.text_digest(prompts),
            "num": NUM.value,
            **filling.made_of(pipeline, options),
        },
    )
    if processes.is_first():
        layouts.write_metadata(layout, folder, entries)
    spots = layouts.spots(prompts, NUM.value)
    files = [folder / layout.picture(spot) for spot in spots]
    new = filling.fill(pipeline, [spot.prompt for spot in spots], files, share=share, **options)
    print(f"{len(files)} pictures of {pipeline.opened.source}: {folder} ({new} batches made now)")


def main() -> None:
    """Parses, opens, samples, draws."""
    if LAYOUT.value is not None:
        fill_layout()
        return
    prompts, size, options = read_prompts(), read_size(), check_flags()
    # Refused now, not when the pictures are made.
    out = cli.output_file("out", OUT.value, cli.PICTURES)
    folder = cli.output_folder("images", IMAGES.value) if IMAGES.value else None
    given = read_pictures(size, len(prompts) * NUM.value)

    from contextdiff_jax.runtime import pictures

    pipeline = open_pipeline()
    if OPTIMISE.value is not None:
        from contextdiff_jax.inference.optimised import optimised_spacing

        options |= {"negative": NEGATIVE.value, "seed": SEED.value, "size": size}
        times = optimised_spacing(pipeline, prompts, OPTIMISE.value, **options)
        print(f"--spacing={','.join(f'{t:.6g}' for t in times)}")
        return
    pipeline = guided(pipeline)
    made = dataclasses.asdict(pipeline.options(**options))  # before what isn't of sampling
    options |= of_request() | {"num": NUM.value}
    if "masks" in given:
        way, options = pipeline.inpaint, options | {"strength": STRENGTH.value}
    elif pipeline.opened.super_resolution.is_upsampler and given:
        if STRENGTH.value is not None:
            raise ValueError(f"--strength={STRENGTH.value}: an upsampler begins at noise")
        way = pipeline.upsample
    elif given:
        way, options = pipeline.image_to_image, options | {"strength": STRENGTH.value}
    else:
        way, options = pipeline.text_to_image, options | {"size": size}
    count = len(prompts) * NUM.value
    cli.LOGGER.info(
        "drawing %d pictures in %d steps; what is new is compiled first", count, made["steps"]
    )
    images = way(prompts, **given, **options)

    out.parent.mkdir(parents=True, exist_ok=True)
    captions = [prompt for prompt in prompts for _ in range(NUM.value)]
    pictures.caption_grid(images, captions, columns=COLUMNS.value).save(out)
    print(f"{len(images)} pictures of {pipeline.opened.source}: {out}")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    made = {flag.name: made[flag.name] for flag in OPTIONS}
    for flag in (NEGATIVE, PERPENDICULAR, AUTOGUIDANCE):
        if flag.value is not None:
            made[flag.name] = flag.value
    for i, (image, prompt) in enumerate(zip(images, captions, strict=True)):
        metadata = {"prompt": prompt, "seed": SEED.value, "index": i}
        metadata |= {"source": pipeline.opened.source, **made}
        pictures.save_png(image, folder / f"{i:04d}.png", metadata)
    print(f"each alone: {folder}")


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-sample begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
