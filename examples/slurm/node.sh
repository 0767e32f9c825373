#!/usr/bin/env bash
# Each node's task of a training job: one torchrun. USR1 or TERM, from launch.sh or from Slurm, goes to the trainers as
# USR1 and past torchrun, which would end them (TERM) or itself (USR1): they agree on a step, save, and end well.
set -uo pipefail
{  # read whole before it runs, so that an edit does not disturb a running job
torchrun= asked= telling=
tell() {  # by their parent, from /proc: an image need not have pkill
  local file
  for file in $(grep -ls "^PPid:[[:space:]]*$torchrun\$" /proc/[0-9]*/status); do
    kill -USR1 "$(basename "$(dirname "$file")")" 2>/dev/null
  done
}
stop() {
  asked=yes
  [ -n "$torchrun" ] || return
  tell
  [ -n "$telling" ] || (trap '' USR1 TERM; while kill -0 "$torchrun" 2>/dev/null; do sleep 5; tell; done) &
  telling=yes
}
trap stop USR1 TERM

# What ignores USR1 hands that on: torchrun lives, and the trainers' own handler replaces it once they listen.
(trap '' USR1
 exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$RANKS_PER_NODE" --max-restarts="$MAX_RESTARTS" \
   --rdzv-backend=c10d --rdzv-endpoint="$RDZV_HOST:$RDZV_PORT" --rdzv-id="$RDZV_ID" \
   --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
   -m hacl_megatron.train "$@") &
torchrun=$!
[ -z "$asked" ] || stop
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun"; done
wait "$torchrun"  # again: a signal may have ended the one above, and bash remembers
code=$?
exit "$code"
}
