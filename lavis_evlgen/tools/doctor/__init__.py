"""`evlgen doctor`: checks of data, weights and memory before training."""
