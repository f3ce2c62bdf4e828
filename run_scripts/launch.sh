#!/usr/bin/env bash
# Train a config on several GPUs at a given global batch: gradient accumulation makes up for GPUs that are not there.
#
#   bash run_scripts/launch.sh CONFIG [KEY=VALUE ...]
#
#   GPUS          GPUs of each node (those that nvidia-smi shows)
#   NODES         nodes (1); start the same command on each, with HEAD=host:port of one of them. A node that died may
#                 be started again while the others wait; with run.resume_ckpt_path=auto the run then goes on
#   RESTARTS      how often the processes may be started again after a node died (3)
#   BATCH         pictures of one GPU at a time (100)
#   GLOBAL_BATCH  pictures of one optimizer step (1600, the paper's)
#   SHUTDOWN      seconds that the processes have to save after SIGTERM before they are killed (300; torch's launcher
#                 gives 30); empty: for a torch whose launcher has no --shutdown-timeout
#   DRY_RUN=1     print the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "launch: $1" >&2
    exit 2
}

[ $# -ge 1 ] || fail "which config? e.g. bash run_scripts/launch.sh projects/evlgen/opt.yaml"
config=$1
shift
[ -f "$config" ] || fail "$config does not exist (seen from $PWD)"
for option in "$@"; do
    [[ $option == *=* ]] || fail "$option is not KEY=VALUE, e.g. run.max_iters=1000"
done

if [ -z "${GPUS:-}" ]; then
    command -v nvidia-smi >/dev/null || fail "no nvidia-smi here to count GPUs with: give their number, GPUS=8"
    GPUS=$(nvidia-smi --list-gpus | wc -l)
fi
NODES=${NODES:-1} BATCH=${BATCH:-100} GLOBAL_BATCH=${GLOBAL_BATCH:-1600} RESTARTS=${RESTARTS:-3}
SHUTDOWN=${SHUTDOWN-300}
for name in GPUS NODES BATCH GLOBAL_BATCH RESTARTS ${SHUTDOWN:+SHUTDOWN}; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is not a whole number above 0"
done
at_once=$((GPUS * NODES * BATCH))
((GLOBAL_BATCH % at_once == 0)) ||
    fail "GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of GPUS x NODES x BATCH = $at_once: give another BATCH"

launcher=(python -m torch.distributed.run --nproc_per_node "$GPUS")
if ((NODES > 1)); then
    [ -n "${HEAD:-}" ] || fail "NODES=$NODES needs HEAD=host:port, where the nodes find each other"
    # the id tells the lock of the run folder (run.lock) that a process on another node was of this same start
    launcher+=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${JOB:-$HEAD}")
    launcher+=(--max_restarts "$RESTARTS")
    # a launcher that shares its store publishes the address once: a node that comes back would wait for it in vain
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
elif [ -n "${JOB:-}" ]; then
    launcher+=(--rdzv_id "$JOB")
fi
[ -z "$SHUTDOWN" ] || launcher+=(--shutdown-timeout "$SHUTDOWN")
accumulate=$((GLOBAL_BATCH / at_once))
command=("${launcher[@]}" train.py --cfg-path "$config" --options
    "run.batch_size_train=$BATCH" "run.accum_grad_iters=$accumulate" "$@")
exec bash run_scripts/start.sh "${command[@]}"
