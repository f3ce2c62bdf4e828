#!/usr/bin/env bash
# The paper's comparison in miniature: TomeFormer against BLIP-2's Q-Former, average pooling, a linear projection and
# a blind model, on photos with captions. A few hours on two CPU cores; run it again to go on where it was cut off.
#
#   bash run_scripts/miniature.sh IMAGES CAPTIONS [--steps 240] [--seeds 42 1 2]
#
# IMAGES is a folder of 1,000 or more pictures, CAPTIONS their captions (docs/your_own.md); --help shows the options.
exec bash "$(dirname "${BASH_SOURCE[0]}")/photos.sh" miniature "$@"
