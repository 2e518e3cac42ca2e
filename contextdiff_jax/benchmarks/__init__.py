"""Measurements of the `benchmark` command, a file a mode."""
