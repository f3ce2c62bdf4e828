#!/usr/bin/env bash
# Tables 1, 2, 5: scores of a trained model. bash run_scripts/paper/zero_shot.sh BENCHMARK CHECKPOINT [KEY=VALUE ...]
#   BENCHMARK   coco, vqav2, gqa, okvqa, nocaps or flickr30k (docs/evaluation.md: where their files go)
#   CHECKPOINT  checkpoint_last.pth of a run, as the released configs score it, or a bundle
#   Vicuna: add model.model_type=vicuna7b; then captions and answers are decoded as released (repetition_penalty 1.5)
# coco scores val, on which a run chooses its checkpoint_best.pth: that one is scored with run.test_splits=[test] only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
config=projects/evlgen/eval/${1:-}.yaml checkpoint=${2:-}
if [ ! -f "$config" ] || [ -z "$checkpoint" ]; then
    echo "zero_shot: which benchmark (coco, vqav2, gqa, okvqa, nocaps, flickr30k), and which checkpoint?" >&2
    exit 2
fi
shift 2
case "$config:$(basename "$checkpoint"):$*" in
    *run.test_splits=*) ;;
    */coco.yaml:checkpoint_best.pth:*)
        echo "zero_shot: COCO val chose checkpoint_best.pth: give checkpoint_last.pth, or run.test_splits=[test]" >&2
        exit 2
        ;;
esac
[[ " $*" != *" model.model_type=vicuna"* ]] || set -- run.repetition_penalty=1.5 "$@"
command=(python -m torch.distributed.run --nproc_per_node "${GPUS:-1}" evaluate.py --cfg-path "$config"
    --options "model.pretrained=$checkpoint" "$@")
exec bash run_scripts/start.sh "${command[@]}"
