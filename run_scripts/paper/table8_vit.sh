#!/usr/bin/env bash
# Table 8: the vision encoder. bash run_scripts/paper/table8_vit.sh LLM VIT [KEY=VALUE ...]
#   LLM  opt2.7b or vicuna7b;  VIT  clip_L or eva_clip_g;  CCS-14M + COCO, 60k steps
# 160 pictures a step (GLOBAL_BATCH), 20 of a GPU at a time (BATCH): projects/evlgen/ccs.yaml says what is known. Of
# clip_L, 23 blocks run, as in the released code. Vicuna's captions are decoded with repetition_penalty 1.5.
# The run itself scores its best checkpoint on COCO test; the table is of val: zero_shot.sh coco checkpoint_last.pth,
# for Vicuna with model.model_type=vicuna7b.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
llm=${1:-} vit=${2:-}
shift 2 || { echo "table8_vit: which LLM (opt2.7b, vicuna7b) and ViT (clip_L, eva_clip_g)?" >&2 && exit 2; }
keys=("model.model_type=$llm" "model.vit_model=$vit")
[ "$vit" != clip_L ] || keys+=(model.vit_layer=23)
[[ $llm != vicuna* ]] || keys+=(run.repetition_penalty=1.5)
export BATCH=${BATCH:-20} GLOBAL_BATCH=${GLOBAL_BATCH:-160}
exec bash run_scripts/launch.sh projects/evlgen/ccs.yaml "${keys[@]}" \
    run.output_dir=output/paper/table8 "run.run_name=$llm-$vit" "$@"
