#!/usr/bin/env bash
# Three losses compared in stage 2, from the same stage 1, with three seeds:  bash examples/quickstart/losses.sh [--fresh]
# Needs what run.sh makes. Nine runs of a minute each, and their scores; SEEDS="1" in front makes it three.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/install_venv.sh

data=output/quickstart/data out=output/quickstart/losses
[ "${1:-}" != --fresh ] || rm -rf "$out"
[ -f output/quickstart/pretrain/latest_checkpointed_iteration.txt ] || { echo "run examples/quickstart/run.sh first" >&2; exit 1; }
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

read -ra seeds <<<"${SEEDS:-1 2 3}"
for seed in "${seeds[@]}"; do
  for loss in none hacl phrase; do
    run=$out/$loss-$seed flags=(--contrastive-weight 0)
    [ $loss != hacl ] || flags=(--contrastive-weight 0.2)
    [ $loss != phrase ] || flags+=(--preference-loss phrase)
    printf '\n[%s, seed %s]\n' $loss $seed
    "$VENV/bin/torchrun" --standalone --nproc-per-node 2 -m hacl_megatron.train --device cpu \
      --config examples/quickstart/finetune.yaml --save $run --load $run --tensorboard-dir $out/tensorboard/$loss-$seed \
      --tensor-model-parallel-size 1 --micro-batch-size 32 --seed $seed --eval-interval 100 --eval-tasks preference \
      "${flags[@]}"
    [ -f $run/export/config.json ] || "$VENV/bin/python" tools/convert_megatron_to_hf.py --load $run --hf-path $run/export
  done
done
"$VENV/bin/python" examples/quickstart/losses.py --data $data --runs $out --seeds "${seeds[@]}"
echo "All curves: tensorboard --logdir $out/tensorboard"
