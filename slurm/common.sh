# Sourced by the scripts in this folder. Each of them is both the batch script of a job (`sbatch slurm/X.sh`) and the command
# that submits that job with the settings of a cluster (`slurm/X.sh --cluster NAME`, the same as `sdlm submit X`).
set -euo pipefail
scripts=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
if [ -d "$scripts/../sdlm_megatron" ]; then
  # In a checkout: its code, also inside a container that has only the dependencies, and its virtual environment.
  root=$(dirname "$scripts")
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  python=$root/.venv/bin/python
else
  # Installed in PREFIX/lib/pythonX.Y/site-packages/sdlm_megatron/ops/slurm; for a copy elsewhere there is no such file.
  # The link is not followed, as only its path selects the environment. PYTHONPATH stays as it is: a container with
  # another version of Python must not import this environment's packages.
  python=${scripts%/*/*/*/sdlm_megatron/ops/slurm}/bin/python3
fi
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$python" ]; then PYTHON=$python; else PYTHON=python3; fi
fi

# submit_unless_in_job [OPTIONS OF THE USER]. In a job, Slurm runs a copy of the script named slurm_script.
submit_unless_in_job() {
  if [[ $0 != */slurm_script ]]; then exec "$PYTHON" -m sdlm_megatron.cli submit "$(realpath "$0")" "$@"; fi
}

# train PRESET [OPTIONS] [-- SETTINGS]: the job's driver replaces this shell. The signals that announce the time
# limit or a preemption would end bash, so they are ignored until the driver handles them.
train() {
  submit_unless_in_job "${@:2}"
  trap '' USR1 USR2 TERM
  exec "$PYTHON" -m sdlm_megatron.ops.driver.driver --config "$1" "${@:2}"
}

# task COMMAND [ARGUMENTS] --- [OPTIONS] [-- ARGUMENTS]: one command of sdlm (or module of Python) on one node
task() {
  local program=() cluster=default
  while [ "$1" != --- ]; do program+=("$1"); shift; done
  shift
  submit_unless_in_job "$@"
  while [ $# -gt 0 ]; do
    case $1 in
      --cluster) cluster=$2; shift 2 ;;
      --) shift; program+=("$@"); break ;;
      *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
  done
  exec "$PYTHON" -m sdlm_megatron.ops.driver.launch --cluster "$cluster" -- "${program[@]}"
}

# need NAME "meaning": ends with a message if the variable is not set. `sdlm submit` reads these lines too.
need() {
  if [ -z "${!1:-}" ]; then
    printf 'error: %s is not set: %s\n  fix:   %s=... before the command\n' "$1" "$2" "$1" >&2; exit 2
  fi
}
