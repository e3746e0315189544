# shellcheck shell=bash
# What every job script here needs: an environment, a launch, and a stop without loss.
# Source it from the batch script, in the repository's root on a filesystem that all nodes see.
# The script sets RUN_DIR, LEAD_S and, if it has any, CONTAINER and (spare nodes) TRAIN_NODES.

STOPPED_BY=${EARLY:-} STEP_PID='' REPEATER=''
CANCELLED='' UNFIT='' NODES=''
SRUN_OPTIONS=()
if [[ -n ${CONTAINER:-} ]]; then
  SRUN_OPTIONS+=(--container-image="$CONTAINER" --container-mounts="$PWD" --container-workdir="$PWD")
fi

# A signal is remembered from here on; one that comes before the ranks run keeps them from starting.
trap 'heard USR1' USR1
trap 'heard TERM' TERM

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
  # torchrun must outlive the SIGTERM that SLURM sends to a whole step: it would kill the ranks
  # 30 s later, in the middle of their save.
  export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
}

print_versions() {
  echo "== job $SLURM_JOB_ID, attempt ${SLURM_RESTART_COUNT:-0}, $(date -Is), $SLURM_JOB_NODELIST"
  echo "== commit $(git rev-parse --verify --quiet HEAD || echo unknown)" \
    "$(git diff --quiet HEAD 2>/dev/null || echo '(with local changes)')"
  here python - <<'PY' || true
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

# here COMMAND...: run it on this node, where longhaul is: in the container, if the job has one.
here() {
  if ((${#SRUN_OPTIONS[@]})); then
    srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --quiet "${SRUN_OPTIONS[@]}" "$@"
  else
    "$@"
  fi
}

# job_field NAME: what SLURM says of this job, such as JobState.
job_field() {
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -oP "(?<= $1=)\S+" || true
}

# The numbers of this user's jobs that have nodes now, as one line with commas. Asked here and not in
# a container, which need not know SLURM.
running_jobs() {
  squeue --me --noheader --format=%A --states=RUNNING,SUSPENDED,STOPPED,COMPLETING | commas || true
}

# Rank 0's address: NodeAddr, because a node's name need not resolve on the other nodes.
head_address() {
  scontrol show node --oneliner "$1" | grep -oP 'NodeAddr=\K\S+'
}

# NODE=ADDRESS of every node of the job.
addresses() {
  scontrol show node --oneliner "$SLURM_JOB_NODELIST" |
    sed --regexp-extended --quiet 's/.*NodeName=(\S+) .*NodeAddr=(\S+) .*/\1=\2/p'
}

# A port that is free on the head node now; one made from the job's number can be taken. Below those
# that the kernel gives to whoever asks for any: it must still be free when torchrun is there.
free_port() {
  srun --nodes=1 --ntasks=1 --nodelist="$1" --quiet "${SRUN_OPTIONS[@]}" python -c '
import random, socket
for port in random.sample(range(20000, 30000), 100):
    try:
        socket.socket().bind(("", port))
        break
    except OSError:
        pass
print(port)'
}

# The lines of stdin as one, with commas.
commas() {
  paste --serial --delimiters=,
}

# heard SIGNAL: remember it. The ranks are told again every few seconds until they end: while
# they start, or torchrun does, nobody is there yet to hear it.
heard() {
  local restarts
  STOPPED_BY=$1
  echo "== $1 at $(date -Is): the ranks save and stop"
  # TERM while the job counts as running is a warning, too (preemption with a grace time). Else it
  # is SLURM's end of this attempt: requeued already (a node failed, preemption), or cancelled.
  if [[ $1 == TERM && $(job_field JobState) != RUNNING ]]; then
    restarts=$(job_field Restarts)
    if ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})); then
      echo "== SLURM took the job back to the queue; the next attempt says why"
      exit 0
    fi
    CANCELLED=yes
  fi
  tell_ranks
}

tell_ranks() {
  if [[ -z $STEP_PID || -n $REPEATER ]]; then return; fi
  (
    trap - USR1 TERM
    end=$((SECONDS + LEAD_S - 15))
    while kill -0 "$STEP_PID" 2>/dev/null; do
      scancel --quiet --signal=USR1 "$SLURM_JOB_ID" || true
      sleep 5
      if ((SECONDS > end)); then
        echo "== the ranks have not stopped in time: the job goes back to the queue without them"
        kill -KILL "$STEP_PID" || true
      fi
    done
  ) &
  REPEATER=$!
}

# check_nodes RANKS: every node looks at itself and at its neighbours, in under a minute. NODES is
# then those to train on, the first TRAIN_NODES that are fit; UNFIT the others where that is too few.
check_nodes() {
  local wanted=${TRAIN_NODES:-$SLURM_JOB_NUM_NODES} all fit
  all=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  if [[ ${PREFLIGHT:-yes} == no ]]; then
    NODES=$(head -n "$wanted" <<<"$all")
    return
  fi
  # Its findings are files: one that hangs on a node is ended, and the node has said nothing.
  # shellcheck disable=SC2016  # the variables are each node's own
  timeout --kill-after=10 120 srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    --cpu-bind=none --kill-on-bad-exit=0 --label "${SRUN_OPTIONS[@]}" bash -c '
      trap "" USR1
      exec longhaul preflight "$@"' preflight --run-dir "$RUN_DIR" --ranks-per-node "$1" \
    --together "$(addresses | commas)" || true
  # Where nobody judged, something else than a node is wrong: the ranks will say what.
  fit=$(cat "$ATTEMPT_FOLDER/fit" 2>/dev/null || echo "$all")
  NODES=$(head -n "$wanted" <<<"$fit")
  if (($(wc -w <<<"$fit") < wanted)); then
    # None, where the job asked for fewer nodes than TRAIN_NODES.
    UNFIT=$(grep --invert-match --line-regexp --fixed-strings "$fit" <<<"$all" | commas || true)
  fi
}

# launch RANKS_PER_NODE COMMAND...: start COMMAND as every rank of NODES, in the background.
launch() {
  local ranks=$1 head
  shift
  head=$(head -n 1 <<<"$NODES")
  HEAD_ADDRESS=$(head_address "$head")
  HEAD_PORT=$(free_port "$head")
  NUM_NODES=$(wc -w <<<"$NODES")
  export HEAD_ADDRESS HEAD_PORT NUM_NODES RANKS_PER_NODE=$ranks
  # torchrun starts with USR1 and TERM ignored, for it would end its ranks; they set their own
  # handlers. A node whose task fails ends the step: the others would wait in a collective. One that
  # came back without it says nothing: after the first end the rest have a minute.
  # shellcheck disable=SC2016  # the variables are each node's own
  srun --nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1 \
    --nodelist="$(commas <<<"$NODES")" --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none \
    --kill-on-bad-exit=1 --wait=60 --label "${SRUN_OPTIONS[@]}" bash -c '
      trap "" USR1 TERM
      exec python -m train.cluster.launcher --nnodes="$NUM_NODES" \
        --nproc-per-node="$RANKS_PER_NODE" --node-rank="$SLURM_NODEID" \
        --master-addr="$HEAD_ADDRESS" --master-port="$HEAD_PORT" \
        --max-restarts=0 --no-python "$@"' launcher "$@" &
  STEP_PID=$!
}

# Return what the ranks ended with. A trapped signal ends wait: wait again until the step has ended.
await_ranks() {
  local status
  while true; do
    status=0
    wait "$STEP_PID" || status=$?
    kill -0 "$STEP_PID" 2>/dev/null || return "$status"
  done
}

# back_to_queue NODES: requeue this job, as the same job, never again on NODES (with commas).
back_to_queue() {
  local excluded try
  trap - USR1 TERM # SLURM ends this shell next
  if [[ -n $1 ]]; then trap '' TERM; fi # but not before it has said which nodes to leave out
  excluded=$(job_field ExcNodeList | sed 's/(null)//')
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "== SLURM refuses to requeue this job (was it submitted with --requeue?): submit it again"
    return 1
  fi
  if [[ -n $1 ]]; then
    for try in 1 2 3 4 5 6 7 8 9 10; do
      # taken only once the job is pending again
      if scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${excluded:+$excluded,}$1" 2>/dev/null
      then
        echo "== left out from now on: $1"
        break
      fi
      sleep 1
    done
    ((try < 10)) || echo "== SLURM does not let this job leave out $1: ask for other nodes"
  fi
  sleep 300 # SLURM ends this shell; an exit before it does would end the job
}

# run_until_done RANKS_PER_NODE COMMAND...: one attempt: run the ranks to their end, and go back to
# the queue if there should be another. RUN_DIR becomes the folder that COMMAND writes, which is not
# the script's where COMMAND begins a fork. Attempts and their ends are in RUN_DIR/attempts.jsonl;
# RUN_DIR/DONE, written after the last step, says that nothing is left to do; of a COMMAND that is
# not longhaul's, the exit code 0 does.
run_until_done() {
  local status=0 verdict action exclude without_done=yes
  if [[ ${2##*/} == longhaul && ${3:-} == pretrain ]]; then
    without_done=''
    # A fork's, or run_dir='s among the overrides: what that RUN_DIR is it alone knows. A command
    # that it refuses ends the job here, before anything is written into a folder.
    RUN_DIR=$(here "$2" pretrain --print-run-dir "${@:4}")
  fi
  export LEAD_S ATTEMPT_FOLDER="$RUN_DIR/attempt"
  ATTEMPT=$(here python -m train.cluster.job begin "$RUN_DIR" --lead "$LEAD_S" \
    --running "$(running_jobs)" \
    --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | commas)")
  export ATTEMPT
  echo "== attempt $ATTEMPT of $RUN_DIR"
  [[ -n $STOPPED_BY ]] || check_nodes "$1"
  if [[ -z $STOPPED_BY && -z $UNFIT ]]; then
    launch "$@"
    [[ -z $STOPPED_BY ]] || tell_ranks
    await_ranks || status=$?
  fi
  verdict=$(here python -m train.cluster.job end "$RUN_DIR" --code "$status" \
    --stopped-by "$STOPPED_BY" --unfit "$UNFIT" ${CANCELLED:+--cancelled} \
    ${without_done:+--without-done})
  read -r action exclude <<<"$verdict"
  case $action in
    done) return 0 ;;
    requeue) back_to_queue "$exclude" ;;
    stop) [[ -n $CANCELLED ]] || return $((status ? status : 1)) ;;
  esac
}
