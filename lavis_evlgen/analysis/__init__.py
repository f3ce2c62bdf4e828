"""Looking at configs, models and runs from outside."""
