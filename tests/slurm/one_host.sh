#!/usr/bin/env bash
# A real Slurm on one host, as root, no systemd:  one_host.sh start|stop|lose|return DIR [NODE]   then  . DIR/env
# Two nodes, n1 and n2, each a slurmd with a hostname of its own. `lose` kills a node with all that runs on it, `return`
# starts it again. Needs: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
set -euo pipefail
command=${1:?start|stop|lose|return} dir=$(realpath -m "${2:?folder}") node=${3:-n2}
port=${SLURM_TEST_PORT:-16817}
export SLURM_CONF=$dir/slurm.conf

alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
background() { local name=$1; shift; setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 & echo $! >"$dir/run/$name.pid"; }
await() { for _ in {1..200}; do if "$@"; then return 0; fi; sleep 0.1; done; echo "one_host.sh: timed out: $*, see $dir/log" >&2; return 1; }
end() {  # TERM to all, up to 10 s, then KILL; only the processes in these files
  local file
  for file; do if alive "$file"; then kill "$(cat "$file")" || true; fi; done
  for file; do
    for _ in {1..100}; do alive "$file" || break; sleep 0.1; done
    if alive "$file"; then kill -9 "$(cat "$file")" || true; fi
    rm -f "$file"
  done
}
munge_answers() { munge -n -S "$dir/run/munge.socket" >/dev/null 2>&1; }
all_idle() { [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 2 ]; }
no_jobs() { [ -z "$(squeue -h -t all -o %T 2>/dev/null | grep -vE 'CANC|COMPLETED|FAIL|TIMEO|REVOKED|DEADL')" ]; }
# Where cgroups of version 1 can be made (and no other Slurm has them), a signal reaches what Slurm itself has started and
# not the children of that, as on most clusters; else all of a job's processes.
freezer=/sys/fs/cgroup/freezer
take_cgroups() { [ -e "$freezer/release_agent" ] && mkdir "$freezer/slurm_n1" 2>/dev/null && touch "$dir/run/cgroups"; }
start_node() {
  background "$1" unshare --uts --mount sh -c \
    "mount --bind '$dir/hosts' /etc/hosts && hostname $1 && exec slurmd -D -N $1"
}

start() {
  [ ! -e "$dir/slurm.conf" ] || { echo "one_host.sh: $dir is in use" >&2; exit 1; }
  mkdir -p "$dir"/{log,run,state,key,dev,spool/n1,spool/n2}
  chmod 755 "$dir" "$dir/run"
  chmod 700 "$dir/key"
  (umask 077; head -c 1024 /dev/urandom >"$dir/key/munge.key")
  { cat /etc/hosts; echo "127.0.1.1 n1"; echo "127.0.1.2 n2"; } >"$dir/hosts"
  for gpu in {0..7}; do ln -s /dev/null "$dir/dev/gpu$gpu"; done  # the sbatch files ask for 8 on a node
  echo "NodeName=n[1-2] Name=gpu File=$dir/dev/gpu[0-7]" >"$dir/gres.conf"
  local proctrack=linuxproc
  if take_cgroups; then proctrack=cgroup; echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf"; fi
  cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits this long before it may start; below 5 it is the default, 120 s.
AuthInfo=socket=$dir/run/munge.socket,cred_expire=5
# Rendezvous ports follow from a job's number: another such Slurm on this host has others.
FirstJobId=$((port % 500 + 1))
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.own-pid
SlurmdPidFile=$dir/run/slurmd.%n.own-pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/$proctrack
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.1.[1-2] Port=[$((port + 1))-$((port + 2))] CPUs=128 RealMemory=500000 Gres=gpu:8
# A job in urgent takes the nodes of one in test, which gets SIGTERM and this long to stop.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=600
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  echo "export SLURM_CONF=$SLURM_CONF" >"$dir/env"
  background munged munged -F --socket="$dir/run/munge.socket" --key-file="$dir/key/munge.key" \
    --seed-file="$dir/key/seed" --log-file="$dir/log/munged.log" --pid-file="$dir/run/munged.own-pid"
  await munge_answers
  background slurmctld slurmctld -D -c
  start_node n1
  start_node n2
  await all_idle || { tail -n 8 "$dir"/log/*.out >&2; stop; exit 1; }
}

stop() {
  if alive "$dir/run/slurmctld.pid"; then  # the jobs first: what runs in them outlives its slurmd
    squeue -h -t PD -o %A | sort -u | xargs -r scancel || true
    squeue -h -t R,S -o %A | sort -u | xargs -r scancel --full -s KILL || true
    await no_jobs || true
  fi
  end "$dir"/run/n1.pid "$dir"/run/n2.pid "$dir/run/slurmctld.pid"
  end "$dir/run/munged.pid"
  if [ -e "$dir/run/cgroups" ]; then find "$freezer"/slurm_n[12] -depth -type d -exec rmdir {} ';' 2>/dev/null || true; fi
}

lose() {  # the node's daemon, its steps, and what they started, at once: all that shares its hostname's namespace
  local namespace
  namespace=$(readlink "/proc/$(cat "$dir/run/$node.pid")/ns/uts")
  find /proc -maxdepth 3 -path '/proc/[0-9]*/ns/uts' -lname "${namespace//[/\\[}" 2>/dev/null |
    cut -d / -f 3 | xargs -r kill -9 || true
  scontrol update nodename="$node" state=down reason=lost
}

return_node() {
  start_node "$node"
  scontrol update nodename="$node" state=resume
}

case $command in
  start | stop | lose) "$command" ;;
  return) return_node ;;
  *) echo "one_host.sh: start, stop, lose or return, not $command" >&2; exit 2 ;;
esac
