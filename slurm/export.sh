#!/usr/bin/env bash
#SBATCH --job-name=sdlm_export
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Exports the newest complete checkpoint of a run to a Hugging Face folder:
#   RUN_DIR=RUN OUT=DIR slurm/export.sh --cluster NAME [--after JOB] [-- --dtype bf16 ...]
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
need RUN_DIR "the run's folder, or one of its checkpoints"
need OUT "the Hugging Face folder to write"
task export --ckpt "$RUN_DIR" --out "$OUT" --- "$@"
