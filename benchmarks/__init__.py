"""What a step costs (speed/), what a setting does (experiments/): README.md says which script answers what."""
