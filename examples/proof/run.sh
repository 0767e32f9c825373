#!/usr/bin/env bash
# Does HACL hallucinate less? A controlled world, three regimes, up to seven arms, five or ten seeds:  bash examples/proof/run.sh [--small] [--more] [--fresh]
# In the background: nohup bash examples/proof/run.sh > proof.log 2>&1 &     What is finished is not repeated.
# --small: three arms, two seeds, less of everything; too little to conclude from.
# --more: fifteen further seeds of three arms on web captions, told from 0 more finely.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/install_venv.sh
"$VENV/bin/python" -c "import sklearn" 2>/dev/null || "$VENV/bin/python" -m pip -q install -c tests/constraints.txt -e '.[plots]'

out=output/proof fresh= small= more=
draw=() parts=() teacher=() arms=()
for word in "$@"; do
  case $word in
    --fresh) fresh=1 ;;
    --more) more=1 ;;
    --small)
      small=1
      out=output/proof-small
      draw=(--parts 3000 --pretrain 2000 --finetune 1000 --test 200)
      parts=(--tower-steps 800 --language-steps 300 --telling-steps 0)
      teacher=(--steps 500)
      arms=(--arms none contrastive "HACL own" --seeds 1 2 --limit 100) ;;
    *) echo "unknown: $word" >&2; exit 2 ;;
  esac
done
[ -z "$fresh" ] || rm -rf "$out"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
step() { printf '\n[%s] %s\n' "$1" "$2"; }

if [ ! -f $out/data/scenes.jsonl ]; then
  step 1/5 "Drawing the world"
  "$VENV/bin/python" examples/proof/draw_world.py --output $out/data ${draw[@]+"${draw[@]}"}
fi
step 2/5 "Training the vision tower and the language models, before any arm"
"$VENV/bin/python" examples/proof/make_parts.py --data $out/data --output $out/parts ${parts[@]+"${parts[@]}"}
step 3/5 "Stage 1 and stage 2 of every arm at every seed, two at once, each scored on held-out scenes"
"$VENV/bin/python" examples/proof/run_arms.py --output $out --regimes web ${arms[@]+"${arms[@]}"}
three=(--arms none contrastive "HACL own")
if [ -z "$small" ]; then
  "$VENV/bin/python" examples/proof/run_arms.py --output $out --regimes clean "${three[@]}"
  "$VENV/bin/python" examples/proof/run_arms.py --output $out --regimes telling "${three[@]}" --seeds {1..10}
fi
[ -z "$more" ] || "$VENV/bin/python" examples/proof/run_arms.py --output $out --regimes web "${three[@]}" --seeds {6..20}
step 4/5 "What the language model says, and tells apart, of scenes told without error; gradients of both losses; Figure 1 of the paper"
"$VENV/bin/python" examples/proof/ceiling.py --data $out/data --parts $out/parts
"$VENV/bin/python" examples/proof/teacher.py --data $out/data --parts $out/parts ${teacher[@]+"${teacher[@]}"}
for regime in web clean telling; do
  with=$out/runs/$regime/HACL-own-1/pretrain without=$out/runs/$regime/none-1/pretrain
  [ -d $with ] && [ -d $without ] && [ ! -f $out/representations/$regime/representations.json ] || continue
  "$VENV/bin/python" examples/proof/gradients.py --load $with --data $out/data
  "$VENV/bin/python" tools/plot_representations.py --before $without --load $with --data-path $out/data/test.json \
    --image-folder $out/data/images --output $out/representations/$regime
done
step 5/5 "The table and the verdict"
"$VENV/bin/python" examples/proof/report_arms.py --output $out
[ -z "$more" ] || "$VENV/bin/python" examples/proof/report_arms.py --output $out --first-seed 6
