"""The section `super_resolution` of a config."""

from __future__ import annotations

import dataclasses
import typing

from contextdiff_jax.runtime.fields import check_at_least

if typing.TYPE_CHECKING:
    from contextdiff_jax.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig:
    """What makes a model an upsampler, one that enlarges pictures (docs/cascade.md)."""

    factor: int = 0  # how many times as long a picture's sides become; 0: no upsampler
    # largest level of the noise on the low-resolution picture in training, of 0 (none) to 1 (all)
    max_level: float = 1.0

    def __post_init__(self):
        check_at_least(self, "super_resolution", factor=0)
        if self.factor == 1:
            raise ValueError("super_resolution.factor=1: must be at least 2, or 0 for no upsampler")
        if not 0 <= self.max_level <= 1:
            raise ValueError(f"super_resolution.max_level={self.max_level}: must lie in [0, 1]")

    @property
    def is_upsampler(self) -> bool:
        """Whether pictures are enlarged."""
        return self.factor > 0

    def check_level(self, level: float) -> None:
        """Raises ValueError for a level in sampling that training never drew."""
        if level > self.max_level:
            raise ValueError(
                f"augmentation={level}: must be at most {self.max_level}, "
                "super_resolution.max_level, which the model was trained with"
            )


def check_upsampler(settings: Settings) -> None:
    """Raises ValueError for settings that don't fit an upsampler, or that need one."""
    config, context, data = settings.super_resolution, settings.context, settings.data
    if not config.is_upsampler:
        if context.network.reads_low:
            raise ValueError(
                f"context.kind={context.kind!r}: reads an upsampler's low-resolution picture; "
                "needs super_resolution.factor"
            )
        return
    config.check_level(settings.sample.augmentation)
    if settings.sample.prompts:
        raise ValueError(
            "sample.prompts: an upsampler's samples are of held-out pictures with their captions; "
            "must be ()"
        )
    if data.kind.is_cache and settings.latent.vae:
        raise ValueError(
            f"data.source={data.source!r}: holds latents; super_resolution.factor needs pictures"
        )
    # of pixels a side that one value of the low-resolution x0 stands for
    unit = config.factor * (settings.latent.config.downscale if settings.latent.vae else 1)
    for field in ("image_size", "crop_size"):
        if getattr(data, field) % unit:
            raise ValueError(
                f"data.{field}={getattr(data, field)}: must be a multiple of {unit}, by "
                "super_resolution.factor"
            )
