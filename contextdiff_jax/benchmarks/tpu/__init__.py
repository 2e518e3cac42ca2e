"""Programs for TPUs that are not here: compiled ahead of time, read, set against the roofline."""
