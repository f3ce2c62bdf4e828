#!/usr/bin/env bash
# The same under SLURM: one launcher a node, which starts a process a GPU.
#
#   sbatch --nodes 2 --gpus-per-node 8 run_scripts/slurm.sh projects/evlgen/opt.yaml run.run_name=opt250k
#
# A requeued job goes on where it was: SIGTERM saves a checkpoint, and run.resume_ckpt_path=auto finds it. It comes two
# minutes before the time limit, and SHUTDOWN keeps the launcher from killing processes that are still saving; a job
# that is preempted or cancelled has what the cluster's GraceTime and KillWait allow.
#SBATCH --job-name=evlgen
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch, from the folder of the repository}"
config=$1
shift
export NODES=$SLURM_NNODES GPUS=${SLURM_GPUS_ON_NODE:?ask for GPUs, e.g. --gpus-per-node 8} JOB=$SLURM_JOB_ID
export SHUTDOWN=${SHUTDOWN-110}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500
export HEAD
exec srun bash run_scripts/launch.sh "$config" run.resume_ckpt_path=auto "$@"
