"""The error of the context's estimate by t, and samples with it made smaller or larger.

The best multiple of r_hat, in the mean square, is its regression coefficient <r_hat, r> / <r_hat,
r_hat>. It is 1 at every t if r_hat is E[r | x_t].
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from contextdiff_jax import diffusion
from contextdiff_jax.data import AnyTokenizer, make_source
from contextdiff_jax.evaluation import subject
from contextdiff_jax.evaluation.composition import judge
from contextdiff_jax.experiments.oracle import OracleGenerator, scaled
from contextdiff_jax.experiments.plan import VALIDATION_SCENES, Cell, load_plan
from contextdiff_jax.experiments.trained import trained_params
from contextdiff_jax.models.denoising import make_denoise
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings import Settings, parse

_BATCH = 64


def estimate_cell(cell: Cell, workdir: pathlib.Path) -> dict[str, Any]:
    """Measure on the run of the same variant and seed of another plan; train it if it isn't there.

    That plan's runs are beside this one's. Options: `of`, that plan's file; `num` held-out
    captions; `records` of the training split, other scenes than any that is trained or evaluated
    on, for the coefficients; `steps` of DDIM; `guidances`; `factors` for guidance 1.
    """
    options, settings = cell.options, parse(cell.config)
    trained = load_plan(options["of"]).cell(cell.variant, cell.seed)
    folder = workdir.parent.parent / pathlib.Path(options["of"]).stem / trained.folder
    params, tokenizer = (
        trained_params(trained, folder),
        open_tokenizer(settings),
    )
    timesteps = diffusion.spaced_timesteps(
        settings.diffusion.num_timesteps, options["steps"], settings.sample.spacing
    )

    data = settings.data.kind.others(settings.data, VALIDATION_SCENES)
    source = make_source(data, "train")
    found = measure(
        settings,
        params,
        tokenizer,
        [source[i] for i in range(options["records"])],
        timesteps,
        cell.seed,
    )
    scores: dict[str, Any] = {
        name: {str(int(t)): float(v) for t, v in zip(timesteps, values, strict=True)}
        for name, values in found.items()
    }
    every = np.arange(settings.diffusion.num_timesteps)
    regressed = np.interp(every, np.asarray(timesteps)[::-1], found["coefficient"][::-1])
    scores |= _obeyed(settings, params, tokenizer, regressed, options, cell.seed)
    return {"scores": scores, "marks": {}, "training": {"step": [], "loss": [], "context_gain": []}}


def _obeyed(
    settings: Settings,
    params: PyTree,
    tokenizer: AnyTokenizer,
    regressed: Float[np.ndarray, "T"],
    options: dict[str, Any],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Shares of held-out captions obeyed exactly, by guidance and by the factors on r_hat."""
    scores = {}
    source = next(reversed(subject.splits(settings.data).values()))  # held-out combinations
    records = [source[i] for i in range(options["num"])]
    for guidance in options["guidances"]:
        arms = {"as it is": np.ones_like(regressed), "regressed": regressed}
        if guidance == 1.0:
            arms |= {
                f"times {factor}": np.full_like(regressed, factor) for factor in options["factors"]
            }
        sample = dataclasses.replace(
            settings.sample, sampler="ddim", steps=options["steps"], guidance=guidance
        )
        exact = {}
        for name, factors in arms.items():
            generate = OracleGenerator(
                settings, tokenizer, sample, scaled(jnp.asarray(factors, jnp.float32))
            )
            images = generate(params, records, seed)
            exact[name] = float(
                judge(images, [record["caption"] for record in records])["exact"].mean()
            )
        differences = {
            f"{name}, minus as it is": value - exact["as it is"] for name, value in exact.items()
        }
        scores[f"guidance {guidance:g}"] = exact | differences
    return scores


def measure(
    settings: Settings,
    params: PyTree,
    tokenizer: AnyTokenizer,
    records: Sequence[dict[str, Any]],
    timesteps: Int[Array, "K"],
    seed: int,
) -> dict[str, Float[np.ndarray, "K"]]:
    """Measure the estimate by timestep, over records noised by the forward process.

    Root mean squares of r (`true`), r_hat (`estimate`) and their difference (`error`), and the
    regression `coefficient`. No guidance.
    """
    graph, schedule = model_graph(settings), settings.diffusion.make_schedule()

    @jax.jit
    def sums(
        params, x0: Float[Array, "B H W C"], ids, mask, key: PRNGKeyArray
    ) -> dict[str, Float[Array, "K"]]:
        model = nnx.merge(graph, params)
        captions = model.encode(ids, mask)
        denoise = make_denoise(
            model, schedule, captions, prediction_type=settings.diffusion.prediction_type
        )

        def row(_, index):
            t = jnp.full(x0.shape[:1], index)
            r = model.relate(x0, captions, t)
            noise = jax.random.normal(jax.random.fold_in(key, index), x0.shape)
            r_hat = denoise(
                diffusion.q_sample(schedule, x0, r, t, noise, settings.context.shift), t, t
            ).context_t
            return None, {
                "true": (r**2).sum(),
                "estimate": (r_hat**2).sum(),
                "error": ((r_hat - r) ** 2).sum(),
                "product": (r_hat * r).sum(),
            }

        return jax.lax.scan(row, None, timesteps)[1]

    total: dict[str, np.ndarray] = {}
    for start in range(0, len(records), _BATCH):
        part = records[start : start + _BATCH]
        x0 = to_unit(np.stack([record["image"] for record in part]))
        text = tokenizer.encode([record["caption"] for record in part], settings.data.max_length)
        found = sums(params, x0, *text, jax.random.fold_in(make_key(seed), start))
        total = {
            name: np.asarray(value, np.float64) + total.get(name, 0)
            for name, value in found.items()
        }
    coefficient = total.pop("product") / total["estimate"]
    size = len(records) * np.prod(settings.shape)
    return {name: np.sqrt(value / size) for name, value in total.items()} | {
        "coefficient": coefficient
    }
