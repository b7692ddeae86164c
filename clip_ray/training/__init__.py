"""The training run: engine, step, checkpoint, workers."""
