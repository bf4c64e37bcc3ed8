"""Context: quality and tokens per pass with solved examples before the prompt, as earlier turns of a conversation.

The first prompts of the file are measured; the examples come from the prompts after them, so that no measured prompt
is an example. Every prompt has its own examples, the same for all decoding rules. Writes OUT/context.json.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlm_megatron.chat.chat_model import ChatModel, DecodingRule
from sdlm_megatron.config.command_line import at_least, threshold
from sdlm_megatron.errors import DataError, make_console, run_cli
from sdlm_megatron.evaluation import held_out, measurement, signatures
from sdlm_megatron.evaluation.held_out import HeldOutPrompt
from sdlm_megatron.progress import track

BATCH_TOKENS = 8192  # prompt tokens per batch, about: the masks and the cache of a batch grow with them
MOST_ROWS = 32


def rules_of(chat: ChatModel, thresholds: Sequence[float]) -> list[DecodingRule]:
    """n = 1 and, for an SDLM, the probability rule at each threshold."""
    n, plain = chat.config.decoding.block_size, held_out.plain_rules(chat.config.decoding)
    return [*plain, *(DecodingRule("prob_conf", n, tau) for tau in thresholds if n > 1)]


def examples_of(pool: Sequence[HeldOutPrompt], prompt: int, shots: int) -> list[HeldOutPrompt]:
    """The examples before measured prompt number `prompt`: `shots` neighbors in the pool, in its order.

    More shots add examples in front, and keep those nearest to the prompt.
    """
    # any step works that is not a multiple of the pool's size; a large one separates neighboring prompts
    last = 7 * prompt
    return [pool[(last - back) % len(pool)] for back in reversed(range(shots))]


def measure(
    chat: ChatModel,
    encoded: Mapping[int, list[list[int]]],
    prompts: Sequence[HeldOutPrompt],
    rules: Sequence[DecodingRule],
    progress: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Rows of context.json: every rule with each number of shots.

    Args:
        encoded: token ids of the prompts by number of shots.
        progress: called with the number of prompt tokens that were processed.
    """
    length, rows = held_out.longest_answer(chat, prompts), []
    for shots, ids in encoded.items():
        mean = sum(map(len, ids)) / len(ids)
        batch = max(1, min(MOST_ROWS, BATCH_TOKENS // max(map(len, ids))))
        for rule in rules:
            decoded = held_out.decode_prompts(
                chat,
                ids,
                rule,
                max_new_tokens=length,
                batch=batch,
                progress=lambda count, mean=mean: progress(count * mean),  # type: ignore[misc]
            )
            exact = held_out.exact_matches(chat, prompts, decoded)
            seconds = round(decoded.seconds, 3)
            row = {"shots": shots, "context": round(mean, 1), **rule.row, "exact": exact, **decoded.counts}
            rows.append({**row, **signatures.vectors(decoded.tokens, chat.end_tokens), "seconds": seconds})
            print(
                f"{shots:3} shots, {mean:6.0f} tokens  {rule.name:20} {sum(exact)}/{len(exact)} exact, "
                f"{decoded.tokens_per_pass:5.2f} tokens per pass, {seconds:.0f} s",
                flush=True,
            )
    return rows


def split(
    prompts: Sequence[HeldOutPrompt], most: int, shots: int, where: Path, option: str = "--most"
) -> tuple[Sequence[HeldOutPrompt], Sequence[HeldOutPrompt]]:
    """The measured prompts and the pool of examples; DataError when the file is too short for both.

    `option`: the one that sets `most`, for the message.
    """
    measured, pool = prompts[:most], prompts[most:]
    if shots > len(pool):
        raise DataError(
            f"{shots} shots need as many examples after the {len(measured)} measured prompts, there are {len(pool)}",
            str(where),
            f"lower {option} or --shots, or use a longer file",
        )
    return measured, pool


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = measurement.make_parser("context", __doc__, example=f"{measurement.EXAMPLE} --shots 0 4 16")
    measurement.add_prompts(parser, most=64)
    add = parser.add_argument
    shots = [0, 1, 4, 8, 16, 32]
    add("--shots", type=at_least(0), nargs="+", default=shots, metavar="K", help="numbers of examples")
    add("--thresholds", type=threshold, nargs="*", default=[0.98, 0.9], metavar="TAU", help="of prob_conf")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    measured, pool = split(held_out.read_prompts(args.prompts), args.most, max(args.shots), args.prompts)
    chat = measurement.load_model(args)
    encoded = {
        shots: [held_out.encode(chat, prompt, examples_of(pool, i, shots)) for i, prompt in enumerate(measured)]
        for shots in sorted(set(args.shots))
    }
    longest = max(len(ids) for rows in encoded.values() for ids in rows)
    answer = held_out.longest_answer(chat, measured) + chat.config.decoding.block_size
    measurement.check_positions(chat, longest + answer, "--shots")
    rules = rules_of(chat, args.thresholds)
    tokens = len(rules) * sum(len(ids) for rows in encoded.values() for ids in rows)
    with track("decode", tokens, "prompt tokens", make_console()) as advance:
        rows = measure(chat, encoded, measured, rules, advance)
    result = {"rows": rows, "expected": signatures.of_expected(held_out.encode_answers(chat, measured))}
    measurement.write_result(chat, args, argv, "context", result, n_prompts=len(measured))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
