"""What a run keeps so that it can go on: checkpoints, resuming, its lock, stopping on signals."""
