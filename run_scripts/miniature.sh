#!/usr/bin/env bash
# The paper's comparison in miniature: TomeFormer against BLIP-2's Q-Former, average pooling, a linear projection and
# a blind model, on photos with captions. A few hours on two CPU cores; run it again to go on where it was cut off.
#
#   bash run_scripts/miniature.sh IMAGES CAPTIONS [--steps 240] [--seeds 42 1 2]
#
# IMAGES is a folder of 1,000 or more pictures, CAPTIONS their captions (docs/your_own.md); --help shows the options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --help ]; then
    exec bash run_scripts/start.sh python benchmarks/miniature.py --help
fi
[ $# -ge 2 ] || { echo "miniature: which pictures, and which captions? e.g. data/flickr8k/images data/flickr8k/captions.txt" >&2; exit 2; }
images=$1 captions=$2
shift 2
exec bash run_scripts/start.sh python benchmarks/miniature.py --images "$images" --captions "$captions" "$@"
