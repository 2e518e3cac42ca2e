"""The program that makes a batch of pictures: `sampling`, jitted, with its noise drawn in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from contextdiff_jax.inference.opened import Opened
from contextdiff_jax.inference.sampling import Method, Preview, Small, make_sample
from contextdiff_jax.models.pixels import to_uint8
from contextdiff_jax.parallel.mesh import place, replicated, tracing_for


def jitted(
    opened: Opened,
    mesh: Mesh | None,
    method: Method,
    shape: tuple[int, int, int],
    preview: Preview | None = None,
) -> Callable:
    """The jitted `pictures(weights, noise_key, numbers, noise, text, steps, guidance, key, picture,
    guide, small)`, keys as data: noise is drawn from (noise_key, number of the picture) where none
    is given. `guide`: the weaker model's weights, ids and mask; `small`: an upsampler's pictures
    and the level of their noise. Gives the pictures, and which of them are of finite values.
    """
    sample = make_sample(opened.process, method, preview)

    def pictures(
        weights,
        noise_key,
        numbers,
        noise,
        text,
        steps,
        guidance,
        key,
        picture=None,
        guide=None,
        small=None,
    ):
        draw = functools.partial(jax.random.fold_in, jax.random.wrap_key_data(noise_key))
        if noise is None:
            noise = jax.vmap(lambda n: jax.random.normal(draw(n), shape))(numbers)
        if mesh is not None:
            spread = place(mesh, noise.shape, ("batch", "rows", None, None), opened.rules)
            noise = jax.lax.with_sharding_constraint(noise, spread)
        with tracing_for(mesh, opened.rules):
            model = opened.build(weights)
            key = jax.random.wrap_key_data(key)
            weaker = opened.build_weaker(guide)
            if small is not None:  # its noise: the second use of the picture's key
                own = jax.vmap(lambda n: jax.random.fold_in(draw(n), 1))(numbers)
                small = Small(*small, own)
            x = sample(model, noise, text, steps, guidance, key, picture, weaker, small)
        return to_uint8(x), jnp.isfinite(x).all((1, 2, 3))

    return jax.jit(pictures, out_shardings=None if mesh is None else replicated(mesh))


class Listener:
    """A listener to whom a compiled program shows its estimates of x0; whom it tells can change."""

    def __init__(self):
        self._target: Callable | None = None

    def __call__(self, t: np.ndarray, x0: np.ndarray) -> None:
        if self._target is not None:
            self._target(t, x0)

    @contextlib.contextmanager
    def calling(self, target: Callable) -> Iterator[None]:
        """Tells `target` inside of the block."""
        self._target = target
        try:
            yield
        finally:
            self._target = None
