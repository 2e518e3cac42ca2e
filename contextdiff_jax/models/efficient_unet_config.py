"""The efficient UNet's sizes and options, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from contextdiff_jax.models.config import known_fields
from contextdiff_jax.models.layers import ACTIVATIONS
from contextdiff_jax.runtime.fields import check_choice, no_type_check

ATTENTIONS = ("none", "text", "all")


@no_type_check
@dataclasses.dataclass(frozen=True)
class EfficientLevel:
    """One resolution, with every per-level option resolved."""

    channels: int
    num_layers: int
    attention: str
    num_heads: int
    depth: int


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientUNetConfig:
    """Sizes of `EfficientUNet`; the defaults are Imagen's of 64 to 256 pixels. Names that a UNet's
    config has too mean the same.

    A tuple gives one value a level, from the finest.
    Raises ValueError, one line with field, value and what is allowed.
    """

    sample_size: int | None = None  # side of x0; nothing reads it
    in_channels: int = 3  # of x_t
    out_channels: int = 3  # of the prediction
    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024)  # channels of each level
    # residual blocks a level, as many again on the way up
    layers_per_block: int | tuple[int, ...] = (2, 4, 8, 8)
    # after a level's residual blocks: none, to the text, or all (to the level's own pixels, too)
    attention: tuple[str, ...] = ("none", "none", "none", "all")
    num_attention_heads: int | tuple[int, ...] = 8  # heads of it
    transformer_layers_per_block: int | tuple[int, ...] = 1  # transformer blocks of it
    cross_attention_dim: int = 4096  # width of the text's tokens
    # width of the pooled text, which joins the time embedding; None: it doesn't
    pooled_projection_dim: int | None = None
    act_fn: str = "silu"  # activation
    norm_num_groups: int = 32  # of the group norms
    norm_eps: float = 1e-5  # of the group norms
    resnet_time_scale_shift: str = "scale_shift"  # how time enters a residual block
    time_embedding_dim: int | None = None  # width; None: four times the first level's
    patch_size: int = 1  # pixels a side that become channels before the network
    context_head: bool = False  # a second output, the estimate of r
    low_resolution: bool = False  # a low-resolution picture and its noise's level are read, too

    def __post_init__(self):
        check_choice("model.act_fn", self.act_fn, ACTIVATIONS)
        choices = ("default", "scale_shift")
        check_choice("model.resnet_time_scale_shift", self.resnet_time_scale_shift, choices)
        if self.patch_size < 1:
            raise ValueError(f"model.patch_size={self.patch_size}: must be at least 1")
        for i, level in enumerate(self.levels()):
            check_choice("model.attention", level.attention, ATTENTIONS)
            if min(level.channels, level.num_layers, level.num_heads, level.depth) < 1:
                raise ValueError(f"model: level {i} is {level}; all its sizes must be at least 1")
            for field in ("norm_num_groups", "num_attention_heads"):
                parts = level.num_heads if field != "norm_num_groups" else self.norm_num_groups
                if level.channels % parts:
                    raise ValueError(
                        f"model.{field}={parts}: must divide "
                        f"model.block_out_channels[{i}]={level.channels}"
                    )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EfficientUNetConfig:
        """A config of its fields by name. ValueError for an unknown one, with the nearest names."""
        return cls(**known_fields(cls, "model", values, {}))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @property
    def granularity(self) -> int:
        """What x's height and width must be multiples of."""
        return self.patch_size

    @property
    def text_width(self) -> int:
        """Features of the text's tokens that it reads."""
        return self.cross_attention_dim

    @property
    def pooled_features(self) -> int | None:
        """Width of the pooled text that it reads, if it does."""
        return self.pooled_projection_dim

    def text_fields(self, width: int, pooled: int | None = None) -> dict[str, tuple[int, int]]:
        """{field: (its value, the one that fits a text encoder of this width)}; `pooled`: the width
        of its pooled text, if that is another.
        """
        fields = {"cross_attention_dim": (self.cross_attention_dim, width)}
        if self.pooled_projection_dim is not None:
            wanted = width if pooled is None else pooled
            fields["pooled_projection_dim"] = (self.pooled_projection_dim, wanted)
        return fields

    @property
    def time_features(self) -> int:
        """Width of the time embedding inside the network."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def levels(self) -> tuple[EfficientLevel, ...]:
        """The levels from the finest to the coarsest; ValueError if a per-level tuple has another
        length.
        """
        names = (
            *("layers_per_block", "attention"),
            *("num_attention_heads", "transformer_layers_per_block"),
        )
        columns = [self._per_level(name) for name in names]
        rows = zip(self.block_out_channels, *columns, strict=True)
        return tuple(EfficientLevel(*row) for row in rows)

    def _per_level(self, field: str) -> tuple:
        value, n = getattr(self, field), len(self.block_out_channels)
        if not isinstance(value, tuple):
            return (value,) * n
        if len(value) != n:
            raise ValueError(f"model.{field}={value}: must have {n} values, one a level")
        return value
