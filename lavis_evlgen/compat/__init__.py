"""The environment check, and bridges over differences between versions of LAVIS and transformers."""
