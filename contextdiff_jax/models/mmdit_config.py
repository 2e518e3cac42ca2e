"""The multimodal transformer's sizes and options under diffusers' names, checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from contextdiff_jax.models.config import known_fields, without_ours
from contextdiff_jax.runtime.fields import check_choice, no_type_check


class Stack(NamedTuple):
    """Layers `first` to `first + count - 1`, which are alike and run as one scan.

    `dual`: with a second attention, of the picture alone. `last`: the network's end, where the
    text is read for the last time.
    """

    first: int
    count: int
    dual: bool
    last: bool


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """diffusers' `SD3Transformer2DModel` config (names and defaults), `context_head` and
    `low_resolution`.

    The width is `num_attention_heads` x `attention_head_dim`. `sample_size` is the side that the
    position's unit belongs to, `pos_embed_max_size` the largest side in patches.
    Raises ValueError, one line with field, value and what is allowed.
    """

    sample_size: int = 128  # side of x0 that positions are measured in
    patch_size: int = 2  # side of a patch, in values of x0
    in_channels: int = 16  # of x_t
    num_layers: int = 18  # joint blocks
    attention_head_dim: int = 64  # width of a head
    num_attention_heads: int = 18  # heads; times attention_head_dim, the network's width
    joint_attention_dim: int = 4096  # width of the text's tokens
    caption_projection_dim: int = 1152  # must be the network's width
    pooled_projection_dim: int = 2048  # width of the pooled text
    out_channels: int | None = 16  # of the prediction; None: in_channels
    pos_embed_max_size: int = 96  # largest side, in patches
    # layers with a second attention, of the picture alone (3.5 medium)
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None  # norm of queries and keys: rms_norm (3.5), or none (3)
    context_head: bool = False  # a second output, the estimate of r
    low_resolution: bool = False  # a low-resolution picture and its noise's level are read, too
    OURS: ClassVar = {"context_head": False, "low_resolution": False}  # what diffusers lacks, off

    def __post_init__(self):
        check_choice("model.qk_norm", self.qk_norm, (None, "rms_norm"))
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"model.caption_projection_dim={self.caption_projection_dim}: must be "
                f"num_attention_heads x attention_head_dim = {self.width}"
            )
        if self.width % 4:
            raise ValueError(
                f"model.attention_head_dim={self.attention_head_dim}: x num_attention_heads must "
                "be a multiple of 4"
            )
        wrong = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if wrong:
            raise ValueError(
                f"model.dual_attention_layers={self.dual_attention_layers}: layer {wrong[0]} is "
                f"none of the {self.num_layers}"
            )
        side = self.sample_size // self.patch_size
        if side < 1 or side > self.pos_embed_max_size:
            raise ValueError(
                f"model.pos_embed_max_size={self.pos_embed_max_size}: must be at least "
                f"sample_size / patch_size = {side}, and that at least 1"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MMDiTConfig:
        """A config from a diffusers config.json (or ours). Keys with a leading underscore are
        metadata. ValueError for an unknown key, with the nearest names.
        """
        config = cls(**known_fields(cls, "model", values, {}))
        return dataclasses.replace(config, out_channels=config.out_channels or config.in_channels)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`: diffusers' names, and ours where they are not off."""
        return without_ours(self)

    @property
    def width(self) -> int:
        """Features of a token inside the network."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def granularity(self) -> int:
        """What x's height and width must be multiples of."""
        return self.patch_size

    @property
    def text_width(self) -> int:
        """Features of the text's tokens that it reads."""
        return self.joint_attention_dim

    @property
    def pooled_features(self) -> int:
        """Width of the pooled text that it reads."""
        return self.pooled_projection_dim

    def text_fields(self, width: int, pooled: int | None = None) -> dict[str, tuple[int, int]]:
        """{field: (its value, the one that fits a text encoder of this width)}; `pooled`: the width
        of its pooled text, if that is another.
        """
        return {
            "joint_attention_dim": (self.joint_attention_dim, width),
            "pooled_projection_dim": (
                self.pooled_projection_dim,
                width if pooled is None else pooled,
            ),
        }

    def stacks(self) -> tuple[Stack, ...]:
        """The layers in order, neighbours that are alike together."""
        kinds = [
            (i in self.dual_attention_layers, i == self.num_layers - 1)
            for i in range(self.num_layers)
        ]
        counts = [(kind, len(list(alike))) for kind, alike in itertools.groupby(kinds)]
        firsts = itertools.accumulate((count for _, count in counts), initial=0)
        return tuple(
            Stack(first, count, *kind) for first, (kind, count) in zip(firsts, counts, strict=False)
        )
