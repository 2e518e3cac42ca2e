"""Checks of a config's fields: of the right type, within their bounds, named where they aren't."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def no_type_check(cls: type) -> type:
    """Marks a class of values from files: the tests' check of types leaves its constructor alone,
    by this name, so that wrong values reach the class's own checks. typing's decorator of this name
    would hide the fields' types, too.
    """
    return cls


def check_choice(
    field: str, value: Any, allowed: typing.Collection[str | None], scope: str = ""
) -> None:
    """Raises ValueError, naming `field` and what is allowed, unless value is one of `allowed`;
    `scope`: what they are allowed for, if other values are for something else.
    """
    if value not in allowed:
        unknown = f"unknown for {scope}" if scope else "unknown"
        raise ValueError(f"{field}={value!r}: {unknown}; one of {', '.join(map(str, allowed))}")


def check_known(field: str, name: str, known: typing.Iterable[str]) -> None:
    """Raises ValueError, with the nearest names, unless `name` is one of the `known` fields;
    `field`: how the error names it.
    """
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(f"{field}: unknown field; nearest: {', '.join(near) or 'none'}")


def check_at_least(section: Any, name: str, **minima: float) -> None:
    """Raises ValueError for the first field of dataclass `section` that is under its minimum."""
    for field, minimum in minima.items():
        if not getattr(section, field) >= minimum:  # nan is neither
            raise ValueError(
                f"{name}.{field}={getattr(section, field)}: must be at least {minimum}"
            )


def strict(cls: type, section: str, values: Mapping[str, Any], **filled: Any) -> Any:
    """cls(**values), with an unknown or ill-typed field named in one line."""
    hints, found = typing.get_type_hints(cls), {}
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{section}={values!r}: must be a section with the fields {', '.join(hints)}"
        )
    for name, value in values.items():
        check_known(f"{section}.{name}={value!r}", name, hints)
        found[name] = typed(f"{section}.{name}", value, hints[name])
    return cls(**found, **filled)


def defaults(cls: type) -> dict[str, Any]:
    """Return {field: default} of a dataclass, and the same of each dataclass in it. Fields without
    a default are left out.
    """
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = defaults(hints[field.name])
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def check_section(section: str, values: Any) -> None:
    """Raises ValueError unless the config's `section` has fields."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{section}={values!r}: must be a section, with fields")


def check_types(cls: type, section: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError for a value of another type than the dataclass `cls` has for its field, and
    for a whole number under 1.
    """
    hints = typing.get_type_hints(cls)
    for name in values.keys() & hints.keys():
        value = typed(f"{section}.{name}", values[name], hints[name])
        if type(value) is int and hints[name] is not float and value < 1:
            raise ValueError(f"{section}.{name}={value}: must be at least 1")


def typed(field: str, value: Any, kind: Any) -> Any:
    """`value` as `field`, of type `kind`, holds it: lists as tuples, numbers finite.

    Raises ValueError, naming the field, if it is of another type.
    """
    try:
        found = _typed(value, kind)
    except TypeError:
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ValueError(f"{field}={value!r}: must be of type {name}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{field}={value}: must be a finite number")
    return found


def _typed(value: Any, kind: Any) -> Any:
    """TypeError if the value is of another type."""
    origin, kinds = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for one in kinds:
            with contextlib.suppress(TypeError):
                return _typed(value, one)
        raise TypeError
    if origin is tuple:
        if isinstance(value, str) and kinds == (str, ...):
            return (value,)  # ('a dog') is no tuple: the comma is easily forgotten
        if not isinstance(value, list | tuple):
            raise TypeError
        kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
        if len(kinds) != len(value):
            raise TypeError
        return tuple(map(_typed, value, kinds))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    kind = origin or kind
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise TypeError
    return value
