"""Which of a model's parameters a run trains."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

from contextdiff_jax.models.lora import LORA


def of_context(path: tuple) -> bool:
    """Whether a parameter is the relational network's or the context head's."""
    return path[0] == "context" or "context_head" in path


TRAINABLE: dict[str, Callable[[tuple], bool]] = {
    "full": lambda path: True,
    "lora": lambda path: path[0] == LORA or of_context(path),
    "context": of_context,
}


def split_trainable(params: nnx.State, trainable: str) -> tuple[nnx.State, nnx.State]:
    """(what is trained, the rest); `nnx.merge_state` puts them together again."""
    if trainable == "full":
        return params, nnx.State({})
    flat = nnx.to_flat_state(params)
    chosen = TRAINABLE[trainable]
    parts = ([item for item in flat if chosen(item[0]) == wanted] for wanted in (True, False))
    return tuple(nnx.from_flat_state(part) for part in parts)
