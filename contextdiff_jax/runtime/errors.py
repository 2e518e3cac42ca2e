"""The error that ends a command with one line for the person at the terminal."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that can't go on; its text is the one line for the person at the terminal."""
