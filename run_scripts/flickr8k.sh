#!/usr/bin/env bash
# Real photos in an hour: Flickr8k with a frozen language model, with LoRA and with all of it learning, three seeds each.
# Nine hours on two CPU cores; run it again to go on where it was cut off.
#
#   bash run_scripts/flickr8k.sh IMAGES CAPTIONS [--arms lora] [--seeds 42 1 2] [--minutes 60]
#
# CAPTIONS has the official split, as Karpathy's dataset_flickr8k.json or a table with a column `split` (docs/your_own.md).
exec bash "$(dirname "${BASH_SOURCE[0]}")/photos.sh" flickr8k "$@"
