"""The step, the state, resumption; and that the context does what the method says."""

import dataclasses
import functools
import json
import re
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import (
    NO_ATTENTION,
    SMALLEST,
    command,
    config_dict,
    config_file,
    random_params,
    with_gamma,
)
from flax import nnx

from contextdiff_jax.data import load_tokenizer, make_loader, make_source
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.parallel.mesh import Feed, make_mesh, replicated
from contextdiff_jax.runs import checkpoints
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runtime.errors import RunError
from contextdiff_jax.runtime.pictures import read_png_metadata
from contextdiff_jax.settings import parse
from contextdiff_jax.training import loop, reporter
from contextdiff_jax.training.log import averages
from contextdiff_jax.training.loop import null_caption, train
from contextdiff_jax.training.nonfinite import FiniteGuard
from contextdiff_jax.training.replay import replay
from contextdiff_jax.training.state import init_state, zero_metrics
from contextdiff_jax.training.step import draw, loss_fn, make_train_step


def batch_of(settings):
    tokenizer = load_tokenizer()
    loader = make_loader(
        make_source(settings.data),
        batch_size=settings.train.batch_size,
        tokenizer=tokenizer,
        max_length=settings.data.max_length,
    )
    batch = next(loader)
    loader.close()
    del batch["caption"]
    return batch, null_caption(tokenizer, settings.data.max_length)


@pytest.fixture(scope="module")
def smallest():
    return parse(config_dict(**SMALLEST))


@pytest.fixture(scope="module")
def params(smallest):
    return random_params(smallest)


@pytest.fixture(scope="module")
def loss_of(params):
    """`loss_of(batch, null, gamma, shift)` with the weights of `params`."""

    @functools.partial(jax.jit, static_argnums=0)
    def loss(shift, params, batch, null):
        settings = parse(config_dict(**SMALLEST, **{"context.shift": shift}))
        model = nnx.merge(model_graph(settings), params)
        return loss_fn(model, batch, null, settings.process, settings)[0]

    return lambda batch, null, gamma, shift="quadratic": float(
        loss(shift, with_gamma(params, gamma), batch, null)
    )


def test_gain_zero_is_plain_diffusion_in_loss_and_samples_exactly(smallest, params, loss_of):
    batch, null = batch_of(smallest)
    batch = draw(jax.random.key(0), {k: jnp.asarray(v) for k, v in batch.items()}, smallest)
    assert loss_of(batch, null, 0.0) == loss_of(batch, null, 0.0, "none")
    assert loss_of(batch, null, 1.0) != loss_of(batch, null, 1.0, "none")
    prompts, zero = ["a large red circle", "a small blue square"], with_gamma(params, 0.0)
    plain = parse(config_dict(**SMALLEST, **{"context.shift": "none"}))
    shifted, unshifted = (
        of_run(s, load_tokenizer(), zero).text_to_image(prompts) for s in (smallest, plain)
    )
    np.testing.assert_array_equal(shifted, unshifted)


@pytest.mark.parametrize("estimate", ["plugin", "posterior_mean"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_context_with_gain_changes_the_samples(estimate, sampler):
    changes = {"context.estimate": estimate, "sample.sampler": sampler}
    settings = parse(config_dict(**SMALLEST | changes))
    params, tokenizer = with_gamma(random_params(settings), 1.5), load_tokenizer()
    shifted = of_run(settings, tokenizer, params)
    if estimate == "plugin":  # without gain there is no shift: to the bit, as the test above says
        plain = shifted.with_params(with_gamma(params, 0.0))
    else:  # the head has learnt the gain
        context = dataclasses.replace(settings.context, shift="none")
        plain = of_run(dataclasses.replace(settings, context=context), tokenizer, params)
    with_shift, without = (
        pipeline.text_to_image(["a large red circle"] * 4) for pipeline in (shifted, plain)
    )
    assert np.abs(with_shift.astype(int) - without).mean() > 1


def test_the_shift_sees_the_true_caption_where_the_denoiser_does_not(smallest, loss_of):
    batch, null = batch_of(smallest)
    batch = draw(jax.random.key(0), {k: jnp.asarray(v) for k, v in batch.items()}, smallest)
    batch["dropped"] = jnp.ones_like(batch["dropped"])
    other = batch | {"token_ids": jnp.roll(batch["token_ids"], 1, axis=0)}

    # No text reaches a denoiser whose captions are all dropped.
    assert loss_of(batch, null, 0.0) == loss_of(other, null, 0.0)
    assert loss_of(batch, null, 1.0) != loss_of(other, null, 1.0)  # but the context still reads it


def started(settings):
    """A state of random weights: numpy makes it sooner than XLA compiles an initialisation."""
    shapes = jax.eval_shape(functools.partial(init_state, settings))
    zeros = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)
    params = random_params(settings)
    return dataclasses.replace(zeros, params=params, ema=params)


def test_a_step_is_the_same_whatever_the_accumulation():
    settings = parse(config_dict(**NO_ATTENTION))
    state, (batch, null), states = started(settings), batch_of(settings), []
    for parts in (1, 4):
        settings = parse(config_dict(**NO_ATTENTION, **{"train.accumulation": parts}))
        states.append(jax.jit(make_train_step(settings))(state, batch, null)[0])
    np.testing.assert_allclose(
        states[0].metric_sums["loss"], states[1].metric_sums["loss"], rtol=1e-5
    )
    np.testing.assert_allclose(
        states[0].metric_sums["grad_norm"], states[1].metric_sums["grad_norm"], rtol=1e-4
    )
    np.testing.assert_allclose(
        states[0].metric_sums["quartile_loss"], states[1].metric_sums["quartile_loss"], rtol=1e-4
    )
    np.testing.assert_array_equal(
        states[0].metric_sums["quartile_count"], states[1].metric_sums["quartile_count"]
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"context.estimate": "posterior_mean"}, marks=pytest.mark.slow),
        {"context.kind": "text", "context.shift": "prior", "diffusion.prior_kl": 0.1},
        {
            "context.kind": "bilinear",
            "train.precision": "bfloat16",
            "diffusion.weighting": "min_snr",
        },
        pytest.param(
            {
                "context.kind": "none",
                "context.shift": "none",
                "diffusion.prediction_type": "epsilon",
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["posterior_mean", "text-prior", "bilinear-bf16", "plain-epsilon"],
)
def test_the_loss_falls_for_every_kind_of_run(changes):
    """The slow ones: bash launch/test.sh -m slow tests/test_training.py"""
    settings = parse(
        config_dict(
            **NO_ATTENTION, **changes, **{"train.learning_rate": 3e-3, "train.decay": "constant"}
        )
    )
    batch, null = batch_of(settings)
    step = jax.jit(make_train_step(settings), donate_argnums=0)
    state, losses = jax.jit(lambda: init_state(settings))(), []
    for _ in range(40):
        before = float(state.metric_sums["denoise_loss"])
        state, _ = step(state, batch, null)
        losses.append(float(state.metric_sums["denoise_loss"]) - before)
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])
    if not settings.context.network.is_zero:
        assert float(jnp.abs(state.params["context"]["gamma"][...])) > 1e-3


def losses(workdir):
    return [
        (row["step"], row["loss"], row["grad_norm"])
        for row in map(json.loads, (workdir / "metrics.jsonl").open())
    ]


def restored_snapshot(workdir, step):
    with checkpoints.open_archive(workdir, "averages", read_only=True) as manager:
        return manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore())
        ).state


def test_a_killed_run_resumes_to_the_uninterrupted_losses_and_averages_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    averages = {"train.power_ema": (0.05, 0.1), "train.power_ema_every": 7}
    config = config_dict(**NO_ATTENTION, **averages, **{"train.log_every": 2})
    train(parse(config), config, whole)

    class Killed(BaseException):
        """Stands for the end of the process: nothing catches it."""

    # Dies in step 8, after the checkpoint of step 6 and the log line of step 6; the log has lines
    # past a checkpoint, and there is a snapshot of step 7.
    calls, real = [], loop.to_devices

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 9:  # the first call is for shapes
            raise Killed
        return real(*arguments)

    loop.to_devices = dying
    try:
        with pytest.raises(Killed):
            train(parse(config), config, parts)
    finally:
        loop.to_devices = real
    for _ in range(50):  # the asynchronous save of step 6 may still be under way
        if (parts / "checkpoints" / "6").exists():
            break
        time.sleep(0.2)
    train(parse(config), config, parts)
    assert losses(parts) == losses(whole)
    for step in (7, 9):
        one, other = (restored_snapshot(workdir, step) for workdir in (whole, parts))
        assert len(jax.tree.leaves(one)) > 40 and one["params"].keys() == {"profile_0", "profile_1"}
        jax.tree.map(np.testing.assert_array_equal, one, other)
    for length in (0.05, 0.1):  # of nine steps the first is nearly forgotten
        run, newest = load_run(str(parts), ema_length=length), load_run(str(parts), "params")
        for each, last in zip(*(jax.tree.leaves(r.params) for r in (run, newest)), strict=True):
            np.testing.assert_allclose(each, last, atol=0.05)
    assert [step for step, *_ in losses(whole)] == [2, 4, 6, 8, 9]


def test_non_finite_steps_are_skipped_up_to_a_limit_and_then_dumped_and_what_is_saved_is_finite(
    tmp_path, caplog
):
    """A learning rate that throws the weights away: no step after it has a finite loss."""
    config = config_dict(
        **NO_ATTENTION,
        **{
            "train.learning_rate": 1e30,
            "train.warmup_steps": 0,
            "train.clip_norm": 0.0,
            "train.checkpoint_every": 1,
            "train.log_every": 100,
            "train.max_nonfinite": 1,
        },
    )
    with pytest.raises(
        RunError, match=r"step (\d+): the loss or the gradient is not finite"
    ) as error:
        train(parse(config), config, tmp_path)
    bad = int(str(error.value).split()[1].rstrip(":"))
    assert (
        f"step {bad - 1}: the loss or the gradient is not finite; skipped (1 so far)" in caplog.text
    )
    dump = tmp_path / f"nonfinite_{bad}"
    assert f"--replay={dump}" in str(error.value)
    dumped = np.load(dump / "batch.npz")
    assert dumped["image"].shape == (8, 16, 16, 3) and dumped["token_ids"].shape == (8, 12)
    text = replay(dump)
    assert f"step {bad}: loss " in text and re.search(
        "first that is not finite: (metric|gradient) .*values", text
    )
    with checkpoints.open_manager(tmp_path, read_only=True) as manager:
        assert manager.latest_step() == bad - 1
        state, _ = checkpoints.restore(manager, jax.eval_shape(lambda: init_state(parse(config))))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_what_surrounds_a_step_moves_between_host_and_devices_only_what_is_meant(
    tiny_settings, tmp_path
):
    """On a CPU JAX's guard sees the ways to a device and between devices, none from a device."""
    batch, _ = batch_of(tiny_settings)
    feed = Feed(make_mesh(tiny_settings.mesh, 8), 8)
    sums = jax.device_put(zero_metrics())
    state = SimpleNamespace(metric_sums=sums)
    with jax.transfer_guard("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
            jnp.asarray(batch["image"])
        put = feed.put(batch)
        watching = FiniteGuard(tiny_settings, {}, tmp_path, state)
        watching.watch(1, state, put, sums["nonfinite"])
        watching.check(state)
        logged = averages(jax.device_put(zero_metrics(), replicated(feed.mesh)))
    np.testing.assert_array_equal(put["image"], batch["image"])
    assert logged["loss"] == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, the command that trained it) of a run of three steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    averages = {"train.power_ema": (0.05, 0.1), "train.power_ema_every": 1}
    config_file(workdir.with_suffix(".py"), config_dict(**NO_ATTENTION | averages))
    trained = train_command(
        workdir,
        "--config.train.steps=3",
        "--config.train.sample_every=500",  # and at the end
    )
    assert trained.returncode == 0, trained.stderr
    return workdir, trained


def train_command(workdir, *flags):
    config = workdir.with_suffix(".py")
    return command("train", f"--config={config}", f"--workdir={workdir}", *flags)


def test_a_run_writes_its_folder_and_is_not_trained_again(finished):
    workdir, trained = finished
    for words in (r"compiled in [\d.]+ s", r"first step done [\d.]+ s after"):
        assert re.search(words, trained.stderr)
    for name in ("config.json", "metrics.jsonl", "checkpoints/3", "averages/1", "averages/3"):
        assert (workdir / name).exists()
    assert list((workdir / "events").iterdir()) and list((workdir / "samples").iterdir())
    again = train_command(workdir, "--config.train.steps=3")
    assert again.returncode == 0
    assert "trained to step 3 already" in again.stderr and "compiled" not in again.stderr


@pytest.mark.parametrize(
    "flag, messages",
    [
        ("--config.seed=4", ("another config's run, seed is 0 there and 4 here",)),
        ("--config.context.width=32", ("of another model: context/", "(16,")),
    ],
)
def test_a_run_of_another_config_or_model_is_not_resumed(finished, flag, messages):
    other = train_command(finished[0], flag)
    assert other.returncode == 2 and "Traceback" not in other.stderr
    for message in messages:
        assert message in other.stderr


def test_a_run_is_sampled_and_each_picture_knows_what_made_it(finished, tmp_path):
    out, images = tmp_path / "grid.png", tmp_path / "images"
    made = command(
        "sample",
        f"--workdir={finished[0]}",
        "--prompt=a large red circle",
        "--prompt=a small blue square",
        "--num=2",
        "--sampler=ddim",
        "--steps=3",
        "--guidance=2",
        "--seed=7",
        "--ema_length=0.07",
        f"--out={out}",
        f"--images={images}",
    )
    assert made.returncode == 0, made.stderr
    assert out.exists() and len(list(images.iterdir())) == 4
    metadata = read_png_metadata(images / "0003.png")
    assert metadata["prompt"] == "a small blue square"
    assert metadata["seed"] == "7" and metadata["guidance"] == "2.0"
    assert metadata["source"] == f"step 3 of {finished[0]}, ema_length 0.07"
    assert "made ema_length 0.07 of step 3 from" in made.stderr
    wrong = command("sample", f"--workdir={finished[0]}", "--prompt=a", "--sampler=foo")
    assert wrong.returncode == 2 and "sampler='foo': unknown; one of ddpm, ddim" in wrong.stderr


def test_a_run_is_evaluated(finished):
    scored = command(
        *("evaluate", f"--workdir={finished[0]}", "--metrics=composition", "--num=4"),
        *("--steps=2", "--ema_length=0.05"),
    )
    assert scored.returncode == 0, scored.stderr
    assert "held-out combinations" in scored.stdout
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert "exact" in metrics["composition"]["seen combinations"]
    assert metrics["ema_length"] == 0.05 and metrics["step"] == 3


@pytest.mark.parametrize("every", [0, 5])
def test_no_samples_are_made_where_none_are_asked_for(tmp_path, monkeypatch, every):
    made = []
    pipeline = SimpleNamespace(text_to_image=lambda *_, **__: made.append(1))
    pipeline.with_params = lambda params: pipeline
    monkeypatch.setattr(reporter, "of_run", lambda *_, **__: pipeline)
    settings = parse(config_dict(**{"train.sample_every": every}))
    show = reporter.Reporter(settings, tmp_path, None, None, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    show(SimpleNamespace(ema=None), 9)
    assert (tmp_path / "curves.png").exists() and len(made) == (every > 0)
    assert not (tmp_path / "samples").exists()
