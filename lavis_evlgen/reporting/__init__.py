"""What a run leaves for people: run cards, plots."""
