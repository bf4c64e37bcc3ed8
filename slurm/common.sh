# Sourced by the scripts beside it. Each of them is both the batch script of a job (`sbatch slurm/X.sh`) and the command
# that submits that job with the settings of a cluster (`slurm/X.sh --cluster NAME`).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
fi

# job KIND [ARGUMENTS]: submits the script, or inside the job becomes the program that does the work. Signals wait until
# that program listens: bash would die of them.
job() {
  if [[ $0 != */slurm_script ]]; then exec "$PYTHON" -m sdlm_megatron.job.submit "$(realpath "$self")" "$@"; fi
  trap '' USR1 USR2 TERM
  exec "$PYTHON" -m "sdlm_megatron.job.$1" "${@:2}"
}
