"""Train a model as a run config says. `python train.py --help` shows how."""

from lavis_evlgen.launch import main

if __name__ == "__main__":
    main("train.py", "Train EVLGen (or another LAVIS model) as a run config says.")
