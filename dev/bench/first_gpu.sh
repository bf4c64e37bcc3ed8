#!/bin/sh
# The first minutes on a GPU: dev/bench/first_gpu.sh FOLDER [PART...]. Parts, limits and files: dev/bench/first_gpu.py.
#
# PYTHON=…      interpreter; default: .venv/bin/python of this checkout, else python3
# PYTHONPATH=…  further packages, on a machine where nothing can be installed
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null 2>&1 || python=python3
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m dev.bench.first_gpu "$@"
