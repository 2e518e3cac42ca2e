"""What the `benchmark` command measures, a file a mode."""
