#!/usr/bin/env bash
# Two nodes of two CPU ranks through the same lib.sh as the real job, in a minute or two:
#   sbatch slurm/smoke.sh               a few steps of the quickstart's model, on its data
#   sbatch slurm/smoke.sh COMMAND...    any command as every rank, to try a new cluster
#SBATCH --job-name=smoke
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
trap 'EARLY=USR1' USR1 # until lib.sh takes over

set -euo pipefail
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file from its own folder
RUN_DIR=${RUN_DIR:-runs/smoke}
LEAD_S=${LEAD_S:-60} # as in --signal above
source slurm/lib.sh

if (($# == 0)); then
  set -- longhaul pretrain configs/quickstart.yaml name=smoke run_dir="$RUN_DIR" train.steps=4 train.warmup_steps=1
fi
export OMP_NUM_THREADS=1 # four ranks may share two cores
rank_environment
print_versions
run_until_done "${RANKS:-2}" "$@" # on each node
