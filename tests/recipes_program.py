"""The recipes of docs/extending.md, followed in a copy of the package that this process imports:
each new name does its work, and is in the help and in the errors by itself.

    python recipes_program.py COPY '{"section.field": value, ...}'
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from command_flags import flags_of, parse

import contextdiff_jax
from contextdiff_jax import data, diffusion, settings
from contextdiff_jax.configs import stripes
from contextdiff_jax.data import load_tokenizer, make_loader, make_source
from contextdiff_jax.evaluation import metrics
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.parallel import mesh
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.training.state import init_state

COPY, TINY = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
assert pathlib.Path(contextdiff_jax.__file__).is_relative_to(COPY), contextdiff_jax.__file__


def refused(call, *words: str) -> None:
    """Asks for one line with the words."""
    try:
        call()
    except ValueError as error:
        line = str(error)
    else:
        raise AssertionError(f"not refused; wanted {words}")
    assert "\n" not in line and all(word in line for word in words), line


def with_field(name: str, value: object) -> dict:
    """The recipe's config, with another value."""
    config = stripes.get_config()
    config.update_from_flattened_dict(TINY | {name: value})
    return config.to_dict()


def read_help(command: str, flag: str) -> str:
    """What `--help` prints under the flag."""
    with flags_of(COPY / "contextdiff_jax" / f"{command}.py") as flags:
        return f"{flags[flag].help} {flags[flag].parser.syntactic_help}"


made = settings.parse(with_field("seed", 0))

# The help and the errors.
for command, flag, names in (
    ("sample", "sampler", ["multistep", "adams"]),
    ("evaluate", "sampler", ["multistep", "adams"]),
    ("evaluate", "metrics", ["brightness"]),
    ("train", "config", ["multistep", "cache, stripes", "gated", "gates", "shapes_two, stripes"]),
):
    assert all(name in read_help(command, flag) for name in names), (command, flag)
refused(
    lambda: settings.parse(with_field("sample.sampler", "none such")), "unipc, adams, multistep"
)
refused(lambda: settings.parse(with_field("context.kind", "none such")), "cross_attention", "gated")
refused(lambda: mesh.MeshConfig(rules={"none such": "data"}), "batch, rows", "gates")
refused(lambda: make_source(data.DataConfig(source="none such")), "shapes, folder", "stripes")
parse(
    COPY / "contextdiff_jax/train.py",
    ["--config=configs/stripes.py", "--workdir=x", "--config.mesh.rules.gates=data"],
)

# The source.
records = make_source(made.data)
length = made.data.max_length
batch = next(make_loader(records, batch_size=4, tokenizer=load_tokenizer(), max_length=length))
assert batch["image"].shape == (4, 16, 16, 3) and len(records) == 224
assert len(make_source(made.data, "heldout")) == 32

# The context kind and the axis rule.
abstract = jax.eval_shape(lambda: init_state(made).params)
rng = np.random.default_rng(0)
params = jax.tree.map(lambda a: rng.normal(scale=0.1, size=a.shape).astype(a.dtype), abstract)


@jax.jit
def relate(params, ids, mask):
    model = build_model(model_graph(made), params)
    return model.relate(jnp.ones((2, 16, 16, 3)), model.encode(ids, mask), jnp.zeros(2, int))


r = np.asarray(relate(params, *load_tokenizer().encode(["stripes", "a circle"], length)))
assert 0 < np.abs(r[0] - r[1]).max() and np.isfinite(r).all()
devices = mesh.make_mesh(mesh.MeshConfig(data=1, tensor=2))
places = mesh.state_shardings(devices, params, made.mesh.rules)
spec = places["context"]["raw"]["gate"]["kernel"].get_value().spec
assert tuple(spec) == (None, "tensor"), spec

# The solver: exact where the data prediction is linear in l = log(a / b), which 2M isn't.
flow = diffusion.make_schedule("flow")
grid, x_T = diffusion.time_grid(flow, 8, "logsnr"), jnp.ones((1, 1))
first, last = (np.log((1 - t) / t) for t in np.asarray(grid, np.float64)[[0, -1]])


def linear_in_log_ratio(x, t, s):
    x0 = jnp.where(s[0] == 0, x, jnp.log((1 - t[0]) / t[0]))  # the last step shows x
    return diffusion.Denoised(x0, 0 * x, 0 * x)


noise = [1 / (1 + np.exp(at)) for at in (first, last)]
moved = (last - 1) * np.exp(last) - (first - 1) * np.exp(first)  # of x / b, by integration
exact = noise[1] * (1 / noise[0] + moved)
errors = [
    abs(
        float(diffusion.get_sampler(name)(linear_in_log_ratio, x_T, flow, grid, shift="none")[0, 0])
        - exact
    )
    for name in ("adams", "dpmpp_2m")
]
assert errors[0] < 0.1 * errors[1], errors

# The sampler, in a pipeline; then the metric, of its pictures.
pipeline = of_run(made, load_tokenizer(), params)
refused(lambda: pipeline.text_to_image(["stripes"], reuse=2), "'multistep'", "reuse", "ddpm, ddim")
pictures = np.zeros((1, 16, 16, 3), np.uint8)
refused(
    lambda: pipeline.inpaint(["stripes"], pictures, np.ones((1, 16, 16))), "'multistep'", "inpaint"
)
evaluation = metrics.Evaluation(
    settings=made,
    tokenizer=load_tokenizer(),
    graph=model_graph(made),
    params=params,
    generate=lambda captions, first: pipeline.text_to_image(captions, first=first),
    features="",
    num=2,
)
metrics.check(["brightness"], evaluation)
scores = metrics.METRICS["brightness"](evaluation).scores
assert scores and all(0 < row["brightness"].value < 1 for row in scores.values()), scores
