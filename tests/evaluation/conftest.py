import lavis_evlgen  # noqa: F401  (its bridges come before LAVIS)
