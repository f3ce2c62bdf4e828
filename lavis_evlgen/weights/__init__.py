"""Weights from and to disk: sources, checks, what trains, bundles, model cards."""
