"""Training: the loop, its steps, metric files and curves."""
