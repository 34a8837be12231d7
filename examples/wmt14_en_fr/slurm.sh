#!/usr/bin/env bash
#SBATCH --job-name=admin-72
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
# 72 layers at the paper's batch under SLURM, one task a machine, which starts a worker a GPU:
#
#   sbatch examples/wmt14_en_fr/slurm.sh        (in the repository's folder, which all machines share)
#
# A job that was stopped and queued again goes on from its last checkpoint.
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NODES=$SLURM_NNODES MASTER=$first:29500
# shellcheck disable=SC2016  # each machine fills in its own number
srun bash -c 'NODE_RANK=$SLURM_NODEID examples/wmt14_en_fr/torchrun.sh'
