"""Data sets that LAVIS builds by name."""
