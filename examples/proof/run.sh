#!/usr/bin/env bash
# Which objective of this trainer hallucinates less? A controlled world, fourteen arms, 12 seeds:  bash examples/proof/run.sh [--small] [--seeds N] [--new-parts] [--fresh]
# In the background: nohup bash examples/proof/run.sh > proof.log 2>&1 &     What is finished is not repeated, and a stop costs one run.
# --small: three arms, two seeds, fewer pictures; too little to conclude from.
# --seeds N: the first N seeds (12), in their order, so that a stop leaves whole blocks of arms.
# --new-parts: trains a vision tower and a language model (40 minutes or more) instead of taking those in examples/proof/parts;
# everything in a folder of its own, output/proof-new-parts.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/install_venv.sh
"$VENV/bin/python" -c "import scipy, matplotlib" 2>/dev/null || "$VENV/bin/python" -m pip -q install -c tests/constraints.txt -e '.[plots]'

fresh= small= new_parts= seeds=12
draw=() parts=(--telling-steps 0) runs=(--limit 1000 --limit-stage1 300)
report=(--answers examples/proof/answers.jsonl.xz)
while [ $# -gt 0 ]; do
  case $1 in
    --fresh) fresh=1 ;;
    --new-parts) new_parts=1 ;;
    --seeds) seeds=${2:-}; shift ;;
    --small)
      small=1 seeds=2
      draw=(--parts 3000 --pretrain 1 --finetune 1 --habit-pretrain 2000 --habit-finetune 1000 --habit-prefer 320 --test 200 --dev 200)
      parts+=(--tower-steps 800 --language-steps 300 --further-rounds 0)
      runs=(--limit 100 --arms none contrastive phrase) ;;
    *) echo "unknown: $1" >&2; exit 2 ;;
  esac
  shift
done
[[ $seeds =~ ^[1-9][0-9]*$ ]] || { echo "--seeds '$seeds': expected a number of seeds" >&2; exit 2; }
out=output/proof${small:+-small}${new_parts:+-new-parts}
[ -z "$fresh" ] || rm -rf "$out"
[ -z "$small$new_parts" ] || report=(--answers $out/answers.jsonl.xz --output $out)
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
step() { printf '\n[%s] %s\n' "$1" "$2"; }

if [ ! -f $out/data/scenes.jsonl ] || [ ! -f $out/data/habit_prefer.json ]; then
  step 1/4 "Drawing the world"
  "$VENV/bin/python" examples/proof/draw_world.py --output $out/data ${draw[@]+"${draw[@]}"}
fi
step 2/4 "The vision tower and the language model, which stand before any arm"
if [ -z "$new_parts" ] && [ ! -d $out/parts ]; then
  rm -rf $out/parts.copied
  cp -r examples/proof/parts $out/parts.copied && mv $out/parts.copied $out/parts
fi
"$VENV/bin/python" examples/proof/make_parts.py --data $out/data --output $out/parts "${parts[@]}"
step 3/4 "The stages of every arm at every seed, two runs at once, each scored on held-out scenes"
"$VENV/bin/python" examples/proof/run_arms.py --output $out --seeds $(seq 1 "$seeds") "${runs[@]}"
step 4/4 "The tables, the tests and the figure"
"$VENV/bin/python" examples/proof/report.py --collect $out "${report[@]}"
