#!/usr/bin/env bash
# Make the pictures of README.md and docs/ anew from a trained quickstart, by the commands that users have.
#
#   bash run_scripts/pictures.sh output/evlgen/quickstart/RUN
#
# The page of `evlgen demo` is photographed where there is a Chromium.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 1 ] && [ -e "$1/captions.png" ] || { echo "pictures: which run of quickstart.yaml? e.g. output/evlgen/quickstart/20260101-120000" >&2; exit 2; }
run=$1 images=docs/images
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

cp "$run/captions.png" $images/quickstart_captions.png
cp "$run/loss.png" $images/quickstart_loss.png
# the second picture of the test split on captions.png
.venv/bin/python -c '
import sys
from lavis_evlgen.datasets import ScenesDataset
ScenesDataset("test", 2, kinds={"single": 1, "pair": 0, "count": 0}).pil_image(1).save(sys.argv[1])' "$made/scene.png"
.venv/bin/evlgen tokens "$made/scene.png" --run "$run" --before --layers --out "$made"
cp "$made/scene_tokens.png" $images/tokens.png
cp "$made/scene_layers.gif" $images/tokens_layers.gif
if command -v chromium >/dev/null; then
    .venv/bin/python run_scripts/demo_screenshot.py "$run" --scene 5
else
    echo "pictures: no chromium here, $images/demo.png stays as it is" >&2
fi
ls -l $images
