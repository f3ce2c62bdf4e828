"""What the scripts share: timing, training runs, models with random weights, tables of results."""
