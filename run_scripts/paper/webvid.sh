#!/usr/bin/env bash
# Tables 3 and 4, pre-training on 2M clips of WebVid. bash run_scripts/paper/webvid.sh ROW CHECKPOINT [KEY=VALUE ...]
#   ROW         video, concat, mean; temporal_qformer, temporal_queries (in the style of Video-LLaMA, VideoChat)
#   CHECKPOINT  the image model that it starts from: checkpoint_last.pth of a run of table1_opt.sh, or a bundle
# The paper does not give the batch: 64 clips a step here (GLOBAL_BATCH), 8 of a GPU at a time (BATCH).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash run_scripts/paper/video_row.sh webvid "$@"
