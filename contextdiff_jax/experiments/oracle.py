"""Sampling with another context than the estimated one.

The true picture's, which an ideal estimate could bring, or the estimate made smaller or larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree, UInt8

from contextdiff_jax import diffusion
from contextdiff_jax.data import AnyTokenizer
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.denoising import empty_like, make_denoise
from contextdiff_jax.models.pixels import to_uint8, to_unit
from contextdiff_jax.runs.model import model_graph
from contextdiff_jax.runtime.keys import make_key
from contextdiff_jax.settings import SampleConfig, Settings

Change = Callable[[diffusion.Denoised, Int[Array, "B"]], diffusion.Denoised]


def true_context(
    model: ContextDiffusion,
    x0: Float[Array, "B H W C"],
    captions: Captions,
) -> Change:
    """r_hat becomes r_phi(x0, caption)."""
    r = model.context(x0, captions.tokens, captions.mask)
    return lambda out, t: out._replace(context_t=r, context_s=r)


def scaled(factors: Float[Array, "T"]) -> Callable[..., Change]:
    """r_hat of index t becomes factors[t] times as large."""

    def change(out: diffusion.Denoised, t: Int[Array, "B"]) -> diffusion.Denoised:
        factor = factors[t][:, None, None, None]
        return out._replace(context_t=factor * out.context_t, context_s=factor * out.context_s)

    return lambda model, x0, captions: change


class OracleGenerator:
    """`generator(params, records, seed) -> uint8 [N, H, W, 3]`: a picture a record's caption.

    The reverse process takes r_hat as `change` makes it, which may read the record's picture.
    ValueError for a context that depends on time.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: AnyTokenizer,
        options: SampleConfig,
        change: Callable[..., Change] = true_context,
    ):
        if settings.context.time_dependent:
            raise ValueError(
                "context.time_dependent=True: the oracle computes r once, for all times"
            )
        self._settings, self._tokenizer = settings, tokenizer
        graph, schedule = model_graph(settings), settings.diffusion.make_schedule()
        timesteps = options.times(schedule)
        run = diffusion.get_sampler(options.sampler)

        @jax.jit
        def sample(params, x0, x_T, key, ids, mask, null_ids, null_mask):
            model = nnx.merge(graph, params)
            captions = model.encode(ids, mask)
            changed = change(model, x0, captions)
            estimate = make_denoise(
                model,
                schedule,
                captions,
                empty_like(captions, model.encode_empty(null_ids, null_mask)),
                prediction_type=settings.diffusion.prediction_type,
                guidance=options.guidance,
                caption=settings.context.caption,
            )

            def denoise(x, t, s):
                return changed(estimate(x, t, s), t)

            return to_uint8(
                run(denoise, x_T, schedule, timesteps, options.eta, key, settings.context.shift)
            )

        self._sample = sample

    def __call__(
        self, params: PyTree, records: Sequence[dict[str, Any]], seed: int, batch_size: int = 64
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Sample in batches; the last is filled up with the first record, to compile once."""
        length, key = self._settings.data.max_length, make_key(seed)
        null = self._tokenizer.encode([""], length)
        images = []
        for start in range(0, len(records), batch_size):
            part = list(records[start : start + batch_size])
            real = len(part)
            part += [records[0]] * (min(batch_size, len(records)) - real)
            x0 = to_unit(np.stack([record["image"] for record in part]))
            text = self._tokenizer.encode([record["caption"] for record in part], length)
            noise_key, step_key = jax.random.split(jax.random.fold_in(key, start))
            x_T = jax.random.normal(noise_key, x0.shape)
            images.append(np.asarray(self._sample(params, x0, x_T, step_key, *text, *null))[:real])
        return np.concatenate(images)
