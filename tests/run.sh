#!/usr/bin/env bash
# Every test, from nothing but Python and pip:  bash tests/run.sh [pytest arguments]
# PYTHON=python3.12 picks another interpreter (and with it megatron-core 0.19.x); each has its own virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install_venv.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # tests start several processes; more threads only get in each other's way
exec "$VENV/bin/python" -m pytest "$@"
