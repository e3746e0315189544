# shellcheck shell=bash
# What every job script here needs: an environment, a launch, and a stop without loss.
# Source it from the batch script, in the repository's root on a filesystem that all nodes see.

# Settings of every rank. Anything already exported wins, so a site can set its own.
rank_environment() {
  export PATH="$PWD/.venv/bin:$PATH"
  # The packages' names are generic: a model.py in the working folder must not shadow them.
  export PYTHONSAFEPATH=1
  # A rank that dies in C++ or CUDA leaves its Python stack; lines reach the log when printed.
  export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1
  # The ranks of a node share its cores; one pool of threads as wide as the node each is slower.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
  # The loader forks; the tokenizer's own threads would warn, or hang, in its children.
  export TOKENIZERS_PARALLELISM=false
  # Errors of NCCL are named, and nothing else is said: INFO writes megabytes for 64 ranks.
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
  # Megatron's layers need kernels to start in the order of their calls, or the gathers of
  # sequence parallelism start behind the matrix products that should hide them.
  export CUDA_DEVICE_MAX_CONNECTIONS=1
  # Chunked loss and recomputation free blocks of many sizes; this keeps them from fragmenting.
  export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
}

print_versions() {
  echo "== job $SLURM_JOB_ID, attempt ${SLURM_RESTART_COUNT:-0}, $(date -Is), $SLURM_JOB_NODELIST"
  echo "== commit $(git rev-parse --verify --quiet HEAD || echo unknown)" \
    "$(git diff --quiet HEAD 2>/dev/null || echo '(with local changes)')"
  python - <<'PY'
import platform
from importlib.metadata import PackageNotFoundError, version

def found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"

names = ["longhaul", "torch", "megatron-core", "deepspeed", "flash-attn", "transformer-engine"]
print("== python", platform.python_version(), *(f"{name} {found(name)}" for name in names))
PY
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | uniq -c || true
}

# Rank 0's address: NodeAddr, because a node's name need not resolve on the other nodes.
head_address() {
  scontrol show node --oneliner "$1" | grep -oP 'NodeAddr=\K\S+'
}

# A port that is free on the head node now; one made from the job's number can be taken.
free_port() {
  srun --nodes=1 --ntasks=1 --nodelist="$1" python -c \
    'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# launch RANKS_PER_NODE COMMAND...: start COMMAND as every rank of the job, in the background.
launch() {
  local ranks=$1 head
  shift
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  HEAD_ADDRESS=$(head_address "$head")
  HEAD_PORT=$(free_port "$head")
  export HEAD_ADDRESS HEAD_PORT RANKS_PER_NODE=$ranks
  # torchrun starts with USR1 ignored, for it would die of it; its ranks set their own handler.
  # A node that loses its task ends the step: the others would wait in a collective for ever.
  # shellcheck disable=SC2016  # the variables are each node's own
  srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
    --kill-on-bad-exit=1 --label "${SRUN_OPTIONS[@]}" bash -c '
      trap "" USR1
      exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" \
        --node-rank="$SLURM_NODEID" --master-addr="$HEAD_ADDRESS" --master-port="$HEAD_PORT" \
        --max-restarts=0 --no-python "$@"' torchrun "$@" &
  STEP_PID=$!
}

# What SLURM says to this shell goes on to the ranks, which save at their next step and exit 0.
forward() {
  STOPPED_BY=$1 INTERRUPTED=yes
  echo "== $1 at $(date -Is): the ranks save and stop"
  scancel --signal=USR1 "$SLURM_JOB_ID" || true
}

# run_until_stopped RUN_DIR RANKS_PER_NODE COMMAND...: run the ranks to their end. On USR1 (the
# time limit is near, or the job is preempted) they save and the job goes back to the queue, as
# the same job; RUN_DIR/DONE, written after the last step, says that nothing is left to do.
# On TERM (somebody cancels the job) they save and the job ends.
run_until_stopped() {
  local run_dir=$1 status=0
  shift
  STOPPED_BY=''
  trap 'forward USR1' USR1
  trap 'forward TERM' TERM
  launch "$@"
  # A trapped signal ends wait: wait again until the step itself has ended.
  while true; do
    INTERRUPTED='' status=0
    wait "$STEP_PID" || status=$?
    [[ -n $INTERRUPTED ]] || break
  done
  if [[ $STOPPED_BY == USR1 && ! -e $run_dir/DONE ]]; then
    echo "== not finished (ranks ended with status $status): back to the queue"
    trap - USR1 TERM
    scontrol requeue "$SLURM_JOB_ID"
    sleep 300 # SLURM ends this shell; an exit before it does would end the job
  fi
  return "$status"
}
