"""Scripts that train and compare models in miniature."""
