"""Plans and their cells, the tables against numpy, the toy whose answer is known, the oracle."""

import dataclasses
import functools
import json
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALLEST, command, config_dict, random_params
from flax import nnx

from contextdiff_jax import diffusion
from contextdiff_jax.data import load_tokenizer, make_source
from contextdiff_jax.experiments import results, toy, trained
from contextdiff_jax.experiments.estimates import estimate_cell, measure
from contextdiff_jax.experiments.finished import add_finished, read_finished
from contextdiff_jax.experiments.oracle import OracleGenerator, scaled
from contextdiff_jax.experiments.plan import Plan, load_plan
from contextdiff_jax.inference.opening import run_steps
from contextdiff_jax.inference.pipeline import method_of
from contextdiff_jax.inference.sampling import Text, make_sample
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.settings import parse

PLAN = Plan(
    title="t",
    about="a",
    kind="toy",
    config={"seed": 0, "a": {"b": 1}},
    variants={"none": {}, "more": {"a.b": 2}},
    headline={"score": "x/y"},
    seeds=2,
    more_seeds={"none": 3},
)


def test_cells_come_seed_by_seed_and_their_folder_follows_config_and_options():
    cells = list(PLAN.cells())
    assert [cell.name for cell in cells] == ["none-0", "more-0", "none-1", "more-1", "none-2"]
    assert cells[1].config == {"seed": 0, "a": {"b": 2}} and PLAN.config["a"]["b"] == 1
    folders = [cell.folder for cell in cells]
    assert len(set(folders)) == 5 and folders == [cell.folder for cell in PLAN.cells()]
    assert dataclasses.replace(PLAN, options={"num": 3}).cell("none", 0).folder != folders[0]


def test_a_plan_that_names_what_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="more: a.c is no field"):
        dataclasses.replace(PLAN, variants={"none": {}, "more": {"a.c": 1}}).cell("more", 0)
    with pytest.raises(ValueError, match="unknown; one of none, more"):
        PLAN.cell("other", 0)
    with pytest.raises(ValueError, match="baselines='gone': unknown; one of none, more"):
        dataclasses.replace(PLAN, baselines=("gone",))
    with pytest.raises(ValueError, match="kind='gone': unknown; one of pictures, estimates, toy"):
        dataclasses.replace(PLAN, kind="gone")
    with pytest.raises(ValueError, match="no such file"):
        load_plan(str(tmp_path / "gone.py"))


def test_every_plan_of_the_project_has_configs_that_parse():
    for name in ("shapes_one", "shapes", "shapes_gpu", "emoji"):
        plan = load_plan(f"configs/experiments/{name}.py")
        assert {"none", "plugin", "posterior_mean"} <= set(plan.variants)
        for variant in plan.variants:
            parse(plan.cell(variant, 0).config)


@pytest.mark.parametrize(
    "name, count",
    [
        ("shapes_one", 70),
        ("shapes", 21),
        ("shapes_gpu", 7),
        ("emoji", 18),
        ("estimates", 15),
        ("toy", 80),
    ],
)
def test_the_finished_cells_are_of_the_plan_as_it_is_now(name, count):
    """A config's new field must not make finished experiments those of another one."""
    path = ROOT / "docs" / "results" / f"{name}.jsonl"
    found = results.read_results(load_plan(f"configs/experiments/{name}.py"), path)
    assert sum(map(len, found.values())) == count == len(read_finished(path))


def test_a_cells_name_stays_when_a_default_changes():
    """Its run's folder: another name would train what is trained already."""
    plan = load_plan("configs/experiments/shapes_one.py")
    assert plan.cell("none", 0).folder == "none-0-c13f8051e1c0"
    assert plan.cell("linear-gain0.4", 3).folder == "linear-gain0.4-3-319daefa3d5d"


def toy_plan(**config):
    return dataclasses.replace(PLAN, config=config, variants={"none": {}}, more_seeds={})


def line_of(cell, **values):
    return {
        field: getattr(cell, field) for field in ("variant", "seed", "config", "options")
    } | values


@pytest.mark.parametrize(
    "stored, asked, same",
    [
        ({"width": 8}, {"width": 8}, True),
        ({"width": 8}, {"width": 9}, False),
        ({}, {"head_width": 0}, True),  # a new field at its default
        ({}, {"head_width": 2}, False),
        ({"width": 128}, {}, True),
        ({"width": 8}, {}, False),
        ({"gone": 0}, {}, False),  # nobody knows what it did
        ({"width": (1, 2)}, {"width": [1, 2]}, True),
    ],
)
def test_a_finished_cell_is_of_a_plan_with_the_same_fields_those_unnamed_at_their_defaults(
    stored, asked, same, tmp_path
):
    old, new = (toy_plan(seed=0, **fields).cell("none", 0) for fields in (stored, asked))
    path = tmp_path / "t.jsonl"
    add_finished(path, line_of(old))
    assert (new.result(path) is not None) == same == (new.folder == old.folder)
    assert dataclasses.replace(new, options={"num": 3}).result(path) is None


def test_how_the_same_step_is_computed_makes_no_other_cell():
    plan = dataclasses.replace(PLAN, kind="pictures", config={"seed": 0, "train": {"steps": 3}})
    plan = dataclasses.replace(plan, variants={"none": {}}, more_seeds={})
    other = dataclasses.replace(plan, config={"seed": 0, "train": {"steps": 3, "remat": "blocks"}})
    assert plan.cell("none", 0).made(line_of(other.cell("none", 0)))


def test_cells_that_finish_at_once_lose_no_line_and_each_has_one(tmp_path):
    path, cells = tmp_path / "t.jsonl", [toy_plan(seed=0).cell("none", n) for n in range(8)]
    with ThreadPoolExecutor(len(cells)) as pool:  # each opens the lock itself, as a process does
        lines = [line_of(cell, scores=[1 / 3] * 9999) for cell in cells]
        list(pool.map(functools.partial(add_finished, path), lines))
    assert sorted(line["seed"] for line in read_finished(path)) == list(range(8))
    before = path.read_text().splitlines()
    first = read_finished(path)[0]
    add_finished(path, first | {"scores": []})
    assert path.read_text().splitlines()[:-1] == before[1:]  # the others as they were, to the bit
    assert [line["seed"] for line in read_finished(path)].count(first["seed"]) == 1


@pytest.mark.parametrize("tail", ['{"variant": "none", "se', "[1]", '{"variant": "none"}', "<<<<"])
def test_a_line_that_is_no_cell_is_named_and_nothing_is_written_over_it(tail, tmp_path):
    path, cell = tmp_path / "t.jsonl", toy_plan(seed=0).cell("none", 0)
    path.write_text(json.dumps(line_of(cell)) + "\n" + tail)
    written = path.read_bytes()
    for call in (lambda: read_finished(path), lambda: add_finished(path, line_of(cell))):
        with pytest.raises(ValueError, match="t.jsonl:2: not a finished cell; without this line"):
            call()
    assert path.read_bytes() == written


def test_a_cell_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path, cell = tmp_path / "t.jsonl", toy_plan(seed=0).cell("none", 0)
    add_finished(path, line_of(cell))
    written = path.read_bytes()
    with pytest.raises(TypeError):
        add_finished(path, line_of(cell, scores=object()))
    assert path.read_bytes() == written


def exact_tv(kind, estimate):
    config = dict(seed=0, denoiser="exact", kind=kind, shift="quadratic", estimate=estimate)
    cell = Plan(
        title="",
        about="",
        kind="toy",
        config=config,
        variants={"none": {}},
        headline={},
        options=dict(num=400, bound=2, samplers={"ddim": 50}),
    ).cell("none", 0)
    return toy.toy_cell(cell, None)["scores"]["ddim"]["tv"]


def test_the_exact_denoisers_estimates_are_those_of_numpy():
    schedule, context = diffusion.make_schedule("cosine"), toy.fixed_context("sine")
    positions, weights, classes = toy.points()
    x_t, t, c = np.random.default_rng(0).normal(size=(5, 2)), np.full(5, 400), np.arange(5)
    x0, r = toy.exact_estimates(schedule, context, "quadratic")(
        jnp.asarray(x_t, jnp.float32), jnp.asarray(t), jnp.asarray(c)
    )
    contexts = np.asarray(
        context(jnp.asarray(positions, jnp.float32), jnp.zeros(25, int)), np.float64
    )
    abar = float(schedule.alphas_cumprod[400])
    a = np.sqrt(abar)
    for i in range(5):
        mine = classes == c[i]
        means = a * positions[mine] + a * (1 - a) * contexts[mine]
        p = weights[mine] * np.exp(-((x_t[i] - means) ** 2).sum(-1) / (2 * (1 - abar)))
        np.testing.assert_allclose(x0[i], p @ positions[mine] / p.sum(), atol=1e-4)
        np.testing.assert_allclose(r[i], p @ contexts[mine] / p.sum(), atol=1e-3)


def test_with_the_exact_denoiser_plugin_needs_a_linear_context_and_posterior_mean_none():
    floor = exact_tv("none", "plugin")
    assert exact_tv("linear", "plugin") < 2 * floor
    assert exact_tv("sine", "posterior_mean") < 2 * floor
    assert exact_tv("sine", "plugin") > 3 * floor


def test_the_oracle_at_gain_0_is_the_sampler_and_otherwise_reads_the_picture():
    settings = parse(config_dict(**SMALLEST, **{"sample.guidance": 2.0}))
    tokenizer, records = (
        load_tokenizer(None),
        [make_source(settings.data, "train")[i] for i in range(2)],
    )
    model = nnx.merge(model_graph(settings), random_params(settings))
    model.context.gamma[...] = jnp.asarray(0.0)
    oracle = OracleGenerator(settings, tokenizer, settings.sample)
    plain = oracle(nnx.state(model, nnx.Param), records, 0)
    other = [record | {"image": 255 - record["image"]} for record in records]
    np.testing.assert_array_equal(plain, oracle(nnx.state(model, nnx.Param), other, 0))
    model.context.gamma[...] = jnp.asarray(3.0)
    params = nnx.state(model, nnx.Param)
    assert (oracle(params, records, 0) != oracle(params, other, 0)).mean() > 0.1
    # At gain 0 it's the plain sampler, with the oracle's own noise.
    model.context.gamma[...] = jnp.asarray(0.0)
    sample = make_sample(settings.process, method_of(settings.sample))
    steps = run_steps(settings.process.schedule, settings.sample)
    ids, mask = tokenizer.encode(
        [record["caption"] for record in records], settings.data.max_length
    )
    null = tokenizer.encode([""], settings.data.max_length)
    noise_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    noise = jax.random.normal(noise_key, (2, 16, 16, 3))
    x0 = nnx.jit(sample)(model, noise, Text(ids, mask, *null), steps, jnp.float32(2.0), step_key)
    expected = np.round((np.clip(x0, -1, 1) + 1) * 127.5)
    assert np.abs(plain.astype(int) - expected.astype(int)).max() <= 1


def test_the_coefficient_is_that_of_the_least_squares_line_and_1_where_the_context_is_known():
    timesteps = jnp.array([49, 20])

    def measured(kind, num=3):
        settings = parse(config_dict(**SMALLEST, **{"context.kind": kind, "context.max_gain": 8.0}))
        records = [make_source(settings.data, "train")[i] for i in range(num)]
        params = random_params(settings)
        return measure(settings, params, load_tokenizer(None), records, timesteps, 0)

    known = measured("text")  # r_hat is r: neither reads a picture
    np.testing.assert_allclose(known["error"], 0, atol=1e-6)
    np.testing.assert_allclose(known["coefficient"], 1, rtol=1e-6)
    found = measured("linear")
    assert (found["error"] > 0.01).all()
    # |r_hat - r|^2 = |r|^2 + |r_hat|^2 - 2 <r, r_hat>, all three measured by themselves.
    product = (found["true"] ** 2 + found["estimate"] ** 2 - found["error"] ** 2) / 2
    np.testing.assert_allclose(found["coefficient"], product / found["estimate"] ** 2, rtol=1e-4)


def test_an_estimate_times_0_is_no_context_in_the_steps_and_times_1_the_sampler():
    settings = parse(config_dict(**SMALLEST, **{"context.kind": "linear", "context.max_gain": 8.0}))
    tokenizer, records = load_tokenizer(None), [make_source(settings.data, "train")[0]]
    params = random_params(settings)

    def pictures(change):
        return OracleGenerator(settings, tokenizer, settings.sample, change)(
            params, records, 0
        ).astype(int)

    as_it_is = pictures(lambda *_: lambda out, t: out)
    assert np.abs(as_it_is - pictures(scaled(jnp.ones(50)))).max() <= 1
    nothing = pictures(
        lambda *_: lambda out, t: out._replace(context_t=0 * out.x0, context_s=0 * out.x0)
    )
    assert np.abs(nothing - pictures(scaled(jnp.zeros(50)))).max() <= 1
    assert np.abs(nothing - as_it_is).max() > 5


@pytest.mark.slow  # a quarter of a minute: pytest -m slow tests/test_experiments.py
def test_a_cell_of_estimates_trains_the_other_plans_run_and_leaves_its_numbers(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT)
    (tmp_path / "of.py").write_text(
        "from conftest import SMALLEST, config_dict\n"
        "from contextdiff_jax.experiments.plan import Plan\n"
        "def get_plan():\n"
        "    config = config_dict(**SMALLEST, **{'context.kind': 'linear', 'train.steps': 2})\n"
        "    return Plan(title='t', about='a', kind='pictures', config=config, headline={},\n"
        "                variants={'linear': {}}, baselines=())\n"
    )
    of = load_plan(str(tmp_path / "of.py"))
    options = dict(
        of=str(tmp_path / "of.py"), num=2, records=2, steps=5, guidances=(1.0,), factors=(1.25,)
    )
    found = estimate_cell(
        dataclasses.replace(of, options=options).cell("linear", 1), tmp_path / "runs/estimates/cell"
    )
    assert (tmp_path / "runs/of" / of.cell("linear", 1).folder / "config.json").exists()
    arms = ["as it is", "regressed", "times 1.25"]
    assert list(found["scores"]["guidance 1"]) == arms + [f"{arm}, minus as it is" for arm in arms]
    assert found["scores"]["guidance 1"]["as it is, minus as it is"] == 0
    assert list(found["scores"]["coefficient"]) == ["49", "39", "29", "19", "9"]


def test_a_cell_whose_training_was_stopped_is_not_scored(monkeypatch, tmp_path):
    config = config_dict(**{"train.steps": 2})
    plan = Plan(
        title="t", about="a", kind="pictures", config=config, variants={"none": {}}, headline={}
    )
    monkeypatch.setattr(trained, "train", lambda *_: types.SimpleNamespace(step=1))
    with pytest.raises(RunError, match="none-0: stopped while training"):
        trained.trained_params(plan.cell("none", 0), tmp_path)


TINY_PLAN = """
import dataclasses
from contextdiff_jax.experiments.plan import Plan
from contextdiff_jax.experiments.toy_config import ToyConfig
def get_plan():
    config = dataclasses.asdict(ToyConfig(kind="mlp", width=8, steps=20, batch_size=8))
    return Plan(title="t", about="a", kind="toy", config=config, variants={"none": {}}, seeds=1,
                headline={"TV": "ddim/tv"}, options=dict(num=20, bound=2, samplers={"ddim": 5}))
"""


def test_a_plan_goes_on_where_it_was_and_gives_the_same_digits_again(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY_PLAN)
    run = [f"--plan={tmp_path}/tiny.py", f"--workdir={tmp_path}/runs"]
    first = command("experiment", *run, f"--out={tmp_path}/a")
    assert first.returncode == 0, first.stderr
    written = (tmp_path / "a/tiny.jsonl").read_text()
    again = command("experiment", *run, f"--out={tmp_path}/a", "--seeds=0,1")
    first_cell, second_cell = (tmp_path / "a/tiny.jsonl").read_text().splitlines(keepends=True)
    assert again.returncode == 0 and first_cell == written and json.loads(second_cell)["seed"] == 1
    page = (tmp_path / "a/tiny.md").read_text()
    assert (tmp_path / "a/tiny.png").exists() and "with the same digits" in " ".join(page.split())
    assert "    taskset -c 0 python -m contextdiff_jax.experiment" in page
    run = [f"--plan={tmp_path}/tiny.py", f"--workdir={tmp_path}/other"]
    repeated = command("experiment", *run, f"--out={tmp_path}/b")
    assert repeated.returncode == 0, repeated.stderr
    (repeated,), found = read_finished(tmp_path / "b/tiny.jsonl"), json.loads(first_cell)
    assert all(repeated[part] == found[part] for part in ("config", "scores", "training"))
