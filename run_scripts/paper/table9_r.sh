#!/usr/bin/env bash
# Table 9 and figure 3: merges per layer. bash run_scripts/paper/table9_r.sh R [KEY=VALUE ...]
#   R  10, 13, 16, 19, 22 or 25 in the paper;  OPT-2.7b, CCS-14M + COCO, 60k steps
# 160 pictures a step (GLOBAL_BATCH), 20 of a GPU at a time (BATCH): projects/evlgen/ccs.yaml says what is known.
# The run itself scores its best checkpoint on COCO test; the table is of val: zero_shot.sh coco checkpoint_last.pth,
# which takes r from the checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
r=${1:-}
[[ $r =~ ^[0-9]+$ ]] || { echo "table9_r: how many merges per layer? e.g. 19" >&2 && exit 2; }
shift
export BATCH=${BATCH:-20} GLOBAL_BATCH=${GLOBAL_BATCH:-160}
exec bash run_scripts/launch.sh projects/evlgen/ccs.yaml "model.tome_r=$r" \
    run.output_dir=output/paper/table9 "run.run_name=r$r" "$@"
