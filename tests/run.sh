#!/usr/bin/env bash
# Every test, from nothing but Python and pip:  bash tests/run.sh [pytest arguments]
#   bash tests/run.sh --quick [pytest arguments]   before every commit: the part of them in QUICK of tests/conftest.py, chosen so
#                                        that it finds most mistakes for its time: 2 minutes on 2 cores with little else to do
#   bash tests/run.sh --slurm [--full]   instead: jobs on a real Slurm on this host (tests/slurm; as root, with apt's slurmctld,
#                                        slurmd, slurm-client and munge): 3.5 minutes on 2 cores with little else to do; --full
#                                        adds ten preemptions, five layouts and thirty kills: half an hour beside other work
# PYTHON=python3.12 picks another interpreter (and with it megatron-core 0.19.x); each has its own virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install_venv.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # tests start several processes; more threads only get in each other's way
if [ "${1:-}" = --slurm ]; then
  set -- tests/slurm "$@"
else
  # Whole files on each of two processes, of which most start others; TEST_PROCESSES=0 for a debugger.
  set -- -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
fi
exec "$VENV/bin/python" -m pytest "$@"
