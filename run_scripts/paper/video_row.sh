#!/usr/bin/env bash
# What webvid.sh, table3_msrvtt.sh and table4_msvd.sh share: bash video_row.sh TABLE ROW CHECKPOINT [KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
table=${1:-} row=${2:-} checkpoint=${3:-} known=yes
case $table:$row in
    webvid:image | webvid:scst) known=no ;;
    *:image | *:video | *:scst) keys=() ;;
    *:concat) keys=(model.temporal=false model.frame_pooling=concat) ;;
    *:mean) keys=(model.temporal=false model.frame_pooling=connector_mean) ;;
    *:temporal_qformer | *:temporal_queries) keys=(model.temporal=false "model.frame_pooling=$row") ;;
    *) known=no ;;
esac
rows="video, concat, mean, temporal_qformer, temporal_queries"
[ "$table" = webvid ] || rows="$rows, image or scst"
[ $known = yes ] || { echo "$table: which row? $rows" >&2 && exit 2; }
if [ -z "$checkpoint" ] || [[ $checkpoint == *=* ]]; then
    echo "$table: which checkpoint does $row start from? Its head says which" >&2 && exit 2
fi
shift 3
config=${table#*_}
[ "$row" != scst ] || config=msrvtt_scst keys=("datasets.video_captions.type=${table#*_}")
export BATCH=${BATCH:-8} GLOBAL_BATCH=${GLOBAL_BATCH:-64}
exec bash run_scripts/launch.sh "projects/evlgen_video/$config.yaml" "model.pretrained=$checkpoint" \
    ${keys[@]+"${keys[@]}"} "run.output_dir=output/paper/${table%_*}" "run.run_name=$row" "$@"
