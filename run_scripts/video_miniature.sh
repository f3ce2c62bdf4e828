#!/usr/bin/env bash
# EVLGen-Video in miniature: each way to mix the frames of a clip, on drawn clips whose captions only the order of
# frames tells. Hours on two CPU cores; run it again to go on where it was cut off.
#
#   bash run_scripts/video_miniature.sh [--steps 80] [--seeds 42 1 2] [--jobs 2]
#
# --help shows the options; docs/results/video.md says what is compared.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash run_scripts/start.sh python -m benchmarks.experiments.video_scenes "$@"
