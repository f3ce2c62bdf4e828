"""`evlgen ablate`: many runs of one config."""
