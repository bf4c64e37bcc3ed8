"""Behaviour with context length: quality and tokens a pass with solved examples before the prompt, as earlier turns.

The first prompts of the file are measured. The ones behind them are the examples, for each prompt others, the same for
all settings; nothing measured is an example. The result is DIR/context.json.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.evaluation.common_options import check_room, exact_of, load_model, longest_answer, parser_of
from sdlm_megatron.evaluation.decoding import Setting, decode_prompts
from sdlm_megatron.evaluation.facts import facts_of
from sdlm_megatron.evaluation.prompts import Prompt, encode, read_prompts
from sdlm_megatron.files import write_json
from sdlm_megatron.progress import track

BATCH_TOKENS = 8192
"""Prompt tokens of a batch, about: what its masks and cache take grows with them."""
MOST_ROWS = 32


def settings_of(chat: ChatModel, thresholds: Sequence[float]) -> list[Setting]:
    """One token a pass, and of an SDLM the probability at each threshold."""
    n = chat.config.block_size or 1
    return [Setting(), *(Setting("prob_conf", n, tau) for tau in thresholds if n > 1)]


def examples_of(pool: Sequence[Prompt], prompt: int, shots: int) -> list[Prompt]:
    """The examples before measured prompt number `prompt`: `shots` of the pool in its order, from another place on.

    With more shots the nearest examples stay and earlier ones come before them.
    """
    last = 7 * prompt  # of neighbours others; any step would do
    return [pool[(last - back) % len(pool)] for back in reversed(range(shots))]


def encode_all(chat: ChatModel, prompts: Sequence[Prompt], pool: Sequence[Prompt], shots: int) -> list[list[int]]:
    """Ids of every prompt behind its examples."""
    return [encode(chat, prompt, examples_of(pool, i, shots)) for i, prompt in enumerate(prompts)]


def measure(
    chat: ChatModel,
    encoded: dict[int, list[list[int]]],
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    progress: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Rows of context.json: every setting with each number of shots.

    Args:
        encoded: ids of the prompts by number of shots.
        progress: called with prompt tokens that were done.
    """
    room, rows = longest_answer(chat, prompts), []
    for shots, ids in encoded.items():
        mean = sum(map(len, ids)) / len(ids)
        batch = max(1, min(MOST_ROWS, BATCH_TOKENS // max(map(len, ids))))
        for setting in settings:
            done = decode_prompts(
                chat,
                ids,
                setting,
                max_new_tokens=room,
                batch=batch,
                progress=lambda count, mean=mean: progress(count * mean),  # type: ignore[misc]
            )
            rows.append(
                {
                    "shots": shots,
                    "context": round(mean, 1),
                    "alg": setting.alg,
                    "n": setting.window,
                    "threshold": setting.threshold if setting.alg != "ar" else None,
                    "exact": exact_of(chat, prompts, done),
                    "tokens": [sum(kept) for kept in done.accepted],
                    "passes": [len(kept) for kept in done.accepted],
                    "seconds": round(done.seconds, 3),
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    name = Setting(row["alg"], row["n"], row["threshold"] or 1.0).name
    return (
        f"{row['shots']:3} shots, {row['context']:6.0f} tokens  {name:20} "
        f"{sum(row['exact'])}/{len(row['exact'])} exact, {sum(row['tokens']) / sum(row['passes']):5.2f} tokens a pass, "
        f"{row['seconds']:.0f} s"
    )


def split(prompts: Sequence[Prompt], most: int, shots: int, where: Path) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """What is measured, and what examples come from; DataError when the file is too short for both."""
    measured, pool = prompts[:most], prompts[most:]
    if shots > len(pool):
        raise DataError(
            f"{shots} shots need as many examples behind the {len(measured)} prompts that are measured, "
            f"there are {len(pool)}",
            str(where),
            "measure fewer (--most), ask for fewer --shots, or give a longer file",
        )
    return measured, pool


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    example = "--model runs/quickstart/hf --prompts held_out.jsonl --out results --shots 0 4 16"
    parser = parser_of("sdlm evaluate context", __doc__, example)
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="JSONL", help='lines of {"prompt": …, "expected": …}')
    add("--most", type=int, default=64, metavar="N", help="prompts that are measured; default: 64")
    add("--shots", type=int, nargs="+", default=[0, 1, 4, 8, 16, 32], metavar="K", help="default: 0 1 4 8 16 32")
    add("--thresholds", type=float, nargs="*", default=[0.98, 0.9], metavar="TAU", help="default: .98 .9")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    _check(args)
    measured, pool = split(read_prompts(args.prompts), args.most, max(args.shots), args.prompts)
    chat = load_model(args)
    encoded = {shots: encode_all(chat, measured, pool, shots) for shots in sorted(set(args.shots))}
    longest = max(len(ids) for rows in encoded.values() for ids in rows)
    check_room(chat, longest + longest_answer(chat, measured) + (chat.config.block_size or 1), "--shots")
    settings = settings_of(chat, args.thresholds)
    tokens = len(settings) * sum(len(ids) for rows in encoded.values() for ids in rows)
    with track("decode", tokens, "prompt tokens", Console()) as advance:
        rows = measure(chat, encoded, measured, settings, advance)
    facts = facts_of(chat, parser.prog, argv, prompts=str(args.prompts), n_prompts=len(measured))
    write_json(args.out / "context.json", {"kind": "context", "model": str(args.model), "facts": facts, "rows": rows})


def _check(args: argparse.Namespace) -> None:
    wrong = {
        "--most": (args.most, args.most >= 1, "at least 1"),
        "--shots": (min(args.shots), min(args.shots) >= 0, "0 or more"),
        "--thresholds": (args.thresholds, all(0 <= tau <= 1 for tau in args.thresholds), "between 0 and 1"),
    }
    for name, (value, fits, fix) in wrong.items():
        if not fits:
            raise ConfigError(f"{name} is {value}", "the command line", f"give {fix}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
