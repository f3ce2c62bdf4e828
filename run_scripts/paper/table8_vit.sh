#!/usr/bin/env bash
# Table 8: the vision encoder. bash run_scripts/paper/table8_vit.sh LLM VIT [KEY=VALUE ...]
#   LLM  opt2.7b or vicuna7b;  VIT  clip_L or eva_clip_g;  CCS-14M + COCO, 60k steps
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
llm=${1:-} vit=${2:-}
shift 2 || { echo "table8_vit: which LLM (opt2.7b, vicuna7b) and ViT (clip_L, eva_clip_g)?" >&2 && exit 2; }
exec bash run_scripts/launch.sh projects/evlgen/ccs.yaml "model.model_type=$llm" "model.vit_model=$vit" \
    run.output_dir=output/paper/table8 "run.run_name=$llm-$vit" "$@"
