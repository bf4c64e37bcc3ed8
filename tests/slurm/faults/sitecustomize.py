"""Fault injection: Python imports this module from the drill's PYTHONPATH; each rank reads its order from a file.

    FAULTS/RANK  with "exit 42"   the process exits at once with that code, as if a library called _exit
                 with "nan"       some weights of the process become NaN before its next step
                 with "sleep"     the main thread sleeps in its next step: a hang whose stack Python can show

The training code is unchanged, and only ranks are affected. FAULTS is the environment
variable SDLM_FAULTS.
"""

import os
import threading
import time


def _watch(folder: str, rank: str) -> None:
    file = os.path.join(folder, rank)
    while True:
        time.sleep(0.05)
        try:
            with open(file, encoding="utf-8") as opened:
                words = opened.read().split()
            if not words:  # the file is still being written
                continue
            os.unlink(file)
        except OSError:
            continue
        if words[:1] == ["exit"]:
            os._exit(int(words[1]))
        if words[:1] == ["sleep"]:
            _before_the_next_step(_sleep)
        if words[:1] == ["nan"]:
            _before_the_next_step(_poison)


def _sleep(engine) -> None:
    time.sleep(600)


def _poison(engine) -> None:
    engine.optimizer.get_parameters()[0].data.fill_(float("nan"))


def _before_the_next_step(act) -> None:
    from sdlm_megatron.parallel.engine import Engine

    train_step = Engine.train_step

    def acts_first(self, *args, **kwargs):
        Engine.train_step = train_step
        act(self)
        return train_step(self, *args, **kwargs)

    Engine.train_step = acts_first


if os.environ.get("SDLM_FAULTS") and os.environ.get("SDLM_LAUNCH") == "srun":  # a rank, not the driver
    threading.Thread(
        target=_watch,
        args=(os.environ["SDLM_FAULTS"], os.environ["SLURM_PROCID"]),
        daemon=True,
        name="faults",
    ).start()
