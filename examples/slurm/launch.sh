#!/usr/bin/env bash
# The batch shell of a training job, on its first node:  bash examples/slurm/launch.sh [trainer flags]
# Starts one torchrun on each node (node.sh), passes Slurm's wish to stop on to the trainers, and then decides by
# SAVE/run_status.json, which the trainer writes: finished -> exit 0; stopped on request -> requeue this job, exit 75
# (the next start finds the newest checkpoint by itself); anything else -> torchrun's exit code.
#
#   RUN_IN            what to run in: a virtual environment's folder, image.sif (apptainer), image.sqsh or registry
#                     image (pyxis); empty: the PATH as it is
#   MOUNTS            further folders that a container sees, "/data,/scratch"; the submit folder always is
#   RANKS_PER_NODE    processes on each node; default: the job's GPUs on a node, else 1
#   MAX_RESTARTS      how often torchrun starts the processes again after one of them failed (3)
#   MAX_REQUEUES      how often the job puts itself back into the queue (100; 0 never: exit 75 alone)
#   SHUTDOWN_TIMEOUT  seconds that a save may take after SIGTERM (600)
set -uo pipefail
{  # read whole before it runs, so that an edit does not disturb a running job
here=examples/slurm
asked= srun= telling=
ask_to_stop() {
  [ -n "$asked" ] || echo "launch.sh: received SIG$1: the trainers finish their step, save and stop"
  asked=$1
  [ -z "$srun" ] || tell
}
tell() {  # repeated, because a trainer that is only starting up does not listen yet. srun passes USR1 on to node.sh
  [ -n "$telling" ] || (trap '' USR1 TERM; while kill -USR1 "$srun" 2>/dev/null; do sleep 5; done) &
  telling=yes
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

export RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export MAX_RESTARTS=${MAX_RESTARTS:-3}
restarts=${SLURM_RESTART_COUNT:-0}

save=
for ((i = 1; i <= $#; i++)); do  # the last one wins, as in the trainer
  case ${!i} in
    --save) j=$((i + 1)); save=${!j-} ;;
    --save=*) save=${!i#*=} ;;
  esac
done
[ -n "$save" ] || { echo "launch.sh: no --save among the trainer's flags: nothing could be resumed" >&2; exit 2; }
status=$save/run_status.json
mkdir -p "$save"
rm -f "$status"  # an earlier attempt's

# ------------------------------------------------------------------------------------------------------- environment
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
threads=$((cpus / (RANKS_PER_NODE > 0 ? RANKS_PER_NODE : 1)))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # tensor parallelism's overlap relies on the order
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A store for each start of the processes: in a shared one they read what the dead ones wrote (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-600}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export RDZV_HOST RDZV_PORT RDZV_ID
RDZV_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RDZV_PORT=$((20000 + (SLURM_JOB_ID * 16 + restarts) % 10000))
RDZV_ID=$SLURM_JOB_ID.$restarts

. $here/run_in.sh  # in_srun, in_front
echo "launch.sh: job $SLURM_JOB_ID, start $((restarts + 1)), $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST) x" \
  "$RANKS_PER_NODE processes, rendezvous at $RDZV_HOST:$RDZV_PORT, --save $save"

# ------------------------------------------------------------------------------------------------------------- train
# In a session of its own: a signal to the batch shell's process group is not for srun, which kills its step at a SIGTERM.
setsid srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
  --kill-on-bad-exit=1 ${in_srun[@]+"${in_srun[@]}"} \
  ${in_front[@]+"${in_front[@]}"} bash $here/node.sh "$@" &
srun=$!
[ -z "$asked" ] || tell
while kill -0 "$srun" 2>/dev/null; do wait "$srun"; done
wait "$srun"  # again: a signal may have ended the one above, and bash remembers
code=$?

# ------------------------------------------------------------------------------------------------------ what it means
state=$(sed -n 's/^ *"state": *"\([a-z]*\)".*/\1/p' "$status" 2>/dev/null)
echo "launch.sh: torchrun ended with $code, the run is ${state:-not begun}"
if [ "$state" = finished ]; then exit 0; fi
[ "$code" != 143 ] || asked=${asked:-TERM}  # it came before node.sh could listen
if [ "$state" = stopped ] || { [ -n "$asked" ] && [ "$state" != failed ]; }; then
  # Not a job that somebody cancels, nor one that Slurm itself is putting back into the queue.
  if [ "$restarts" -lt "${MAX_REQUEUES:-100}" ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
    echo "launch.sh: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit 75  # EX_TEMPFAIL
fi
exit $((code == 0 ? 1 : code))
}
