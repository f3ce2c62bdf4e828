#!/usr/bin/env bash
# Table 1: BLIP-2 with OPT-2.7b, retrained as the paper did (table 7): 250k steps of stage 1, then 80k of stage 2.
# bash run_scripts/paper/table1_blip2.sh STAGE [KEY=VALUE ...], STAGE 1 or 2. Stage 1 contrasts the pictures that all
# GPUs hold at once, so it wants all 1600 of them: BATCH=200 on 8 GPUs. Stage 2 scores its best checkpoint on COCO test;
# the table is of val: zero_shot.sh coco .../checkpoint_last.pth.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
stage=${1:-}
shift || true
case $stage in
    1) BATCH=${BATCH:-200} exec bash run_scripts/launch.sh projects/blip2/stage1.yaml "$@" ;;
    2) exec bash run_scripts/launch.sh projects/blip2/stage2_opt2.7b.yaml "$@" ;;
    *) echo "table1_blip2: which stage? 1 or 2" >&2 && exit 2 ;;
esac
