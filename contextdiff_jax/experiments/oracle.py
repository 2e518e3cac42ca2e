"""Sampling with the true picture's context in every step: what an ideal estimate of the context could bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree, UInt8

from contextdiff_jax import diffusion
from contextdiff_jax.data import Tokenizer
from contextdiff_jax.generation import to_uint8
from contextdiff_jax.models.contextdiff import make_denoise
from contextdiff_jax.settings import SampleConfig, Settings
from contextdiff_jax.training.state import model_graph


class OracleGenerator:
    """`generator(params, records, seed) -> uint8 [N, H, W, 3]`: a picture for each record's caption, by a reverse process
    whose r_hat is r_phi(the record's picture, caption). ValueError for a context that depends on time."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, options: SampleConfig):
        if settings.context.time_dependent:
            raise ValueError("context.time_dependent=True: the oracle computes r once, for all times")
        self._settings, self._tokenizer = settings, tokenizer
        graph, schedule = model_graph(settings), settings.diffusion.make_schedule()
        timesteps = diffusion.spaced_timesteps(schedule.num_timesteps, options.steps, options.spacing)
        run = diffusion.get_sampler(options.sampler)

        @jax.jit
        def sample(params, x0, x_T, key, ids, mask, null_ids, null_mask):
            model = nnx.merge(graph, params)
            texts = model.encode(ids, mask, null_ids, null_mask)
            r = model.context(x0, *texts[:2])
            estimate = make_denoise(
                model, schedule, *texts, prediction_type=settings.diffusion.prediction_type, guidance=options.guidance
            )

            def denoise(x, t, s):
                return estimate(x, t, s)._replace(context_t=r, context_s=r)

            return to_uint8(run(denoise, x_T, schedule, timesteps, options.eta, key, settings.context.shift))

        self._sample = sample

    def __call__(
        self, params: PyTree, records: Sequence[dict[str, Any]], seed: int, batch_size: int = 64
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """The last batch is filled up with the first record: one shape, one compilation."""
        length, key = self._settings.data.max_length, jax.random.key(seed)
        null = self._tokenizer.encode([""], length)
        images = []
        for start in range(0, len(records), batch_size):
            part = list(records[start : start + batch_size])
            real = len(part)
            part += [records[0]] * (min(batch_size, len(records)) - real)
            x0 = np.stack([record["image"] for record in part]).astype(np.float32) / 127.5 - 1
            text = self._tokenizer.encode([record["caption"] for record in part], length)
            noise_key, step_key = jax.random.split(jax.random.fold_in(key, start))
            x_T = jax.random.normal(noise_key, x0.shape)
            images.append(np.asarray(self._sample(params, x0, x_T, step_key, *text, *null))[:real])
        return np.concatenate(images)
