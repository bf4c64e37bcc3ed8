#!/usr/bin/env bash
#SBATCH --job-name=sdlm_merge
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Merges the shards of prepare_data.sh into the packed dataset; see there for the commands.
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
task prepare --config "$CONFIG" "--tokenizer=$BASE" "--out=$OUT" --merge --- "$@"
