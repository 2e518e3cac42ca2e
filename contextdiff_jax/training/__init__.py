"""Training: a run's story in loop.py, the loop in run_steps.py, one step in step.py."""
