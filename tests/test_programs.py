"""Programs kept in a folder: the same results, by whoever reads them, and a line for a damaged
file.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALLEST, config_dict, random_params
from flax import nnx

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.inference import Pipeline
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.inference.pipeline import NotFiniteError
from contextdiff_jax.inference.programs import kept
from contextdiff_jax.models.vae import VAE, VAEConfig
from contextdiff_jax.parallel.mesh import local_mesh
from contextdiff_jax.settings import parse


def never():
    raise AssertionError("traced again")


def test_a_program_is_traced_once_and_read_after_that(tmp_path):
    x = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
    first = kept(tmp_path, "double", "x2", lambda: lambda x: 2 * x["a"] + x["b"], x)
    again = kept(tmp_path, "double", "x2", never, x)
    np.testing.assert_array_equal(first(x), 2 * x["a"] + 1)
    np.testing.assert_array_equal(
        again({name: jnp.asarray(value) + 1 for name, value in x.items()}), 2 * x["a"] + 4
    )
    assert [file.suffix for file in tmp_path.iterdir()] == [".stablehlo"]


@pytest.mark.parametrize(
    "about, arguments",
    [
        ("x3", (np.ones(3, np.float32),)),
        ("x2", (np.ones(4, np.float32),)),
        ("x2", (np.ones(3, np.int32),)),
        ("x2", ({"other": np.ones(3, np.float32)},)),
    ],
)
def test_what_differs_is_another_program(tmp_path, about, arguments):
    kept(tmp_path, "double", "x2", lambda: lambda x: 2 * x, np.ones(3, np.float32))
    with pytest.raises(AssertionError, match="traced again"):
        kept(tmp_path, "double", about, never, *arguments)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * len(data)],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    x = np.ones(3, np.float32)
    kept(tmp_path, "double", "x2", lambda: lambda x: 2 * x, x)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file}: can't be read as a program .*; delete it"):
        kept(tmp_path, "double", "x2", never, x)


def test_a_folder_that_cannot_be_written_is_told_and_the_program_runs(tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    program = kept(
        tmp_path / "taken" / "compiled",
        "double",
        "x2",
        lambda: lambda x: 2 * x,
        np.ones(3, np.float32),
    )
    np.testing.assert_array_equal(program(np.ones(3, np.float32)), [2, 2, 2])
    assert "can't be written" in caplog.text


def test_a_second_pipeline_reads_the_program_and_makes_the_same_pictures(tmp_path, monkeypatch):
    settings, tokenizer = parse(config_dict(**SMALLEST)), load_tokenizer()
    params = random_params(settings)

    def sample(count, params=params, seed=0, **options):
        pipeline = of_run(settings, tokenizer, params, mesh=local_mesh(), **options)
        return pipeline.text_to_image(["a large red circle"] * count, seed=seed, steps=2)

    plain, first = sample(2), sample(2, programs=tmp_path)
    monkeypatch.setattr(Pipeline, "program", lambda *_: never())
    again = sample(2, programs=tmp_path)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, plain)
    for seed in (1, 2**32):
        assert (sample(2, programs=tmp_path, seed=seed) != first).mean() > 0.5
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    with pytest.raises(NotFiniteError, match="2 of 2 pictures, the first for 'a large"):
        sample(2, broken, programs=tmp_path)
    with pytest.raises(AssertionError, match="traced again"):
        sample(4, programs=tmp_path)


def test_what_networks_and_settings_hold_beside_arrays_is_part_of_the_key(tmp_path):
    """Two autoencoders of the same shapes, one with another scale, are two programs."""

    def vae(scale):
        config = VAEConfig(block_out_channels=(8,), norm_num_groups=4, scaling_factor=scale)
        return VAE(config, rngs=nnx.Rngs(0))

    def keep(network, make):
        return kept(tmp_path, "scale", "", make, network, np.ones(2, np.float32))

    keep(vae(0.5), lambda: lambda network, x: x * network.config.scaling_factor)
    keep(vae(0.5), never)
    with pytest.raises(AssertionError, match="traced again"):
        keep(vae(0.25), never)
    with jax.default_matmul_precision("highest"):
        with pytest.raises(AssertionError, match="traced again"):
            keep(vae(0.5), never)
