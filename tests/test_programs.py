"""Programs kept in a folder: the same results, by whoever reads them, and a line for a damaged
file.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.models.contextdiff import Frozen
from contextdiff_jax.parallel.mesh import local_mesh
from contextdiff_jax.programs import kept
from contextdiff_jax.training.state import init_state


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


def test_a_second_generator_reads_the_program_and_makes_the_same_pictures(
    tiny_settings, tmp_path, monkeypatch
):
    from contextdiff_jax import generation

    settings = dataclasses.replace(
        tiny_settings, sample=dataclasses.replace(tiny_settings.sample, steps=2)
    )
    params, tokenizer, prompts = (
        init_state(settings).params,
        load_tokenizer(),
        ["a large red circle"] * 2,
    )
    kind = dict(frozen=Frozen(), mesh=local_mesh())
    plain = generation.Generator(settings, tokenizer, **kind)(params, prompts, 0)
    first = generation.Generator(settings, tokenizer, **kind, programs=tmp_path)(params, prompts, 0)
    monkeypatch.setattr(generation, "make_pictures", lambda *_: never())
    again = generation.Generator(settings, tokenizer, **kind, programs=tmp_path)(params, prompts, 0)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, plain)
    with pytest.raises(AssertionError, match="traced again"):
        generation.Generator(settings, tokenizer, **kind, programs=tmp_path)(params, prompts * 2, 0)
