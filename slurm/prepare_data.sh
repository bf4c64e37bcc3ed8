#!/usr/bin/env bash
#SBATCH --job-name=sdlm_data
#SBATCH --nodes=1
#SBATCH --array=0-7
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Conversations to a packed dataset. Each task of the array tokenizes one shard; merge_data.sh then builds the dataset:
#   CONFIG=mixture_3p5m BASE=DIR OUT=DIR slurm/prepare_data.sh --cluster NAME [--array 0-7] [-- --a.b=c ...]
#   CONFIG=mixture_3p5m BASE=DIR OUT=DIR slurm/merge_data.sh --cluster NAME --after JOB [-- --a.b=c ...]
# CONFIG: preset (for block size 8: mixture_3p5m_d8) or file of sdlm prepare. BASE: Hugging Face folder with the
# tokenizer. OUT: the dataset.
# In a job, $0 is Slurm's copy of this script. Slurm knows the path of the original, which is next to common.sh.
# A busy controller does not answer at once.
self=$0
for pause in 0 10 30 60; do
  [[ $self == */slurm_script ]] || break
  sleep $pause
  path=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;}' | head -1)
  self=${path:-$self}
done
source "$(dirname "$self")/common.sh"
need CONFIG "configuration of sdlm prepare, such as mixture_3p5m"
need BASE "the base model's folder, for its tokenizer"
need OUT "folder of the packed dataset"
task prepare --config "$CONFIG" "--tokenizer=$BASE" "--out=$OUT" \
  "--shard=${SLURM_ARRAY_TASK_ID:-0}/${SLURM_ARRAY_TASK_COUNT:-1}" --- "$@"
