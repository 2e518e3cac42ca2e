"""Power-function averages, their snapshots, and the averages of other lengths that they make.

Their shares are summed one by one here, in float64, from the definition of Karras et al. 2024.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SMALLEST, config_dict, one_line
from flax import nnx
from jax.sharding import PartitionSpec as P

from contextdiff_jax.configs import vae_emoji
from contextdiff_jax.editing.settings import parse_edit
from contextdiff_jax.inference.opening import open_folder
from contextdiff_jax.parallel.mesh import AXES, MeshConfig, make_mesh, state_shardings
from contextdiff_jax.runs import averages, checkpoints, snapshots
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.workdir import claim_workdir
from contextdiff_jax.settings.autoencoder import parse_autoencoder
from contextdiff_jax.settings.train import TrainConfig
from contextdiff_jax.training.run_steps import keep_averages
from contextdiff_jax.training.state import find_power_averages, make_optimizer, power_averages

LENGTHS = (0.05, 0.1)


def shares_after_each(length: float, count: int) -> np.ndarray:
    """The share of parameters t (column) in the average after update n (row), each counted from 1,
    by the recursion with beta(n) = (1 - 1/n)^(gamma + 1). gamma, by bisection, is what makes the
    continuous profile's standard deviation `length`.
    """

    def width(gamma):
        return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))

    low, high = 0.0, 1e4  # it falls from the plain mean's on
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > length else (low, middle)
    rows, found = np.zeros((count, count)), np.zeros(count)
    for n in range(1, count + 1):
        beta = (1 - 1 / n) ** (low + 1)
        found[: n - 1] *= beta
        found[n - 1] = 1 - beta
        rows[n - 1] = found
    return rows


def shares(length: float, count: int) -> np.ndarray:
    """The shares after the last of `count` updates."""
    return shares_after_each(length, count)[-1]


def trajectory(count: int) -> np.ndarray:
    """Parameters after each update [count, 5]: a way that slows down, and noise, as training's."""
    rng = np.random.default_rng(3)
    way = np.log(np.arange(1, count + 1))[:, None] * rng.standard_normal(5)
    return way + rng.standard_normal((count, 5))


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25])
def test_a_length_is_the_standard_deviation_of_the_shares_of_a_long_run(length):
    count = 1500
    t, share = np.arange(1, count + 1), shares(length, count)
    assert share.sum() == pytest.approx(1, abs=1e-12)
    deviation = np.sqrt(share @ t**2 - (share @ t) ** 2) / count
    assert deviation == pytest.approx(length, rel=2e-3)
    assert averages.power_of_length(length) > 1


def test_the_averages_of_an_optimizer_hold_the_shares_of_the_definition():
    """Beside it the updates and the other states are those of the optimizer without them."""
    count, config = 60, TrainConfig(learning_rate=0.1, warmup_steps=0, power_ema=LENGTHS)
    plain = make_optimizer(dataclasses.replace(config, power_ema=()))
    optimizer, rng = make_optimizer(config), np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)}
    state, plain_state, way = optimizer.init(params), plain.init(params), []
    update, plain_update = jax.jit(optimizer.update), jax.jit(plain.update)
    for _ in range(count):
        grads = jax.tree.map(lambda p: p + rng.standard_normal(p.shape, np.float32), params)
        updates, state = update(grads, state, params)
        expected, plain_state = plain_update(grads, plain_state, params)
        np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-4)
        params = optax.apply_updates(params, updates)
        way.append(np.asarray(params["kernel"], np.float64))
    assert jax.tree.structure(state[:-1]) == jax.tree.structure((plain_state,))
    kept = find_power_averages(state)
    assert kept.updates == count
    for length, average in zip(LENGTHS, kept.averages, strict=True):
        exact = np.tensordot(shares(length, count), np.stack(way), 1)
        np.testing.assert_allclose(average["kernel"], exact, rtol=1e-5, atol=1e-6)


def test_an_average_of_what_stands_still_is_that_to_the_last_digits_after_millions_of_steps():
    """Factors that are rounded before they are added would make it drift by tenths of a percent."""
    link = power_averages((0.05,))
    params = {"kernel": jnp.asarray([1.1, -0.3], jnp.float32)}
    still = jax.tree.map(jnp.zeros_like, params)
    state = link.init(params)._replace(
        updates=jnp.asarray(3_000_000, jnp.int32), averages=(params,)
    )
    run = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, 20_000, lambda _, state: link.update(still, state, params)[1], state
        )
    )
    np.testing.assert_allclose(run(state).averages[0]["kernel"], params["kernel"], rtol=1e-6)


def test_the_newest_share_is_accurate_in_float32_where_its_definition_is_not():
    count, power = 3_000_000, averages.power_of_length(0.05)
    exact = 1 - np.exp(power * np.log(np.longdouble(1) - np.longdouble(1) / count))
    assert averages.newest_share(power, count) == pytest.approx(float(exact), rel=1e-12)
    single = averages.newest_share(power, jnp.asarray(count, jnp.float32), jnp)
    assert single == pytest.approx(float(exact), rel=1e-6)
    assert averages.newest_share(power, jnp.ones((), jnp.float32), jnp) == 1


def test_the_weights_of_100_snapshots_make_the_averages_of_lengths_that_none_is_of():
    """Against the shares themselves, all written out, and numpy's least squares of them."""
    count, updates, lengths = 600, np.arange(6, 601, 6), (0.03, 0.07, 0.15, 0.2)
    weights, left = averages.solve(updates, LENGTHS, lengths)
    weights = weights.reshape(len(lengths), -1).T
    kept = [shares_after_each(length, count)[updates - 1] for length in LENGTHS]
    columns = np.stack(kept, axis=1).reshape(-1, count).T
    wanted = np.stack([shares(length, count) for length in lengths], axis=1)
    norms = np.linalg.norm(wanted, axis=0)
    missed = np.linalg.norm(columns @ weights - wanted, axis=0) / norms
    np.testing.assert_allclose(missed, left, rtol=1e-3)
    assert (missed < (1.2e-3, 1e-4, 2.4e-4, 7.2e-4)).all()
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-10)
    # Independently: the last weight is what the others leave of 1.
    last = columns[:, -1:]
    free = np.linalg.lstsq(columns[:, :-1] - last, wanted - last, rcond=None)[0]
    best = np.vstack([free, 1 - free.sum(0)])
    assert (missed < 1.001 * np.linalg.norm(columns @ best - wanted, axis=0) / norms).all()
    way = trajectory(count)
    np.testing.assert_allclose(weights.T @ (columns.T @ way), wanted.T @ way, atol=3e-4)


def test_snapshots_after_every_update_make_any_length_exactly():
    """After the first one all averages are the same: the equations have more than one solution."""
    way, count = trajectory(12), 12
    kept = np.stack([[shares(p, n) @ way[:n] for p in LENGTHS] for n in range(1, count + 1)])
    lengths = (0.01, 0.04, 0.05, 0.1, 0.2, 0.28)
    weights, left = averages.solve(range(1, count + 1), LENGTHS, lengths)
    assert left.max() < 1e-6
    for length, each in zip(lengths, weights, strict=True):
        np.testing.assert_allclose(
            np.tensordot(each, kept, 2), shares(length, count) @ way, atol=1e-10
        )


TREE = nnx.State(
    {
        "context": {"kernel": nnx.Param(jnp.zeros((4, 3)))},
        "unet": {"bias": nnx.Param(jnp.zeros(3)), "layers": {0: {"scale": nnx.Param(jnp.ones(2))}}},
    }
)


def filled(value: float, tree: nnx.State = TREE) -> nnx.State:
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, jnp.float32), tree)


def abstract(tree: nnx.State = TREE) -> nnx.State:
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    return checkpoints.placed(tree, state_shardings(mesh, tree))


def write_run(workdir, steps, values, tree=TREE, every=1):
    """Snapshots of a run whose parameters are all `values[t - 1]` after update t."""
    config = types.SimpleNamespace(power_ema=LENGTHS, power_ema_every=every, steps=steps)
    link, params = power_averages(LENGTHS), filled(0, tree)
    state = link.init(params)
    manager = types.SimpleNamespace(directory=workdir, wait_until_finished=lambda: None)
    for step in range(1, steps + 1):
        new = filled(values[step - 1], tree)
        updates = jax.tree.map(lambda a, b: a - b, new, params)
        _, state = link.update(updates, state, params)
        params = new
        whole = types.SimpleNamespace(step=jnp.asarray(step), opt_state=((), state))
        keep_averages(config, workdir, manager, whole, step, lambda doing: None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(workdir, values) of a run of 7 steps with snapshots after steps 2, 4, 6 and 7."""
    workdir, values = tmp_path_factory.mktemp("kept"), np.cos(np.arange(7)) + 2
    write_run(workdir, 7, values, every=2)
    return workdir, values


def test_snapshots_are_sealed_and_kept_and_make_the_average_of_another_length(kept, caplog):
    workdir, values = kept
    folder = workdir / snapshots.FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "6", "7"]
    assert not any(checkpoints.damage(path) for path in folder.iterdir())
    (weights,), _ = averages.solve((2, 4, 6, 7), LENGTHS, (0.07,))
    each = [[shares(p, n) @ values[:n] for p in LENGTHS] for n in (2, 4, 6, 7)]
    for length, wanted in ((0.07, np.sum(weights * each)), (0.05, each[-1][0]), (0.1, each[-1][1])):
        params, step = snapshots.load_average(workdir, abstract(), LENGTHS, length)
        assert step == 7 and jax.tree.structure(params) == jax.tree.structure(TREE)
        for leaf in jax.tree.leaves(params):
            np.testing.assert_allclose(leaf, np.full(leaf.shape, wanted), rtol=1e-6)


def test_a_run_that_goes_on_forgets_what_it_does_again(kept, tmp_path):
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    snapshots.drop_after(tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / snapshots.FOLDER).iterdir()) == ["2", "4"]


def test_a_damaged_snapshot_is_left_out_and_said(kept, tmp_path, caplog):
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    file = next((tmp_path / snapshots.FOLDER / "7").rglob("manifest.ocdbt"))
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "contextdiff_jax"):
        params, step = snapshots.load_average(tmp_path, abstract(), LENGTHS, 0.05)
    assert step == 6 and "snapshot 7 of the averages is left out" in caplog.text
    wanted = shares(0.05, 6) @ kept[1][:6]
    np.testing.assert_allclose(jax.tree.leaves(params)[0].ravel()[0], wanted, rtol=1e-6)


def test_what_a_run_does_not_train_comes_from_its_checkpoint(tmp_path):
    flat = nnx.to_flat_state(TREE)
    trained = nnx.from_flat_state([item for item in flat if item[0][0] == "context"])
    write_run(tmp_path, 2, (1.0, 5.0), trained)
    with checkpoints.open_manager(tmp_path) as manager:
        state = Checkpointed(jnp.asarray(2), filled(9.0), filled(7.0))
        checkpoints.save(manager, state, {})
    params, _ = snapshots.load_average(tmp_path, abstract(), LENGTHS, 0.05)
    wanted = shares(0.05, 2) @ (1.0, 5.0)
    assert jax.tree.structure(params) == jax.tree.structure(TREE)
    np.testing.assert_allclose(params["context"]["kernel"][...], wanted, rtol=1e-6)
    np.testing.assert_array_equal(params["unet"]["bias"][...], 7.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Checkpointed:
    step: jax.Array
    params: nnx.State
    ema: nnx.State


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, float("nan")])
def test_what_is_no_length_is_refused(kept, length):
    message = f"ema_length={length}: a length, .* must lie between 0 and 0.2887"
    with pytest.raises(ValueError, match=message) as error:
        snapshots.load_average(kept[0], abstract(), LENGTHS, length)
    one_line(error)


@pytest.mark.parametrize("length, nearest", [(0.28, 0.125), (0.01, 0.035)])
def test_a_length_that_snapshots_do_not_make_is_refused_with_the_nearest_that_they_do(
    tmp_path, length, nearest
):
    write_run(tmp_path, 20, np.ones(20), every=20)
    with pytest.raises(ValueError, match=rf"ema_length={length}: 1 snapshot of") as error:
        snapshots.load_average(tmp_path, abstract(), LENGTHS, length)
    text = one_line(error)
    assert float(text.rpartition(" ")[2]) == nearest
    assert snapshots.load_average(tmp_path, abstract(), LENGTHS, nearest)[1] == 20


def test_a_run_without_averages_and_other_weights_are_refused(tmp_path):
    claim_workdir(tmp_path, config_dict(**SMALLEST))
    for weights, message in (
        ("params", "ema_length=0.05: can't be given with --weights=params"),
        ("ema", r"has no averages to make it of; train with --config.train.power_ema"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_run(str(tmp_path), weights, ema_length=0.05)
        one_line(error)
    with pytest.raises(ValueError, match="averages holds no snapshot; the first is due"):
        snapshots.load_average(tmp_path, abstract(), LENGTHS, 0.05)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="ema_length=0.05: .* is no run"):
        open_folder(tmp_path, ema_length=0.05)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_an_optimizer_without_averages_has_no_trace_of_them(clip_norm):
    state = make_optimizer(TrainConfig(clip_norm=clip_norm)).init({"a": jnp.zeros(2)})
    names = [str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert len(names) == 4 and not any("averages" in name for name in names)


def test_averages_lie_where_their_parameters_do():
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 2), AXES)
    params = {"unet": {"to_q": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}}
    state = make_optimizer(TrainConfig(power_ema=LENGTHS)).init(params)
    places = find_power_averages(state_shardings(mesh, state)).averages
    assert places == (state_shardings(mesh, params),) * 2
    assert places[0]["unet"]["to_q"]["kernel"].spec == P(("fsdp",), ("tensor",))


@pytest.mark.parametrize("wrong", [(0.0,), (0.3,), (0.05, 0.05), (-0.1,)])
def test_wrong_lengths_are_refused(wrong):
    with pytest.raises(ValueError, match=r"train.power_ema=") as error:
        TrainConfig(power_ema=wrong)
    one_line(error)


def test_trainings_that_nobody_reads_the_averages_of_refuse_them():
    base = config_dict(**{"train.power_ema": LENGTHS})
    sections = {name: base[name] for name in ("seed", "train", "data", "mesh")}
    with pytest.raises(ValueError, match="power_ema=.*must be .. for an autoencoder"):
        parse_autoencoder(sections | {"loss": {}, "vae": vae_emoji.get_config().vae.to_dict()})
    with pytest.raises(ValueError, match="power_ema=.*must be .. for the tuning on a clip"):
        parse_edit(base | {"video": {"path": "a.gif", "prompt": "a"}, "edit": {}})
