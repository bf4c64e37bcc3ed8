#!/usr/bin/env bash
# From conversations to an evaluated model: submits prepare, merge, train, export and evaluate. Each job starts when the
# previous one has succeeded.
#   CONFIG=mixture_3p5m BASE=DIR DATA=DIR RUN_DIR=DIR HELDOUT=FILE.jsonl \
#     slurm/pipeline.sh train_32b_d4 --cluster NAME [--dry-run] [OPTIONS] [-- --a.b=c ...]
# With CONFIG (of sdlm prepare; for train_3b_d8: mixture_3p5m_d8), DATA is built first, by SHARDS (default 8) tasks.
# With HELDOUT, the model decodes that file at the end. OPTIONS, and settings after --, apply to training; --dry-run
# prints and checks every job; the first job waits for those of --after.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; }
training=${1:-}
if [[ $training != train_* || ! -f $here/$training.sh ]]; then
  usage
  if [ "$training" = --help ]; then exit 0; else exit 2; fi
fi
shift
cluster=() dry=false after=() options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --cluster) cluster=("${@:1:2}"); shift $(($# > 1)) ;;
    --cluster=*) cluster=("$1") ;;
    --after) after=("${@:1:2}"); shift $(($# > 1)) ;;
    --after=*) after=("$1") ;;
    --dry-run) dry=true ;;
    *) options+=("$1") ;;
  esac
  shift
done
source "$here/common.sh"
need BASE "the base model, a Hugging Face folder"
need DATA "folder of the packed dataset"
need RUN_DIR "folder of the run"
export BASE DATA RUN_DIR

# stage SCRIPT [OPTIONS]: submits a job that starts after the previous stage; a dry run prints and checks it
stage() {
  local submit=("$PYTHON" -m sdlm_megatron.cli submit "$here/$1.sh" "${after[@]}")
  if $dry; then
    echo "===== $1"
    "${submit[@]}" "${@:2}"
    after=()
  else
    local number
    number=$("${submit[@]}" --parsable "${@:2}")
    if [[ ! $number =~ ^[0-9]+$ ]]; then
      printf 'error: the next job cannot wait for %s: its number is not in the answer: %s\n' "$1" "$number" >&2
      printf '  fix:   look with squeue --me, and submit the later stages with --after JOB\n' >&2
      exit 1
    fi
    echo "$1: job $number"
    after=(--after "$number")
  fi
}
others=("${cluster[@]}")
if $dry; then others+=(--dry-run); fi
if [ -n "${CONFIG:-}" ]; then
  OUT=$DATA stage prepare_data "${others[@]}" ${SHARDS:+--array "0-$((SHARDS - 1))"}
  OUT=$DATA stage merge_data "${others[@]}"
fi
stage "$training" "${options[@]}" "${others[@]}" "$@"
OUT=$RUN_DIR/hf stage export "${others[@]}"
if [ -n "${HELDOUT:-}" ]; then MODEL=$RUN_DIR/hf OUT=$RUN_DIR/evaluation.json stage evaluate "${others[@]}"; fi
