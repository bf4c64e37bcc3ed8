"""Calibration: compare the confidence of every slot with its accuracy along the expected answers.

The expected answers are probed with a block at every anchor (teacher forcing, as in training); a slot is correct if
its most likely token is the answer's. Writes OUT/calibration.json. `sdlm evaluate page OUT` draws reliability,
precision and recall, and acceptance by slot.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.errors import make_console, run_cli
from sdlm_megatron.evaluation import held_out, measurement
from sdlm_megatron.evaluation.held_out import HeldOutPrompt
from sdlm_megatron.evaluation.probe import probe
from sdlm_megatron.progress import track


def slots_of(
    chat: ChatModel, prompts: Sequence[HeldOutPrompt], window: int, batch: int, where: Path
) -> list[dict[str, Any]]:
    """Confidence and correctness of each slot at the positions where every slot has a target, as calibration.json.

    ShortAnswersError names the file `where` if there is no such position.
    """
    answers = held_out.encode_answers(chat, prompts)
    if (longest := max(map(len, answers))) < window:
        what = f"no expected answer has {window} tokens, as many as a window; the longest has {longest}"
        raise held_out.ShortAnswersError(what, str(where), "use prompts with longer answers")
    encoded = held_out.encode_prompts(chat, prompts, own=True)
    with track("probe", len(prompts), "prompts", make_console()) as advance:
        probes = probe(chat, encoded, answers, window=window, batch=batch, progress=advance)
    slots: list[dict[str, Any]] = [{"slot": j, "prob": [], "entropy": [], "right": []} for j in range(window)]
    for answer, probed in zip(answers, probes, strict=True):
        targets = torch.tensor(answer)
        # slot j of the block before answer token i predicts answer token i + j
        positions = max(0, len(answer) - window + 1)
        assert probed.entropy is not None
        for j, slot in enumerate(slots):
            correct = probed.tokens[:positions, j] == targets[j : positions + j]
            slot["right"] += correct.int().tolist()
            slot["prob"] += [round(x, 4) for x in probed.prob[:positions, j].tolist()]
            slot["entropy"] += [round(x, 4) for x in probed.entropy[:positions, j].tolist()]
    return slots


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = measurement.make_parser("calibration", __doc__)
    measurement.add_prompts(parser, batch=held_out.BATCH)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    prompts = held_out.read_prompts(args.prompts, args.most or 0)
    chat = measurement.load_model(args)
    window = measurement.trained_block_size(chat, "name a folder that a training run was exported to")
    slots = slots_of(chat, prompts, window, args.batch, args.prompts)
    for slot in slots:
        count = len(slot["right"])
        accuracy, confidence = sum(slot["right"]) / count, sum(slot["prob"]) / count
        print(f"slot {slot['slot'] + 1}   accuracy {accuracy:6.1%}, confidence {confidence:6.1%}   ({count} positions)")
    measurement.write_result(chat, args, argv, "calibration", {"slots": slots}, n_prompts=len(prompts))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
