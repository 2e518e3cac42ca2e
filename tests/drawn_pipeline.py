"""A pipeline whose pictures say what they are of, in the place of one that samples."""

from __future__ import annotations

import types

import numpy as np

from contextdiff_jax import Pipeline
from contextdiff_jax.settings import SampleConfig


class Drawn(Pipeline):
    """A pipeline whose pictures say which prompt, number and batch they are of."""

    def __init__(self, weights=0.0, fails_at=None):
        self.calls, self.fails_at = [], fails_at
        self.opened = types.SimpleNamespace(
            source="drawn", options=SampleConfig(), weights=({"w": np.full(100, weights)},)
        )
        self.opened.guide = None

    def text_to_image(self, prompts, *, first, batch_size, **options):
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append((first, options))
        pictures = np.zeros((len(prompts), 4, 4, 3), np.uint8)
        for i, prompt in enumerate(prompts):
            pictures[i] = len(prompt), first + i, first // batch_size
        return pictures
