#!/usr/bin/env bash
# Table 4: captions of MSVD, fine-tuned. bash run_scripts/paper/table4_msvd.sh ROW CHECKPOINT [KEY=VALUE ...]
#   ROW         as table3_msrvtt.sh; of them the paper's table has `video` alone
#   CHECKPOINT  what the row starts from, as there
# The run scores its best checkpoint on val on the test split, which is the table's (released: the last checkpoint).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec bash run_scripts/paper/video_row.sh table4_msvd "$@"
