#!/usr/bin/env bash
#SBATCH --job-name=sdlm_evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# How well and how fast an exported model decodes held-out prompts, plainly and with blocks at three thresholds:
#   MODEL=DIR HELDOUT=FILE.jsonl OUT=evaluation.json slurm/evaluate.sh --cluster NAME [--after JOB] [-- --base DIR ...]
# HELDOUT: lines of {"prompt": ..., "expected": ...}.
self=$0; [[ $0 != */slurm_script ]] || self=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p' | head -1)
source "$(dirname "$self")/common.sh"
need MODEL "folder written by export.sh"
need HELDOUT "JSONL of {prompt, expected}"
need OUT "evaluation.json to write"
task sdlm_megatron.cli evaluate table --model "$MODEL" --prompts "$HELDOUT" --out "$OUT" --- "$@"
