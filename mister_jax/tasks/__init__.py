"""Tasks: what is trained, and how a config becomes a model, batches, a loss and predictions."""
