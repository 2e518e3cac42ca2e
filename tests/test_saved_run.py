"""A run that an older commit trained (tests/saved_run/README.md): today's code resumes, samples and
evaluates it, and gets what that commit got.
"""

import ast
import json
import math
import tarfile

import numpy as np
import pytest
from conftest import ROOT, command, config_dict
from PIL import Image

from contextdiff_jax import Pipeline
from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.settings import parse
from contextdiff_jax.training.loop import train

SAVED = ROOT / "tests" / "saved_run"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
# Sums in another order: with and without LLVM's optimisations these figures differ by up to 1.3e-6.
RTOL = 1e-4


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A copy of the run's folder, in the working directory that its config's paths start from."""
    with tarfile.open(SAVED / "run.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    monkeypatch.chdir(ROOT)
    return tmp_path / "run"


def flags() -> dict[str, object]:
    """{'train.steps': 303, ...}: what the run was trained with."""
    pairs = (line.partition("=") for line in (SAVED / "flags.txt").read_text().splitlines())
    return {name.removeprefix("--config."): read(value) for name, _, value in pairs}


def read(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word
        return text


def differences(old: dict[str, dict[str, float]], new: dict[str, dict[str, float]]) -> str:
    """A line for each figure that isn't what it was; figures by row and name."""
    return "\n".join(
        f"{row}, {name}: {value} by the old commit, {new[row].get(name)} now"
        for row, values in old.items()
        for name, value in values.items()
        if not math.isclose(value, new[row].get(name, math.nan), rel_tol=RTOL, abs_tol=1e-9)
    )


def test_it_goes_on_with_the_losses_of_the_commit_that_trained_it(saved):
    config = config_dict(**flags() | {"train.log_every": 1})
    train(parse(config), config, saved)
    log = [json.loads(line) for line in (saved / "metrics.jsonl").open()]
    assert [row["step"] for row in log] == [50, 100, 150, 200, 250, 300, 301, 302, 303]
    old, new = ({f"step {row['step']}": row for row in rows} for rows in (EXPECTED["steps"], log))
    assert not (wrong := differences(old, new)), wrong
    assert (saved / "checkpoints" / "303").exists()


def test_it_makes_the_pictures_of_the_commit_that_trained_it(saved):
    pipeline = Pipeline.open(saved)
    made = pipeline.text_to_image(["a large red circle", "a small blue square"], seed=7)
    for number, picture in enumerate(made):
        old = np.asarray(Image.open(SAVED / f"{number:04d}.png"))
        assert picture.shape == old.shape
        off = np.abs(picture.astype(int) - old)
        share = (off > 1).mean()
        assert share <= 0.01, (
            f"picture {number}: {share:.1%} of its values differ by more than 1 of 255, the most "
            f"by {off.max()}, the mean by {off.mean():.2f}"
        )


@pytest.mark.slow  # bash launch/test.sh -m slow tests/test_saved_run.py
def test_its_bound_is_that_of_the_commit_that_trained_it(saved):
    options = "--metrics=bound", "--num=4", "--bound_timesteps=5", "--seed=3"
    scored = command("evaluate", f"--workdir={saved}", *options)
    assert scored.returncode == 0, scored.stderr
    assert "bound, step 300, 4 a split" in scored.stdout
    now = json.loads((saved / "metrics.json").read_text())["bound"]
    assert not (wrong := differences(EXPECTED["bound"], now)), wrong


def test_the_bundled_tokenizer_gives_the_ids_of_that_commit():
    """Its ids are rows of the embeddings of all runs without a tokenizer of their own."""
    texts, ids = zip(*EXPECTED["bundled_tokenizer"].items(), strict=True)
    np.testing.assert_array_equal(load_tokenizer().encode(texts, len(ids[0]))[0], ids)
