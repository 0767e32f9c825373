#!/usr/bin/env bash
# Everything that only a GPU can show, in parts with a time limit each; results as JSON and as a table in OUT.
#
#   bash tests/gpu/run.sh [--kit FOLDER] [--out FOLDER] [--only PART ...] [--rehearse]
#
# --kit       a folder of wheels and .tar.xz with builds of Transformer Engine, flash-attn or DALI for this machine, for
#             one that has no network; without it, what the Python at hand has is used
# --rehearse  tiny sizes, also without a GPU
# PYTHON      the interpreter, with torch and what setup.py lists (default: python3)
# Parts and their limits: python3 -m tests.gpu.run --help
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
args=() kit=
while [ $# -gt 0 ]; do
  case $1 in
    --kit) kit=$2; shift 2 ;;
    *) args+=("$1"); shift ;;
  esac
done
site=${TMPDIR:-/tmp}/hacl-gpu-site
if [ -n "$kit" ]; then
  mkdir -p "$site"
  for file in "$kit"/*.xz "$kit"/*.whl; do
    [ -e "$file" ] || continue
    done=$site/.unpacked-$(basename "$file")
    [ ! -e "$done" ] || continue
    case $file in
      *.xz) "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$file" "$site" ;;
      *) "$PYTHON" -m zipfile -e "$file" "$site" ;;
    esac
    touch "$done"
  done
fi
nvidia=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
export LD_LIBRARY_PATH=$nvidia/cudnn/lib:$nvidia/nccl/lib:$nvidia/cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PYTHONPATH=$PWD/tests/gpu/without:$PWD${kit:+:$site}${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
exec "$PYTHON" -m tests.gpu.run ${args[@]+"${args[@]}"}
