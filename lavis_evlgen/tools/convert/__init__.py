"""`evlgen convert`: released checkpoints to bundles and back."""
