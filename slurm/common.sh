# Sourced by the scripts beside it. Each of them is both the batch script of a job (`sbatch slurm/X.sh`) and the command
# that submits that job with the settings of a cluster (`slurm/X.sh --cluster NAME`).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
fi

# submit_unless_in_job KIND [ARGUMENTS] --- OPTIONS OF THE USER
submit_unless_in_job() {
  if [[ $0 != */slurm_script ]]; then exec "$PYTHON" -m sdlm_megatron.ops.driver.submit "$(realpath "$0")" "$@"; fi
}

# train PRESET [OPTIONS] [-- SETTINGS]: the job's driver takes the place of this shell. Bash would die of the signals
# that say that the time is up; until the driver listens they are ignored.
train() {
  submit_unless_in_job driver --config "$1" --- "${@:2}"
  trap '' USR1 USR2 TERM
  exec "$PYTHON" -m sdlm_megatron.ops.driver.driver --config "$1" "${@:2}"
}

# task MODULE [ARGUMENTS] --- [OPTIONS] [-- SETTINGS]: one program on one node
task() {
  submit_unless_in_job task "$@"
  local program=()
  while [ "$1" != --- ]; do program+=("$1"); shift; done
  shift
  local cluster=default
  while [ $# -gt 0 ]; do
    case $1 in
      --cluster) cluster=$2; shift 2 ;;
      --) shift; program+=("$@"); break ;;
      *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
  done
  exec "$PYTHON" -m sdlm_megatron.ops.driver.single_node_job --cluster "$cluster" -- "${program[@]}"
}

# need NAME "what it is": stops with a message where the variable is not set
need() {
  if [ -z "${!1:-}" ]; then
    printf 'error: %s is not set: %s\n  fix:   %s=... before the command\n' "$1" "$2" "$1" >&2; exit 2
  fi
}
