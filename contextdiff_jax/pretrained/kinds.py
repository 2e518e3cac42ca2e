"""Kinds of models: what is particular about one, and how it is read.

One `Model` is declared in each of unet.py, vae.py, clip.py and t5.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from contextdiff_jax.models.precision import Precision
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.pretrained.names import Rules
from contextdiff_jax.runtime.terminal import reading

# The fields by which a config.json says what the folder holds.
IDENTITY = ("_class_name", "architectures", "model_type")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A kind of model: how its folder is recognised, configured, built and named.

    Attributes:
      kind: its name in our folders.
      weights_file: its name of the single safetensors file.
      classes: names that its config.json may have in `_class_name` or `architectures`.
      model_types: names that it may have in `model_type`.
      make_config: (config.json's values, the stored tensors' names) -> config.
      restore_config: the fields of a config -> config.
      to_json: module -> config.json's values.
      build: (config, rngs=, precision=) -> module.
      rules: config -> the name map's rules.
    """

    kind: str
    weights_file: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    make_config: Callable[[Mapping[str, Any], Collection[str]], Any]
    restore_config: Callable[..., Any]
    to_json: Callable[[nnx.Module], dict[str, Any]]
    build: Callable[..., nnx.Module]
    rules: Callable[[Any], Rules]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of reading a folder.

    Attributes:
      dtype: of the module's products.
      param_dtype: of the parameters; None: each tensor as it is stored, so that saving gives the
          same bits.
      widen: parameters that are stored in fewer bits than `dtype`, which holds their values, are
          of type `dtype`: a program that uses them needn't hold them twice.
      shardings: the module's abstract parameters -> a tree of shardings like them, for example
        `functools.partial(state_shardings, mesh)`: each tensor goes straight to its shards.
      described: a folder may hold config.json alone, and then gives the shapes of its parameters:
        enough to compile for (benchmarks.tpu.aot).
      progress: wraps the loop over the tensors; by default a bar, on a terminal.
    """

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype | None = None
    widen: bool = False
    shardings: Callable[[PyTree], PyTree] | None = None
    described: bool = False
    progress: Callable[[Collection], Iterable] = reading

    def held(self, stored: DTypeLike) -> DTypeLike:
        """The type of a parameter that is stored as `stored`."""
        if self.param_dtype is not None:
            return self.param_dtype
        fits = jnp.promote_types(stored, self.dtype) == self.dtype
        return self.dtype if self.widen and fits else stored

    @property
    def precision(self) -> Precision:
        """The module's, before its parameters are read."""
        return Precision(params=self.param_dtype or jnp.float32, compute=self.dtype)


def identity_problem(model: Model, values: Mapping[str, Any]) -> str | None:
    """Why config.json's `values` are not of `model`, or None."""
    for field in IDENTITY:
        value = values.get(field)
        allowed = model.model_types if field == "model_type" else model.classes
        wrong = [
            name
            for name in (value if isinstance(value, list) else [value])
            if name not in (None, *allowed)
        ]
        if wrong:
            wanted = ", ".join(allowed or model.classes)
            return f"{field}={wrong[0]!r}: another architecture; a {model.kind} folder has {wanted}"
    return None


def abstract(model: Model, config: Any, options: Options) -> nnx.Module:
    """The module without arrays: the random initialisation of a large one would cost more than
    reading the file.
    """
    precision = options.precision
    return nnx.eval_shape(lambda: model.build(config, rngs=Undrawn(), precision=precision))


def shardings_of(module: nnx.Module, options: Options) -> PyTree | None:
    """The tree of shardings that the options ask for."""
    return None if options.shardings is None else options.shardings(nnx.state(module, nnx.Param))


def common_dtype(module: nnx.Module) -> dict[str, str]:
    """{"dtype": name}, transformers' field, if all parameters have one type."""
    names = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))}
    return {"dtype": names.pop()} if len(names) == 1 else {}
