#!/usr/bin/env bash
# Table 1: EVLGen with OPT-2.7b. bash run_scripts/paper/table1_opt.sh ROW [KEY=VALUE ...], ROW one of
#   250k  150k        12 layers, LAION-115M + CCS-14M + COCO
#   150k-11m          12 layers, CCS-14M + COCO
#   90k               6 layers (the paper does not say how many tokens they leave; here 29, as the others)
# The run itself scores its best checkpoint on COCO test. The table's CIDEr is of COCO val, which chose that checkpoint:
# score the last one there, as the released configs do, with zero_shot.sh coco .../checkpoint_last.pth.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
row=${1:-}
shift || true
case $row in
    250k) set -- opt run.max_iters=250000 "$@" ;;
    150k) set -- opt run.max_iters=150000 "$@" ;;
    # 1600 pictures a step, and the warm-up of pre-training: the hours in the table are those of the other 150k steps
    150k-11m) set -- ccs run.max_iters=150000 run.warmup_steps=5000 "$@" ;;
    90k) set -- opt run.max_iters=90000 model.num_layers=6 'model.tome_r={target: 29}' "$@" ;;
    *) echo "table1_opt: which row? 250k, 150k, 150k-11m or 90k" >&2 && exit 2 ;;
esac
config=projects/evlgen/$1.yaml
shift
exec bash run_scripts/launch.sh "$config" run.output_dir=output/paper/table1 "run.run_name=opt2.7b-$row" "$@"
