"""ContextDiff in JAX: text-to-image diffusion whose forward and reverse process share a context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextdiff_jax.inference import Pipeline

__all__ = ["Pipeline", "__version__"]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Imports `Pipeline`, and JAX with it, when it is asked for: commands set JAX up first."""
    if name == "Pipeline":
        from contextdiff_jax.inference import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
