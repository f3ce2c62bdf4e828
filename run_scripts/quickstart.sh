#!/usr/bin/env bash
# Train the quickstart EVLGen on CPU, from an empty machine: no hub, no data set, no GPU.
# Arguments go to train.py, e.g. --options run.max_iters=100.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run_scripts/setup_environment.sh
exec .venv/bin/python train.py --cfg-path projects/evlgen/quickstart.yaml "$@"
