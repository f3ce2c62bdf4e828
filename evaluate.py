"""Evaluate a model on a config's test_splits. `python evaluate.py --help` shows how."""

from lavis_evlgen.launch import main

if __name__ == "__main__":
    main("evaluate.py", "Evaluate a model on the test_splits of a run config.", evaluate=True)
