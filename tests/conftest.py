"""The tests' common parts: a tiny model that trains in seconds, and commands run as users do."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

from contextdiff_jax.runtime.host import collect_garbage_seldom, suit_processor

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Most of the suite's time is compilation, for arrays so small that LLVM's optimisations don't pay:
# here, and in the processes that tests start, they are off (XLA's own passes stay). With them, half
# as long again: JAX_DISABLE_MOST_OPTIMIZATIONS=0.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FEWER = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] not in ("0", "false")
jax.config.update("jax_disable_most_optimizations", FEWER)
# XLA's older CPU kernels compile in three quarters of the time, a program that isn't split into
# parts for many cores in five sixths (as many files as cores are tested at once), and one kernel
# for results of the same arrays, AdamW's for example, in four fifths. Only with the older kernels
# is that right (docs/performance.md). libtpu, which some tests load, dies of the flags: XLA reads
# them here; commands, which don't load libtpu, get them again.
QUICKER = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
)
XLA_FLAGS = QUICKER if FEWER else ""
ON_EIGHT = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}".strip()}
# What a program of the tests, started from a test, needs.
HERE = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
suit_processor()  # as commands do: the same digits here and there
_before = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{_before} {XLA_FLAGS}".strip()
jax.devices("cpu")
os.environ["XLA_FLAGS"] = _before
collect_garbage_seldom()
# Every annotated argument and result of these rooms is checked: its type, its shape, and that one
# name is one size in a call. A whole number is a float too (PEP 484). Commands run in processes of
# their own, without the checks.
# Not composition.py, whose many small calls a second would take a minute longer.
EVALUATION = (ROOT / "contextdiff_jax/evaluation").iterdir()
CHECKED = [
    *(f"contextdiff_jax.{room}" for room in ("diffusion", "models", "data")),
    *(f"contextdiff_jax.evaluation.{p.stem}" for p in EVALUATION if p.stem != "composition"),
]
install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Modules whose assertions say what was compared, as those of test files do.
pytest.register_assert_rewrite("evaluated_run", "same_pictures", "text_folders")

# Files that take minutes: begun first, so that no core waits at the end for the other's last one.
LONGEST = [
    "latent",
    "pipeline",
    "pipeline_xl",
    "training",
    "speed",
    "mesh",
    "unet",
    "experiments",
    "evaluate",
]


def pytest_collection_modifyitems(items):
    """The longest files first; the order of all else stays."""
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else 99)


TINY = {
    "train.batch_size": 8,
    "train.warmup_steps": 2,
    "train.log_every": 1,
    "train.sample_every": 0,
    "train.checkpoint_every": 3,
    "train.steps": 9,
    "data.image_size": 16,
    "data.max_length": 12,
    "text.width": 16,
    "text.num_layers": 1,
    "text.num_heads": 2,
    "model.cross_attention_dim": 16,
    "model.block_out_channels": "(8,16)",
    "model.norm_num_groups": 4,
    "model.attention_head_dim": 2,
    "model.down_block_types": "('DownBlock2D','CrossAttnDownBlock2D')",
    "model.up_block_types": "('CrossAttnUpBlock2D','UpBlock2D')",
    "context.width": 16,
    "context.num_blocks": 1,
    "context.num_heads": 2,
    "sample.steps": 4,
    "diffusion.num_timesteps": 50,
}

# With it the tiny model has one level, with text attention: half of the compilation.
ONE_LEVEL = {
    "model.block_out_channels": "(8,)",
    "model.down_block_types": "('CrossAttnDownBlock2D',)",
    "model.up_block_types": "('CrossAttnUpBlock2D',)",
}
# With text attention on the way down alone, and nothing in the middle: half of that again.
SMALLEST = ONE_LEVEL | {"model.up_block_types": "('UpBlock2D',)", "model.mid_block_type": None}
# The same for a command: no flag says None.
SMALLEST_BY_FLAGS = SMALLEST | {"model.mid_block_type": "UNetMidBlock2D"}
# Without attention in the UNet, the text is read by the context alone: two thirds of `SMALLEST`'s
# compilation, for tests of what surrounds a step, whatever it computes.
NO_ATTENTION = SMALLEST | {"model.down_block_types": "('DownBlock2D',)"}


def config_dict(**changes):
    """configs/base.py with TINY and `changes` ("section.field": value) as plain values."""
    from contextdiff_jax.configs.base import get_config

    config = get_config()
    for name, value in (TINY | changes).items():
        section, field = name.split(".")
        config[section][field] = (
            eval(value) if isinstance(value, str) and value.startswith("(") else value
        )
    return config.to_dict()


# The transformer of a TINY config: two layers that are alike, and the last.
TINY_MMDIT = {
    "sample_size": 16,
    "patch_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
# ... on the straight path, with a context of joint blocks.
MMDIT_PROCESS = {
    "diffusion.schedule": "flow",
    "diffusion.prediction_type": "velocity",
    "context.kind": "joint",
    "context.estimate": "velocity",
}


def mmdit_dict(**changes):
    """`config_dict` with the other backbone; `changes` may name its fields, too."""
    from contextdiff_jax.configs.base import backbone

    model = {k.removeprefix("model."): v for k, v in changes.items() if k.startswith("model.")}
    rest = {k: v for k, v in changes.items() if not k.startswith("model.")}
    config = config_dict(**MMDIT_PROCESS | rest)
    return config | {"model": backbone("mmdit", **TINY_MMDIT | model).to_dict()}


def overrides(fields: Mapping[str, Any]) -> list[str]:
    """A command's flags for fields of a config."""
    return [f"--config.{field}={value}" for field, value in fields.items()]


def config_file(path: pathlib.Path, config: dict[str, Any]) -> pathlib.Path:
    """A config file of these values for a command, which no flag has to repeat."""
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )
    return path


def command(
    name: str, *arguments: str, tiny: bool = False, **options
) -> subprocess.CompletedProcess:
    """Runs `python -m contextdiff_jax.NAME`, with the tiny config's overrides if asked for: of
    fields that `arguments` don't set, for a tuple that is given twice is both in one.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    small = [each for each in overrides(TINY) if each.partition("=")[0] not in given]
    environment = (
        os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": XLA_FLAGS}
        | options.pop("env", {})
    )
    return subprocess.run(
        [
            sys.executable,
            "-m",
            f"contextdiff_jax.{name}",
            *arguments[:1],
            *(small if tiny else []),
            *arguments[1:],
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


def random_params(settings, gain=1.0):
    """Weights of a run's model, layers of about that gain, none at 0, so that an effect anywhere
    reaches the output. Drawn by numpy: compiling an initialisation takes longer than most tests.
    """
    from contextdiff_jax.training.state import init_state

    rng = np.random.default_rng(5)

    def drawn(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim > 1:
            return noise * np.float32(gain / np.sqrt(np.prod(leaf.shape[:-1])))
        return np.float32("scale" in jax.tree_util.keystr(path)) + np.float32(0.1) * noise

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.numpy.asarray(drawn(path, leaf)),
        jax.eval_shape(lambda: init_state(settings)).params,
    )


def with_gamma(params, value):
    """`params` with another gain of the context."""
    params = jax.tree.map(jax.numpy.copy, params)
    params["context"]["gamma"].set_value(jax.numpy.asarray(value, np.float32))
    return params


def one_line(error: pytest.ExceptionInfo) -> str:
    """An error's message, which must be one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


def as_users_compile(test: str) -> None:
    """Runs a test by its node's id again, in a process with all optimisations: where two programs
    are compared to the bit, kernels that compile sooner may round in another place in one of them.
    """
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", test],
        cwd=ROOT,
        env={name: value for name, value in environment.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]


@pytest.fixture(scope="module")
def optimised():
    """LLVM's optimisations on."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", FEWER)


@pytest.fixture(scope="session")
def tiny_settings():
    """Settings of the tiny model."""
    from contextdiff_jax.settings import parse

    return parse(config_dict())
