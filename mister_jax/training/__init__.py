"""Training: the loop, work directories, checkpoints and metrics."""
