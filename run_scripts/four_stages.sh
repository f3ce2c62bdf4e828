#!/usr/bin/env bash
# Four stages in miniature (projects/stages/four_stages_mini.yaml): align, captions, questions, radiology; then their
# table and picture. Two hours on two CPU cores; run it again to go on where it was cut off.
#
#   [NAME=mini] bash run_scripts/four_stages.sh COCO FLICKR8K_IMAGES FLICKR8K_CAPTIONS VQA_RAD [KEY=VALUE ...]
#
# COCO: a folder with images/, captions.csv (human), captions_vinvl.csv (AI-generated) and vqa.json. FLICKR8K_CAPTIONS: a
# captions file that names the splits. VQA_RAD: a folder with images/ and qa.json. NAME: of the run's folder in
# output/stages. docs/stages.md shows the files' form.
set -euo pipefail
start="$(dirname "${BASH_SOURCE[0]}")/start.sh"
[ $# -ge 4 ] || { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
coco=$(realpath "$1") flickr=$(realpath "$2") captions=$(realpath "$3") rad=$(realpath "$4")
shift 4
name=${NAME:-mini}
images=datasets.image_captions questions=datasets.image_questions
bash "$start" python train.py --cfg-path projects/stages/four_stages_mini.yaml --options \
    run.output_dir=output/stages "run.run_name=$name" run.resume_ckpt_path=auto \
    "$images.images=$coco/images" "$images.references=$coco/captions.csv" \
    "$images.captions=[$coco/captions_vinvl.csv,$coco/captions.csv]" \
    "stages.captions.$images.images=$flickr" "stages.captions.$images.captions=$captions" \
    "stages.questions.$questions.images=$coco/images" "stages.questions.$questions.questions=$coco/vqa.json" \
    "stages.radiology.$questions.images=$rad/images" "stages.radiology.$questions.questions=$rad/qa.json" "$@"
bash "$start" evlgen compare "output/stages/$name"
