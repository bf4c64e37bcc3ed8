#!/usr/bin/env bash
#SBATCH --job-name=sdlm_3b_d4
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
# SDLM-3B, block size 4, from Qwen2.5-3B: the published recipe on 4 nodes of 8 H100.
#   DATA=DIR BASE=DIR sbatch --mem=0 slurm/train_3b_d4.sh [OPTIONS] [-- --a.b=c ...]  with the #SBATCH options above
#   DATA=DIR BASE=DIR slurm/train_3b_d4.sh --cluster NAME [OPTIONS] [-- --a.b=c ...]  with those of a cluster file
# DATA: packed dataset (prepare_data.sh). BASE: Hugging Face folder. RUN_DIR: folder of the run. OPTIONS: --help, --dry-run
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
train sdlm_3b_d4 "$@"
