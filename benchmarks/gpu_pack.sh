#!/usr/bin/env bash
# Pack what benchmarks/gpu.sh needs on a machine without network into build/gpu/part1, part2, ...
#
#   bash benchmarks/gpu_pack.sh --photos DIR --captions FILE [--mb 56]        # --help has all options
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash run_scripts/start.sh "${PYTHON:-python}" -m benchmarks.gpu.pack "$@"
