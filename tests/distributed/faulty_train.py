"""`python -m sdlm_megatron.train` with an injected fault in one rank: FAULT="KIND RANK STEP", for nan also a token."""

import os
import signal
import sys
from collections.abc import Sequence

from sdlm_megatron.errors import run_cli
from sdlm_megatron.train import main

if __name__ == "__main__":
    from sdlm_megatron.parallel import compat, cpu

    compat.silence_known_notices()
    cpu.install()
    import torch

    from sdlm_megatron.diffusion.row import MicroBatch
    from sdlm_megatron.parallel.engine import Engine
    from sdlm_megatron.parallel.results import QueuedStep

    KIND, RANK, STEP, *TOKEN = os.environ["FAULT"].split()
    original_train_step = Engine.train_step

    def faulty(self: Engine, batches: Sequence[MicroBatch], step: int, **options: bool) -> QueuedStep:
        if os.environ["RANK"] == RANK and step == int(STEP):
            if KIND == "usr1":
                os.kill(os.getpid(), signal.SIGUSR1)
            elif KIND == "nan":
                with torch.no_grad():
                    self.module.embedding.word_embeddings.weight[int(TOKEN[0])] = torch.nan
            elif KIND == "flip":
                with torch.no_grad():
                    self.module.decoder.layers[1].mlp.linear_fc1.weight.view(-1).view(torch.int32)[7] ^= 1
        return original_train_step(self, batches, step, **options)

    Engine.train_step = faulty  # type: ignore[method-assign]
    run_cli(main, sys.argv[1:])
