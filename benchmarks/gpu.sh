#!/usr/bin/env bash
# Everything that only a GPU can show, in three calls of at most ten minutes each; what is done is not run again.
#
#   bash benchmarks/gpu.sh 1 [--out DIR] [--seconds 570] [--archive FILE]     # then 2 and 3; --help has all options
#   EVLGEN_GPU_TINY=1 bash benchmarks/gpu.sh 1                                # a rehearsal, on any machine
#
# With build/gpu/site, which benchmarks/gpu_setup.sh unpacks, packages come from there; else from .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# else transformers 4 asks a JAX that happens to be installed for names that newer ones have not
export USE_FLAX=0 USE_TF=0 HF_HUB_OFFLINE=1
if [ -d build/gpu/site ]; then
    export PYTHONPATH="$PWD:$PWD/build/gpu/site:$PWD/build/gpu/stand_ins${PYTHONPATH:+:$PYTHONPATH}"
    exec "${PYTHON:-python3}" -m benchmarks.gpu.session "$@"
fi
exec bash run_scripts/start.sh "${PYTHON:-python}" -m benchmarks.gpu.session "$@"
