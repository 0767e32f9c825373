#!/usr/bin/env bash
# Three pools of negatives compared, from the same start:  bash examples/quickstart/pools.sh [--fresh]
# Stage 1 of the quickstart with micro-batches of 8 instead of 32, 64 samples a step as before. Needs what run.sh makes.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/install_venv.sh

data=output/quickstart/data out=output/quickstart/pools
[ "${1:-}" != --fresh ] || rm -rf "$out"
[ -f output/quickstart/model/model.safetensors ] || { echo "run examples/quickstart/run.sh first" >&2; exit 1; }
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

for pool in micro-batch global-batch queue; do
  printf '\n[%s]\n' $pool
  "$VENV/bin/torchrun" --standalone --nproc-per-node 2 -m hacl_megatron.train --device cpu \
    --config examples/quickstart/pretrain.yaml --save $out/$pool --load $out/$pool \
    --tensorboard-dir $out/tensorboard/$pool --micro-batch-size 8 --global-batch-size 64 --train-iters 48 --eval-interval 0 \
    --contrastive-negatives $pool --queue-size 512
  [ -f $out/$pool/export/config.json ] ||
    "$VENV/bin/python" tools/convert_megatron_to_hf.py --load $out/$pool --hf-path $out/$pool/export
done
"$VENV/bin/python" examples/quickstart/pools.py --data $data --runs $out
echo "All curves: tensorboard --logdir $out/tensorboard"
