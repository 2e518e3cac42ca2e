"""diffusers' config.json to the fields of one of our config classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from contextdiff_jax.runtime.fields import check_known


def known_fields(
    cls: type, section: str, values: Mapping[str, Any], off: Mapping[str, tuple]
) -> dict[str, Any]:
    """The fields of the dataclass `cls` in `values`, lists as tuples. Keys with a leading
    underscore are metadata.

    Args:
      section: names the config in errors. off: options that we lack, {key: the values that mean it
          isn't used}.

    Raises ValueError for an unknown key (with the nearest names) and for an option that we lack.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    known = {}
    for key, value in values.items():
        if key in fields:
            known[key] = tuple(value) if isinstance(value, list) else value
        elif key in off:
            if value not in off[key]:
                raise ValueError(
                    f"{section}.{key}={value!r}: not supported; "
                    f"only {', '.join(map(str, off[key]))}"
                )
        elif not key.startswith("_"):
            check_known(f"{section}.{key}={value!r}", key, fields)
    return known


def without_ours(config: Any) -> dict[str, Any]:
    """The config's fields, but for those that diffusers lacks (`OURS`) where they are off."""
    ours = config.OURS
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ours or v != ours[k]}
