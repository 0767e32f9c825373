#!/usr/bin/env bash
# Installs hacl_megatron, Transformer Engine and flash-attn beside the torch of this environment, for CUDA 12 or 13.
#
#   pip install torch && bash tools/install_gpu.sh
#
# An extra of setup.py could not do it: both must be built against the torch that is here, so that pip may not build
# them in isolation, and Transformer Engine's core is another package for each CUDA. No step replaces torch.
#
#   PYTHON=python3        the environment's interpreter
#   FLASH_ATTN=auto       yes: fail without flash-attn; no: leave it out. It compiles for hours where no wheel fits this
#                         torch; from torch 2.10 on a run without it takes torch's own varlen kernel
#   MAX_JOBS=2            compilers at a time; each of flash-attn's takes up to 10 GB of memory
#   DRY_RUN=1             install the tools of the builds alone, build metadata and resolve the rest
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
export MAX_JOBS=${MAX_JOBS:-2}
say() { printf 'install_gpu: %s\n' "$*"; }
_pip() { "$PYTHON" -m pip install --disable-pip-version-check -c "$_torch" "$@"; }
_last() { _pip ${DRY_RUN:+--dry-run} "$@"; }

_seen=$("$PYTHON" -c 'import torch; print(torch.__version__.split("+")[0], torch.version.cuda)' 2>/dev/null) || {
  say "$PYTHON has no torch; pip install torch first (CUDA 13), or for CUDA 12 pip install torch --index-url" \
    "https://download.pytorch.org/whl/cu126"
  exit 2
}
read -r _version _cuda <<<"$_seen"
_major=${_cuda%%.*}
case $_major in
  12 | 13) ;;
  *) say "torch $_version was built for CUDA $_cuda; expected a build for CUDA 12 or 13"; exit 2 ;;
esac
_torch=$(mktemp)
trap 'rm -f "$_torch"' EXIT
echo "torch==$_version" >"$_torch"
say "torch $_version for CUDA $_cuda"

# What a build without isolation has to find. The CUDA headers beside torch include the compiler's, which are not there.
_pip setuptools wheel packaging ninja psutil
if "$PYTHON" -c 'import nvidia, sys; from pathlib import Path
sys.exit(not any(f for p in nvidia.__path__ for f in Path(p).glob("*/include/cudnn.h")))' 2>/dev/null; then
  export NVTE_BUILD_USE_NVIDIA_WHEELS=1
  _crt=$([ "$_major" = 12 ] || echo ,crt) # CUDA 12's are in nvcc's package
  _pip "cuda-toolkit[nvcc,cccl,profiler$_crt]==$_cuda.*" nvidia-cudnn-frontend
fi # else torch stands on a CUDA toolkit, as in NGC's container, and so does the build

_last -e .
# Expert parallelism is not used here, and wants newer NCCL headers than torch may bring.
NVTE_FRAMEWORK=pytorch NVTE_WITH_NCCL_EP=${NVTE_WITH_NCCL_EP:-0} \
  _last --no-build-isolation "transformer-engine[pytorch,core_cu$_major]>=2.4"

case ${FLASH_ATTN:=auto} in
  no) say "flash-attn: left out, as FLASH_ATTN=no says" ;;
  *)
    if ! _last --no-build-isolation 'flash-attn>=2.7'; then
      say "flash-attn: could not be built, see above; a run takes torch's varlen kernel from torch 2.10 on, else SDPA"
      [ "$FLASH_ATTN" = auto ] || exit 1
    fi
    ;;
esac
[ -n "${DRY_RUN:-}" ] || "$PYTHON" -m hacl_megatron.platform
