#!/usr/bin/env bash
# Pretrain -> finetune -> export, each started when the one before has finished; from the repository's root:
#   bash examples/slurm/chain.sh 7b|13b [sbatch options] [-- trainer flags of both stages]
# Prints the three job ids. A job that Slurm stops and requeues keeps its id, so the chain holds. Variables reach the
# jobs: RUN and OUTPUT name the folders, PRETRAIN_CONFIG and FINETUNE_CONFIG replace the YAML files. HACL:
#   RUN=hacl-7b PRETRAIN_CONFIG=examples/llava_1_5/hacl_pretrain_7b.yaml bash examples/slurm/chain.sh 7b --nodes 2
set -euo pipefail
here=examples/slurm
size=${1:-}
[ -f "$here/pretrain_$size.sbatch" ] || { echo "usage: chain.sh 7b|13b [sbatch options] [-- trainer flags], in the repository's root" >&2; exit 2; }
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# = 0 ] || shift
export RUN=${RUN:-llava-1.5-$size}

submit() { sbatch --parsable --export=ALL --kill-on-invalid-dep=yes "$@" | cut -d ';' -f 1; }
pretrain=$(submit ${options[@]+"${options[@]}"} $here/pretrain_$size.sbatch "$@")
finetune=$(submit --dependency=afterok:$pretrain ${options[@]+"${options[@]}"} $here/finetune_$size.sbatch "$@")
convert=$(submit --dependency=afterok:$finetune $here/convert.sbatch)
echo "$pretrain $finetune $convert"
