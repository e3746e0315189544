#!/usr/bin/env bash
# Pretrain the 8B model of configs/pretrain_8b.yaml on 8 nodes of 8 GPUs:
#   sbatch slurm/pretrain_8b.sh                       from the repository's root
#   sbatch slurm/pretrain_8b.sh data.train=/data/pile   overrides go to the configuration
#SBATCH --job-name=pretrain_8b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --wait-all-nodes=1
# In words: one task a node, which starts that node's ranks; whole nodes, all their memory; a
# restart adds to the log; 300 s before the limit this shell alone hears USR1, saves, requeues.
trap 'EARLY=USR1' USR1 # until lib.sh takes over

# ---- the site: edit here, or export before sbatch -------------------------------------------
# Account, partition, QOS, time: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS, SBATCH_TIMELIMIT.
# Tracking: MLFLOW_TRACKING_URI. The network, where NCCL chooses wrongly: NCCL_SOCKET_IFNAME.
RUN_DIR=${RUN_DIR:-runs/pretrain_8b} # checkpoints, metrics, attempts, DONE
CONTAINER=${CONTAINER:-} # an image with longhaul in it, run by pyxis; empty: .venv of this folder
LEAD_S=${LEAD_S:-300} # as in --signal above; the log says when steps and saves take longer
TRAIN_NODES=${TRAIN_NODES:-8} # ask for more with sbatch --nodes=9: one that is unfit is left out
# ---------------------------------------------------------------------------------------------

set -euo pipefail
cd "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file from its own folder
source slurm/lib.sh

rank_environment
print_versions
run_until_done 8 longhaul pretrain configs/pretrain_8b.yaml run_dir="$RUN_DIR" "$@"
