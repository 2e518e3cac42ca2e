"""Errors in one line, for the person at the terminal."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that can't go on; its text is the one line for the person at the terminal."""


def one_line(error: BaseException) -> str:
    """The error's text in one line; its class's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
