"""Training tasks, which define the model, batches, loss and predictions for a config."""
