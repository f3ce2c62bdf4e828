#!/usr/bin/env bash
# Table 5: EVLGen with Vicuna-7b. bash run_scripts/paper/table5_vicuna.sh ROW [KEY=VALUE ...], ROW one of
#   250k  150k  90k   LAION-115M + CCS-14M + COCO
#   150k-11m          CCS-14M + COCO
# The run itself scores its best checkpoint on COCO test. The table's CIDEr is of COCO val, which chose that checkpoint:
# zero_shot.sh coco .../checkpoint_last.pth model.model_type=vicuna7b. Captions are decoded with repetition_penalty 1.5.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
row=${1:-}
shift || true
case $row in
    250k | 150k | 90k) set -- vicuna "run.max_iters=${row%k}000" "$@" ;;
    150k-11m)
        set -- ccs model.model_type=vicuna7b run.repetition_penalty=1.5 run.max_iters=150000 run.warmup_steps=5000 "$@"
        ;;
    *) echo "table5_vicuna: which row? 250k, 150k, 150k-11m or 90k" >&2 && exit 2 ;;
esac
config=projects/evlgen/$1.yaml
shift
exec bash run_scripts/launch.sh "$config" run.output_dir=output/paper/table5 "run.run_name=vicuna7b-$row" "$@"
