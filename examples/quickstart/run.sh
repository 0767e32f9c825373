#!/usr/bin/env bash
# The whole path of HACL on drawn pictures, on a laptop:  bash examples/quickstart/run.sh [--model minigpt4] [--fresh]
# A second run reuses what is there; --fresh begins anew.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=llava fresh=
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
    out=output/quickstart config=examples/quickstart/
    tiny="a tiny LLaVA: a tokenizer, a vision tower that has seen shapes, a LLaMA that has read about them" ;;
  minigpt4)
    out=output/quickstart/minigpt4 config=examples/quickstart/minigpt4_
    tiny="a tiny MiniGPT-4: LLaVA's parts, and a Q-Former that has learnt to tell what the vision tower sees" ;;
  *) echo "--model '$model': expected llava or minigpt4" >&2; exit 2 ;;
esac
. tools/install_venv.sh

[ -z "$fresh" ] || rm -rf "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
step() { printf '\n[%s] %s\n' "$1" "$2"; }
train() { "$VENV/bin/torchrun" --standalone --nproc-per-node 2 -m hacl_megatron.train --device cpu "$@"; }

if [ ! -f $data/valid.json ]; then
  step 1/6 "Drawing JPEGs of coloured shapes, with captions, hallucinated captions and questions"
  "$VENV/bin/python" examples/quickstart/draw.py --output $data
fi
if [ ! -f $out/model/model.safetensors ]; then
  step 2/6 "Making $tiny"
  OMP_NUM_THREADS=2 "$VENV/bin/python" examples/quickstart/make_model.py --model $model --data $data --output $out/model
fi
step 3/6 "Stage 1, pretrain: connector and contrastive heads learn, 2 data-parallel processes"
train --config ${config}pretrain.yaml --save $out/pretrain --load $out/pretrain
step 4/6 "Stage 2, finetune: the language model learns too, 2 tensor-parallel processes; stopped half-way on purpose"
[ -f $out/finetune/latest_checkpointed_iteration.txt ] ||
  train --config ${config}finetune.yaml --exit-interval 50
step 5/6 "Stage 2 resumed at another layout: 2 pipeline stages instead of 2 tensor-parallel ranks"
train --config ${config}finetune.yaml --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2
step 6/6 "Exporting to Hugging Face, and the report"
[ -f $out/export/config.json ] ||
  "$VENV/bin/python" tools/convert_megatron_to_hf.py --load $out/finetune --hf-path $out/export
"$VENV/bin/python" examples/quickstart/report.py --data $data --output $out
