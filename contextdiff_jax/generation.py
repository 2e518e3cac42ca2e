"""From prompts to pictures: one compiled program for any number of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree, UInt8
from tqdm import tqdm

from contextdiff_jax.data import Tokenizer
from contextdiff_jax.keys import make_key
from contextdiff_jax.models.contextdiff import Frozen, make_sampler
from contextdiff_jax.parallel.mesh import place, replicated, tracing_for
from contextdiff_jax.programs import kept
from contextdiff_jax.settings import SampleConfig, Settings
from contextdiff_jax.tokens import warn_of_cut
from contextdiff_jax.training.frozen import load_frozen
from contextdiff_jax.training.state import build_model, model_graph


def configured_sampler(settings: Settings, options: SampleConfig) -> Callable:
    """`make_sampler`'s function by a run's schedule and shift, with the options of a SampleConfig."""
    chosen = dataclasses.asdict(options)
    del chosen["prompts"]
    return make_sampler(
        settings.diffusion.make_schedule(),
        prediction_type=settings.diffusion.prediction_type,
        shift=settings.context.shift,
        **chosen,
    )


def make_pictures(
    settings: Settings, options: SampleConfig, mesh: Mesh | None = None
) -> Callable[..., tuple[UInt8[Array, "N H W 3"], Bool[Array, N]]]:
    """The jitted program `pictures(params, frozen, noise_key, numbers, key, ids, mask, null_ids,
    null_mask)`, keys as data: the pictures, and which of them are of finite values.
    """
    sample = configured_sampler(settings, options)
    graph = model_graph(settings)

    def pictures(params, frozen, noise_key, numbers, key, *text):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(noise_key), numbers)
        x_T = jax.vmap(lambda key: jax.random.normal(key, settings.shape))(keys)
        if mesh is not None:
            spread = place(mesh, x_T.shape, ("batch", "rows", None, None), settings.mesh.rules)
            x_T = jax.lax.with_sharding_constraint(x_T, spread)
        with tracing_for(mesh, settings.mesh.rules):
            x0 = sample(
                build_model(graph, params, frozen), x_T, jax.random.wrap_key_data(key), *text
            )
        return to_uint8(x0), jnp.isfinite(x0).all((1, 2, 3))

    return jax.jit(pictures, out_shardings=None if mesh is None else replicated(mesh))


class NotFiniteError(ValueError):
    """Samples that would be black pictures: the networks, or the guidance, ran away."""


class Generator:
    """`generator(params, prompts, seed) -> uint8 [N, H, W, 3]` with the options of a SampleConfig.
    The frozen networks are read from their folders unless they are given.

    On a `mesh` the pictures are spread as a training batch is, and every process gets them all.
    `programs`: a folder where traced programs are kept (`programs.kept`).
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        options: SampleConfig | None = None,
        frozen: Frozen | None = None,
        mesh: Mesh | None = None,
        programs: epath.PathLike | None = None,
    ):
        self._settings, self._tokenizer = settings, tokenizer
        self.options = options or settings.sample
        self._frozen = load_frozen(settings) if frozen is None else frozen
        self._make = functools.cache(functools.partial(make_pictures, settings, self.options, mesh))
        self._programs, self._mesh = programs, mesh
        self._seen: set[str] = set()  # prompts whose lost words were named
        # refuses options that don't fit the schedule now, not when the first pictures are due
        configured_sampler(settings, self.options)

    def __call__(
        self,
        params: PyTree,
        prompts: Sequence[str],
        seed: int,
        batch_size: int = 64,
        *,
        first: int = 0,
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """One picture a prompt. Picture i's noise depends on (seed, i) alone, not on the number of
        prompts.

        `first`: the number of the first prompt, of one that has a share of a longer list.

        Raises ValueError for an empty list of prompts, NotFiniteError for a picture that is none.
        """
        if not prompts:
            raise ValueError(
                "--prompt: the list is empty; give at least one, as in --prompt='a large red circle'"
            )
        length = self._settings.data.max_length
        null_ids, null_mask = self._tokenizer.encode([""], length)
        self._warn_of_cut(prompts, length)
        noise_key, sampler_key = jax.random.split(make_key(seed))
        images, run = [], None
        starts = range(0, len(prompts), batch_size)
        for start in tqdm(
            starts, desc="samples", leave=False, disable=None if len(starts) > 1 else True
        ):
            part = list(prompts[start : start + batch_size])
            real, width = len(part), min(batch_size, len(prompts))
            part += [""] * (width - real)  # one shape, one compilation
            ids, mask = self._tokenizer.encode(part, length)
            # numpy, which every process has alike: arrays of one device can't enter a program of
            # many processes.
            keys = [
                np.asarray(jax.random.key_data(k))
                for k in (noise_key, jax.random.fold_in(sampler_key, first + start))
            ]
            numbers = np.arange(first + start, first + start + width)
            arguments = (
                params,
                self._frozen,
                keys[0],
                numbers,
                keys[1],
                ids,
                mask,
                null_ids,
                null_mask,
            )
            run = run or self._program(arguments)
            made, finite = (np.asarray(array)[:real] for array in run(*arguments))
            if not finite.all():
                raise NotFiniteError(
                    f"{real - finite.sum()} of {real} pictures, the first for {part[finite.argmin()]!r}: their values "
                    f"are not finite; lower the guidance, {self.options.guidance}, or train with a lower learning rate"
                )
            images.append(made)
        return np.concatenate(images)

    def _warn_of_cut(self, prompts: Sequence[str], length: int) -> None:
        """Once for each prompt, however often it is drawn."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._seen]
        self._seen.update(new)
        if new:
            warn_of_cut(new, self._tokenizer.encode_and_cut(new, length)[2], length)

    def _program(self, arguments: tuple) -> Callable:
        if self._programs is None:
            return self._make()
        options = dataclasses.replace(self.options, prompts=())
        return kept(
            self._programs, "sample", (self._settings, options, self._mesh), self._make, *arguments
        )


def to_uint8(x: Float[Array, "*B H W 3"]) -> UInt8[Array, "*B H W 3"]:
    """Pictures in [-1, 1], clipped, as they are stored."""
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)
