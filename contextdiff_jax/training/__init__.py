"""Training: state, step, checkpoints, log, and their story in loop.py."""
