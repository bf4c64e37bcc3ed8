"""Is a slot's confidence its accuracy? Every slot's first choice along the right answers, beside how sure it was.

The expected answers are probed with a block at every anchor (teacher forcing, as in training); a slot is right when
its likeliest token is the answer's. Writes OUT/calibration.json; `python -m sdlm_megatron.evaluation.page OUT` draws reliability,
precision and recall, acceptance by slot.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.evaluation.common_options import add_prompt_options, load_model, parser_of
from sdlm_megatron.evaluation.facts import facts_of
from sdlm_megatron.evaluation.probe import probe
from sdlm_megatron.evaluation.prompts import Prompt, encode, encode_answer, read_prompts
from sdlm_megatron.files import write_json
from sdlm_megatron.progress import track


def slots_of(chat: ChatModel, prompts: Sequence[Prompt], window: int, batch: int) -> list[dict]:
    """Confidences and correctness of each slot, over the places where every slot has a target."""
    answers = [encode_answer(chat, prompt.expected) for prompt in prompts]
    encoded = [encode(chat, prompt) for prompt in prompts]
    with track("probe", len(prompts), "prompts", Console()) as advance:
        probes = probe(chat, encoded, answers, window=window, batch=batch, progress=advance)
    slots: list[dict[str, Any]] = [{"slot": j, "prob": [], "entropy": [], "right": []} for j in range(window)]
    for answer, seen in zip(answers, probes, strict=True):
        wanted = torch.tensor(answer)
        places = max(0, len(answer) - window + 1)  # slot j of the block before answer token i has answer token i + j
        for j, slot in enumerate(slots):
            right = seen.tokens[:places, j] == wanted[j : places + j]
            slot["right"] += right.int().tolist()
            slot["prob"] += [round(x, 4) for x in seen.prob[:places, j].tolist()]
            assert seen.entropy is not None
            slot["entropy"] += [round(x, 4) for x in seen.entropy[:places, j].tolist()]
    return slots


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "--model runs/quickstart/hf --prompts runs/quickstart/task/heldout.jsonl --out results"
    parser = parser_of("sdlm evaluate calibration", __doc__, example)
    add_prompt_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    prompts = read_prompts(args.prompts, args.most)
    chat = load_model(args)
    if chat.config.block_size is None:
        fix = "name a folder that a training run was exported to"
        raise CheckpointError("the model has no block_size: it is no SDLM", str(args.model), fix)
    slots = slots_of(chat, prompts, chat.config.block_size, args.batch)
    for slot in slots:
        share = sum(slot["right"]) / len(slot["right"])
        sure = sum(slot["prob"]) / len(slot["prob"])
        print(f"slot {slot['slot'] + 1}   {share:6.1%} right, {sure:6.1%} sure   ({len(slot['right'])} places)")
    facts = facts_of(chat, parser.prog, argv, prompts=str(args.prompts), n_prompts=len(prompts))
    value = {"kind": "calibration", "model": str(args.model), "facts": facts, "slots": slots}
    write_json(args.out / "calibration.json", value)
    print(f"wrote {args.out / 'calibration.json'}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
