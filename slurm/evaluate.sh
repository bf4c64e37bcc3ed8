#!/usr/bin/env bash
#SBATCH --job-name=sdlm_evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Decodes held-out prompts with an exported model, one token per pass (n = 1) and in blocks at three thresholds:
#   MODEL=DIR HELDOUT=FILE.jsonl OUT=RUN/evaluation.json slurm/evaluate.sh --cluster NAME [--after JOB] [-- --base DIR ...]
# HELDOUT: lines of {"prompt": ..., "expected": ...}.
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
need MODEL "folder written by export.sh"
need HELDOUT "JSONL of {prompt, expected}"
need OUT "file to write; sdlm report shows RUN/evaluation.json"
task evaluate table --model "$MODEL" --prompts "$HELDOUT" --out "$OUT" --- "$@"
