"""What a run leaves for people: run cards, logs, plots."""
