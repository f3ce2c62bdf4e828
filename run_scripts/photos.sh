#!/usr/bin/env bash
# A benchmark on photos with captions: what miniature.sh and ablations.sh have in common.
#
#   bash run_scripts/photos.sh NAME IMAGES CAPTIONS [OPTION ...]     # benchmarks/experiments/NAME.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:?which benchmark?}
shift
if [ "${1:-}" = --help ]; then
    exec bash run_scripts/start.sh python -m "benchmarks.experiments.$name" --help
fi
[ $# -ge 2 ] || { echo "$name: which pictures, and which captions? e.g. data/flickr8k/images data/flickr8k/captions.txt" >&2; exit 2; }
images=$1 captions=$2
shift 2
exec bash run_scripts/start.sh python -m "benchmarks.experiments.$name" --images "$images" --captions "$captions" "$@"
