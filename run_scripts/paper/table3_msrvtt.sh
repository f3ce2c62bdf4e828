#!/usr/bin/env bash
# Table 3: captions of MSR-VTT, fine-tuned. bash run_scripts/paper/table3_msrvtt.sh ROW CHECKPOINT [KEY=VALUE ...]
#   ROW     what the CHECKPOINT is
#   image   an image model's (table1_opt.sh): EVLGen-image, no video pre-training
#   video   that of webvid.sh video
#   concat  that of webvid.sh concat: frames one by one, their prompts concatenated
#   mean    that of webvid.sh mean: frames one by one, their prompts averaged
#   temporal_qformer, temporal_queries   that of the same row of webvid.sh (docs/video.md: in the style of)
#   scst    that of this script's row video: SCST on top
# 64 clips a step (GLOBAL_BATCH), 8 of a GPU at a time (BATCH), of 4 to 16 a GPU in the released settings.
# The run scores its best checkpoint on val on the test split, which is the table's (released: the last checkpoint).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash run_scripts/paper/video_row.sh table3_msrvtt "$@"
