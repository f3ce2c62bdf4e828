#!/usr/bin/env bash
# How many tokens the connector leaves, and which layer of the ViT it reads, swept in miniature on photos with captions.
# Hours on two CPU cores; run it again to go on where it was cut off.
#
#   bash run_scripts/ablations.sh IMAGES CAPTIONS [--steps 80] [--seeds 42 1 2] [--sweeps tokens vit_layer]
#
# IMAGES is a folder of 1,000 or more pictures, CAPTIONS their captions (docs/your_own.md); --help shows the options.
exec bash "$(dirname "${BASH_SOURCE[0]}")/photos.sh" ablations "$@"
