"""The UNet's sizes and options under diffusers' names, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from contextdiff_jax.models.config import known_fields, without_ours
from contextdiff_jax.models.layers import ACTIVATIONS
from contextdiff_jax.runtime.fields import check_choice, no_type_check

_CHOICES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "act_fn": tuple(ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "addition_embed_type": (None, "text_time"),
}

# diffusers' options that we don't have: a config file may hold them at the value that switches them
# off.
_OFF: dict[str, tuple] = {
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0.0,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "addition_embed_type_num_heads": (64,),
}


@no_type_check
@dataclasses.dataclass(frozen=True)
class Level:
    """One resolution of the UNet, with every per-level option resolved."""

    channels: int
    num_layers: int
    num_heads: int
    depth: int
    text_features: int
    only_cross_attention: bool


@no_type_check
@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """diffusers' `UNet2DConditionModel` config (names and defaults), and ours: `patch_size`,
    `context_head` and `low_resolution`.

    A tuple gives one value a level, from the finest. `attention_head_dim` is, for historical
    reasons, the *number* of heads in diffusers; `num_attention_heads` overrides it.
    `upcast_attention` is accepted and changes nothing: logits and softmax are always float32.
    `patch_size`: the network works on patches of so many pixels a side, whose values are channels,
    so that its finest level is that much coarser than the picture.
    Raises ValueError, one line with field, value and what is allowed.
    """

    # side of x0; a Stable Diffusion folder's default picture size
    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4  # of x_t
    out_channels: int = 4  # of the prediction
    flip_sin_to_cos: bool = True  # order of the time embedding's halves
    freq_shift: float = 0  # of the time embedding's frequencies
    # one a level, from the finest
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # of the coarsest level
    # one a level, from the coarsest
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False  # no self-attention
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # channels of each level
    layers_per_block: int | tuple[int, ...] = 2  # residual blocks a level
    act_fn: str = "silu"  # activation
    norm_num_groups: int = 32  # of the group norms
    norm_eps: float = 1e-5  # of the group norms
    cross_attention_dim: int | tuple[int, ...] = 1280  # width of the text's tokens
    # transformer blocks after each residual block
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8  # number of heads (diffusers' name for it)
    # number of heads, in place of attention_head_dim
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False  # dense layers around a transformer, not 1x1 convolutions
    # text_time: pooled text and sizes join the time embedding, as in XL
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None  # width of each size's embedding
    # width of pooled text and sizes together
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool = False  # accepted, changes nothing
    # how time enters a residual block: added, or as scale and shift
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None  # width; None: four times the first level's
    patch_size: int = 1  # pixels a side that become channels before the network
    context_head: bool = False  # a second output, the estimate of r
    low_resolution: bool = False  # a low-resolution picture and its noise's level are read, too
    # what diffusers lacks, switched off
    OURS: ClassVar = {"patch_size": 1, "context_head": False, "low_resolution": False}

    def __post_init__(self):
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            for choice in value if isinstance(value, tuple) else (value,):
                check_choice(f"model.{field}", choice, allowed)
        for field in ("down_block_types", "up_block_types"):
            if len(getattr(self, field)) != len(self.block_out_channels):
                raise ValueError(
                    f"model.{field}={getattr(self, field)}: needs one entry for each of the "
                    f"{len(self.block_out_channels)} levels of model.block_out_channels"
                )
        if self.addition_embed_type == "text_time":
            for field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                if getattr(self, field) is None:
                    raise ValueError(
                        f"model.{field}=None: needed by addition_embed_type='text_time'"
                    )
        if self.patch_size < 1:
            raise ValueError(f"model.patch_size={self.patch_size}: must be at least 1")
        self._check_divisibility()

    def _check_divisibility(self) -> None:
        for i, level in enumerate(self.levels()):
            if min(level.channels, level.num_layers, level.num_heads, level.depth) < 1:
                raise ValueError(f"model: level {i} is {level}; all its sizes must be at least 1")
            if level.channels % self.norm_num_groups:
                raise ValueError(
                    f"model.norm_num_groups={self.norm_num_groups}: must divide "
                    f"model.block_out_channels[{i}]={level.channels}"
                )
            if level.channels % level.num_heads:
                raise ValueError(
                    f"model.attention_head_dim={level.num_heads} (number of heads): must divide "
                    f"model.block_out_channels[{i}]={level.channels}"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """A config from a diffusers config.json (or ours). Keys with a leading underscore are
        metadata.

        Raises ValueError for an unknown key (with the nearest names) and for an option that we
        lack.
        """
        return cls(**known_fields(cls, "model", values, _OFF))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`: diffusers' names, and ours where they are not off."""
        return without_ours(self)

    @property
    def granularity(self) -> int:
        """What x's height and width must be multiples of."""
        return 1

    @property
    def text_width(self) -> int | tuple[int, ...]:
        """Features of the text's tokens that it reads."""
        return self.cross_attention_dim

    def text_fields(self, width: int, pooled: int | None = None) -> dict[str, tuple[int, int]]:
        """{field: (its value, the one that fits a text encoder of this width)}; `pooled`: the width
        of its pooled text, if that is another.
        """
        fields = {"cross_attention_dim": (self.cross_attention_dim, width)}
        if self.addition_embed_type == "text_time":
            given = self.projection_class_embeddings_input_dim
            wanted = (width if pooled is None else pooled) + 6 * self.addition_time_embed_dim
            fields["projection_class_embeddings_input_dim"] = (given, wanted)
        return fields

    @property
    def time_features(self) -> int:
        """Width of the time embedding inside the network."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def pooled_features(self) -> int | None:
        """Width of the pooled text that is read beside the picture's sizes, if one is."""
        if self.addition_embed_type is None:
            return None
        return self.projection_class_embeddings_input_dim - 6 * self.addition_time_embed_dim

    def levels(self) -> tuple[Level, ...]:
        """The levels from the finest to the coarsest; ValueError if a per-level tuple has another
        length.
        """
        heads = "attention_head_dim" if self.num_attention_heads is None else "num_attention_heads"
        names = ("layers_per_block", heads, "transformer_layers_per_block", "cross_attention_dim")
        columns = [self._per_level(name) for name in (*names, "only_cross_attention")]
        return tuple(Level(*row) for row in zip(self.block_out_channels, *columns, strict=True))

    def _per_level(self, field: str) -> tuple:
        value, n = getattr(self, field), len(self.block_out_channels)
        if not isinstance(value, tuple):
            return (value,) * n
        if len(value) != n or not all(isinstance(v, int) for v in value):
            raise ValueError(
                f"model.{field}={value}: must be one int, or {n} of them (one a level)"
            )
        return value
