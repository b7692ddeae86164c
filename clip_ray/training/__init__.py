"""The training run: engine, loop, checkpoints, workers."""
