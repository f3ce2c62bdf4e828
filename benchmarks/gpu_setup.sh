#!/usr/bin/env bash
# Unpack the parts of benchmarks/gpu_pack.sh that have arrived in build/gpu; run it again when more of them have.
#
#   bash benchmarks/gpu_setup.sh [--need packages|all]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.unpack "$@"
