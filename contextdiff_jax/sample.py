"""python -m contextdiff_jax.sample --workdir=RUN --prompt="a large red circle" --num=4
python -m contextdiff_jax.sample --model=emoji --prompt="woman running, dark skin tone, 3d style"
python -m contextdiff_jax.sample --model=FOLDER --prompt="a horse" --negative="blurred"
python -m contextdiff_jax.sample --model=FOLDER --prompts_file=FILE --layout=geneval --images=DIR
python -m contextdiff_jax.sample --cascade=BASE,UPSAMPLER --prompt="a dog" --steps=50,16

Draw pictures for prompts. The model is a trained run, one that ships with the package, a Stable
Diffusion folder, or ORG/NAME of the hub. The pictures come as one grid with the prompts under them,
a run's by its EMA weights. All flags work for all of them; where one isn't given, the model's own
value counts. From noise; or from a picture, --image=FILE --strength=0.8; or into a hole of it,
--image=FILE --mask=FILE; an upsampler enlarges --image=FILE. --cascade draws with its first part
and enlarges with the others; the flags of steps, guidance and batches then take one value for all
stages or, with commas between, one for each (empty: its own). --images=FOLDER writes each picture
alone too, with its prompt, seed, sampler, steps and guidance in the PNG's text. --layout writes
them alone, as a benchmark reads them, and goes on where it was killed. --optimise_spacing=8 prints
a grid of 8 steps that is made for the model.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from contextdiff_jax import cli
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.texts import read_prompts

if TYPE_CHECKING:  # JAX starts after the flags are read
    from contextdiff_jax.inference import Pipeline
    from contextdiff_jax.inference.cascade import Cascade
    from contextdiff_jax.inference.pipeline import Pictures

cli.group("Model and prompts")
WORKDIR = cli.define_path("workdir", None, "Folder of a trained run.")
MODEL = cli.define_path(
    "model",
    None,
    "Not --workdir: a model that ships with the package, by its name; a folder that Pipeline.save "
    "wrote; a Stable Diffusion folder (1.x, 2.x, XL, 3) or single .safetensors file; or "
    "ORG/NAME[@REVISION] of the hub, which is downloaded once.",
)
CASCADE = flags.DEFINE_list(
    "cascade",
    None,
    "Not --model: BASE,UPSAMPLER[,UPSAMPLER], each a run's folder or what --model takes.",
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
TILE = cli.define_count("tile", None, "Of an upsampler: pixels a side of its network's tiles.")
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
BATCH_SIZE = cli.define_count("batch_size", 64, "Pictures at once.")
COLUMNS = flags.DEFINE_integer("columns", 4, "Pictures a row.", lower_bound=1)
STAGES = flags.DEFINE_boolean(
    "stages", False, "With --cascade: the smaller stages' pictures too, in --images/HEIGHTxWIDTH."
)
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
for each in OPTIONS:  # a list of times, and an interval, have commas themselves
    cli.for_stages(each, "/" if each.name in ("spacing", "guidance_interval") else ",")


def read_size() -> tuple[int, int] | None:
    """(height, width) of --size."""
    size = SIZE.value
    if size is None:
        return None
    if len(size) != 2 or not all(side.isdecimal() for side in size):
        raise ValueError(f"--size={','.join(size)}: must be HEIGHT,WIDTH in pixels, as in 512,768")
    return int(size[0]), int(size[1])


def read_interval(given: list[str]) -> tuple[float, float]:
    """The two numbers of --guidance_interval."""
    try:
        low, high = map(float, given)
    except ValueError:
        text = ",".join(given)
        raise ValueError(f"--guidance_interval={text}: must be LOW,HIGH, as in 0.2,0.8") from None
    return low, high


def read_options() -> dict[str, Any]:
    """The sampling options that are given; of a cascade's stages as lists."""
    options = {flag.name: flag.value for flag in OPTIONS if flag.value is not None}
    interval = options.get("guidance_interval")
    if isinstance(interval, cli.PerStage):
        read = [each and read_interval(each) for each in interval]
        options["guidance_interval"] = cli.PerStage(read)
    elif interval is not None:
        options["guidance_interval"] = read_interval(interval)
    return options


def check_flags() -> dict[str, Any]:
    """The sampling options that are given. ValueError for flags that don't fit together."""
    from contextdiff_jax.runtime.keys import check_seed
    from contextdiff_jax.settings import SampleConfig

    options = read_options()
    stages = (check_one_model if CASCADE.value is None else check_cascade)(options)
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
    for own in stages:  # `reuse` must divide the steps, which only the run may know.
        SampleConfig(**own | {"reuse": min(own.get("reuse", 1), 1)})
    return options


def check_one_model(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options, as of one stage. Raises ValueError unless one model is named, and for flags of
    a cascade.
    """
    if MODEL.value and WORKDIR.value:
        raise ValueError(f"--model={MODEL.value}: can't be given with --workdir={WORKDIR.value}")
    if not (MODEL.value or WORKDIR.value):
        raise ValueError("--workdir: missing; name a run's folder, or --model=FOLDER")
    for flag in (*OPTIONS, BATCH_SIZE, TILE):
        if isinstance(flag.value, cli.PerStage):
            raise ValueError(f"--{flag.name}: several values are for the stages of --cascade")
    if STAGES.value:
        raise ValueError("--stages: needs --cascade")
    return [options]


def check_cascade(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of each stage. Raises ValueError for flags that aren't of a cascade."""
    from contextdiff_jax.inference.cascade import split_options

    for flag in (MODEL, WORKDIR, IMAGE, MASK, STRENGTH, AUTOGUIDANCE, OPTIMISE):
        if flag.value is not None:
            raise ValueError(f"--{flag.name}={flag.value}: can't be given with --cascade")
    if STAGES.value and not (IMAGES.value and LAYOUT.value is None):
        raise ValueError("--stages: needs --images, a folder for the pictures without --layout")
    if LAYOUT.value is not None and isinstance(BATCH_SIZE.value, cli.PerStage):
        raise ValueError("--batch_size: with --layout one value for all stages")
    count = len(CASCADE.value)
    split_options({"batch_size": BATCH_SIZE.value, "tile": TILE.value}, count)
    return split_options(options, count)


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


def open_pipeline() -> Pipeline | Cascade:
    """The model, or the cascade, with its programs kept beside a run, for all else in the user's
    cache.
    """
    from etils import epath

    from contextdiff_jax.inference import Pipeline

    # What --workdir names on the hub is the user's, too.
    beside = WORKDIR.value and (host.is_remote(WORKDIR.value) or os.path.isdir(WORKDIR.value))
    kept = epath.Path(WORKDIR.value) if beside else host.user_cache()
    programs = host.set_compilation_cache(kept)
    read = {"weights": WEIGHTS.value, "ema_length": EMA_LENGTH.value}
    if CASCADE.value is not None:
        parts = [cli.expand(part, "--cascade") for part in CASCADE.value]
        return Pipeline.cascade(parts, **read, programs=programs)
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
        "tile": TILE.value,
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
    entries = layouts.LAYOUTS[LAYOUT.value].read(PROMPTS_FILE.value)
    if not entries:
        raise ValueError(f"--prompts_file={PROMPTS_FILE.value}: holds no prompts")
    processes.start(None, None, None, os.environ, processes.TIMEOUT)
    pipeline = guided(open_pipeline())
    options |= of_request() | {"size": size}
    count, new = filling.fill_layout(
        pipeline, LAYOUT.value, entries, NUM.value, folder, share=share, **options
    )
    print(f"{count} pictures of {pipeline.source}: {folder} ({new} batches made now)")


def draw(
    pipeline: Pipeline,
    prompts: list[str],
    size: tuple[int, int] | None,
    given: dict[str, np.ndarray],
    options: dict[str, Any],
) -> Pictures:
    """The pictures of one model, of `size` from noise, or from those `given`."""
    strength = {"strength": STRENGTH.value}
    if "masks" in given:
        way, options = pipeline.inpaint, options | strength
    elif pipeline.opened.super_resolution.is_upsampler and given:
        if STRENGTH.value is not None:
            raise ValueError(f"--strength={STRENGTH.value}: an upsampler begins at noise")
        way = pipeline.upsample
    elif given:
        way, options = pipeline.image_to_image, options | strength
    else:
        way, options = pipeline.text_to_image, options | {"size": size}
    return way(prompts, **given, **options)


def main() -> None:
    """Parses, opens, samples, draws."""
    if LAYOUT.value is not None:
        fill_layout()
        return
    prompts = read_prompts(PROMPT.value, PROMPTS_FILE.value)
    size, options = read_size(), check_flags()
    # Refused now, not when the pictures are made.
    out = cli.output_file("out", OUT.value, cli.PICTURES)
    folder = cli.output_folder("images", IMAGES.value) if IMAGES.value else None
    count = len(prompts) * NUM.value
    given = read_pictures(size, count)

    from contextdiff_jax.runtime import pictures

    pipeline = open_pipeline()
    if OPTIMISE.value is not None:
        from contextdiff_jax.inference.optimised import optimised_spacing

        options |= {"negative": NEGATIVE.value, "seed": SEED.value, "size": size}
        times = optimised_spacing(pipeline, prompts, OPTIMISE.value, **options)
        print(f"--spacing={','.join(f'{t:.6g}' for t in times)}")
        return
    captions = [prompt for prompt in prompts for _ in range(NUM.value)]
    wanted = of_request() | {"num": NUM.value}
    made = {f.name: f.value for f in (NEGATIVE, PERPENDICULAR, AUTOGUIDANCE) if f.value is not None}
    made |= {"seed": SEED.value}
    if CASCADE.value is not None:
        from contextdiff_jax.inference.cascade import draw_into

        keep = {"folder": folder, "every_stage": STAGES.value, "made": made}
        images = draw_into(pipeline, prompts, **keep, size=size, **options, **wanted)
    else:
        pipeline = guided(pipeline)
        chosen = pipeline.options(**options)
        said = "drawing %d pictures in %d steps; what is new is compiled first"
        cli.LOGGER.info(said, count, chosen.steps)
        images = draw(pipeline, prompts, size, given, options | wanted)
        if folder is not None:
            made |= {"source": pipeline.source}
            made |= {flag.name: getattr(chosen, flag.name) for flag in OPTIONS}
            pictures.save_each(images, captions, folder, made)

    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.caption_grid(images, captions, columns=COLUMNS.value).save(out)
    print(f"{len(images)} pictures of {pipeline.source}: {out}")
    if folder is not None:
        print(f"each alone: {folder}")


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-sample begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
