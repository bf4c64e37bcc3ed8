"""`python -m sdlm_megatron.train` with small gradient buckets, so that a tiny model has several of them."""

import sys

from sdlm_megatron.errors import run_cli
from sdlm_megatron.train import main

if __name__ == "__main__":
    from sdlm_megatron.parallel import compat, cpu

    compat.silence_known_notices()
    cpu.install()
    from sdlm_megatron.parallel import optimizer

    optimizer.BUCKET_PARAMETERS = 5000
    run_cli(main, sys.argv[1:])
