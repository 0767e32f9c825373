#!/usr/bin/env bash
# Pretrain -> finetune -> export, each started when the one before has finished; from the repository's root:
#   bash examples/slurm/chain.sh 7b|13b [--preference phrase|dpo|mdpo] [sbatch options] [-- trainer flags of all stages]
# With --preference (7b alone), a job that trains on hallucinated twins stands between finetune and export. Prints the
# job ids. A job that Slurm stops and requeues keeps its id, so the chain holds. Variables reach the jobs: RUN and
# OUTPUT name the folders; PRETRAIN_CONFIG, FINETUNE_CONFIG and PREFERENCE_CONFIG replace the YAML files. HACL:
#   RUN=hacl-7b PRETRAIN_CONFIG=examples/llava_1_5/hacl_pretrain_7b.yaml bash examples/slurm/chain.sh 7b --nodes 2
set -euo pipefail
here=examples/slurm
size=${1:-}
fail() { echo "$1" >&2; exit 2; }
usage="chain.sh 7b|13b [--preference phrase|dpo|mdpo] [sbatch options] [-- trainer flags], in the repository's root"
[ -f "$here/pretrain_$size.sbatch" ] || fail "usage: $usage"
shift
options=() given= preference=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --preference) [ $# -gt 1 ] || fail "--preference: expected phrase, dpo or mdpo"; given=yes preference=$2; shift ;;
    --preference=*) given=yes preference=${1#*=} ;;
    *) options+=("$1") ;;
  esac
  shift
done
case $preference in
  phrase | dpo | mdpo)
    [ -f "$here/preference_$size.sbatch" ] || fail "--preference $preference: not with $size; expected 7b" ;;
  *) [ -z "$given" ] || fail "--preference '$preference': expected phrase, dpo or mdpo" ;;
esac
[ $# = 0 ] || shift
export RUN=${RUN:-llava-1.5-$size}

submit() { sbatch --parsable --export=ALL --kill-on-invalid-dep=yes "$@" | cut -d ';' -f 1; }
pretrain=$(submit ${options[@]+"${options[@]}"} $here/pretrain_$size.sbatch "$@")
finetune=$(submit --dependency=afterok:$pretrain ${options[@]+"${options[@]}"} $here/finetune_$size.sbatch "$@")
jobs="$pretrain $finetune" last=$finetune
if [ -n "$preference" ]; then
  export PREFERENCE=$preference
  last=$(submit --dependency=afterok:$finetune ${options[@]+"${options[@]}"} $here/preference_$size.sbatch "$@")
  jobs+=" $last" RUN+=-$preference  # what it saves is what is exported
fi
convert=$(submit --dependency=afterok:$last $here/convert.sbatch)
echo "$jobs $convert"
