#!/usr/bin/env bash
# The whole path of HACL on drawn pictures, on a laptop:  bash examples/quickstart/run.sh [--model minigpt4] [--fresh]
# A second run reuses what is there; --fresh begins anew.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=llava fresh=''
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=${2:-}; [ $# -eq 1 ] || shift ;;
    --fresh) fresh=yes ;;
    *) echo "$1: expected --model llava, --model minigpt4 or --fresh" >&2; exit 2 ;;
  esac
  shift
done
data=output/quickstart/data
case "$model" in
  llava)
    out=output/quickstart config=examples/quickstart/ half=20
    tiny="a tiny LLaVA: a tokenizer, a vision tower that has seen shapes, a LLaMA that has read about them" ;;
  minigpt4)
    out=output/quickstart/minigpt4 config=examples/quickstart/minigpt4_ half=50
    tiny="a tiny MiniGPT-4: LLaVA's parts, and a Q-Former that has learnt to tell what the vision tower sees" ;;
  *) echo "--model '$model': expected llava or minigpt4" >&2; exit 2 ;;
esac
export PIP_QUIET=1 # with pip's own -q: errors alone
. tools/install_venv.sh

[ -z "$fresh" ] || rm -rf "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
[ -t 2 ] || export TQDM_DISABLE=1 # no progress bars into a file

began=$(date +%s)
step() { # number/6, what, seconds on 2 cores, folder
  printf '\n[%s/6] %s\n      about %s s; files: %s\n' "$@"
  SECONDS=0
}
took() { printf '      took %s s\n' "$SECONDS"; }
train() { "$VENV/bin/torchrun" --standalone --nproc-per-node 2 -m hacl_megatron.train --device cpu "$@"; }
export_hf() { [ -f "$2/config.json" ] || "$VENV/bin/python" tools/convert_megatron_to_hf.py --load "$1" --hf-path "$2"; }

if [ ! -f $data/valid.json ]; then
  step 1 "Drawing JPEGs of coloured shapes, with captions, hallucinated captions and questions" 15 $data
  "$VENV/bin/python" examples/quickstart/draw.py --output $data
  took
fi
if [ ! -f $out/model/model.safetensors ]; then
  step 2 "Making $tiny" 150 $out/model
  OMP_NUM_THREADS=2 "$VENV/bin/python" examples/quickstart/make_model.py --model $model --data $data --output $out/model
  took
fi
step 3 "Stage 1, pretrain: connector and contrastive heads learn, 2 data-parallel processes" 30 $out/pretrain
train --config ${config}pretrain.yaml --save $out/pretrain --load $out/pretrain
took
step 4 "Stage 2, finetune: the language model learns too, 2 tensor-parallel processes; stopped half-way on purpose" 25 $out/finetune
[ -f $out/finetune/latest_checkpointed_iteration.txt ] ||
  train --config ${config}finetune.yaml --exit-interval $half
took
step 5 "Stage 2 resumed at another layout: 2 pipeline stages instead of 2 tensor-parallel ranks" 25 $out/finetune
train --config ${config}finetune.yaml --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2
took
step 6 "Stage 1 again without loss on twins and with the phrase loss, the exports to Hugging Face, and the report" 75 \
  "$out/compare, $out/export, $out/report.html"
again() { # in one process each, side by side; the name of a run and its flags
  local run=$out/compare/$1
  mkdir -p $out/compare
  "$VENV/bin/python" -m hacl_megatron.train --device cpu --config ${config}pretrain.yaml --micro-batch-size 64 \
    --save $run --load $run "${@:2}" >$run.log 2>&1 && export_hf $run $run/export >>$run.log 2>&1 || { cat $run.log >&2; return 1; }
}
again none --contrastive-weight 0 &
again phrase --contrastive-weight 0 --preference-loss phrase --preference-weight 0.03
wait $!
export_hf $out/pretrain $out/export-stage1
export_hf $out/finetune $out/export
"$VENV/bin/python" examples/quickstart/report.py --data $data --output $out
took
echo "All six parts: $(($(date +%s) - began)) s"
