"""What the commands of this package share: their options, the model they load, lines of progress."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sdlm_megatron.chat.chat_model import DTYPES, ChatModel, load
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.evaluation.decoding import Decoded
from sdlm_megatron.evaluation.prompts import Prompt, encode_answer


def parser_of(command: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """A parser with --model, --out, --dtype, --device and --threads."""
    parser = make_parser(command, description, example=f"{command} {example}")
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="exported folder, or a plain Qwen2 or Llama")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the result file")
    add("--dtype", choices=sorted(DTYPES), help="default: as the folder says")
    add("--device", help="default: a GPU if there is one, else cpu")
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of an option, not below `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return int(text)

    return number


def threshold(text: str) -> float:
    """A confidence of an option, 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """--prompts, --most and --batch."""
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="JSONL", help='lines of {"prompt": …, "expected": …}')
    add("--most", type=at_least(0), default=0, metavar="N", help="use the first so many prompts; default: all")
    add("--batch", type=at_least(1), default=64, metavar="B", help="prompts at a time; default: 64")


def load_model(args: argparse.Namespace) -> ChatModel:
    """The model of --model, which it names; makes --out. ConfigError when the machine cannot do what is asked."""
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads is {args.threads}", "the command line", "give at least 1")
        torch.set_num_threads(args.threads)
    chat = load(args.model, dtype=args.dtype, device=args.device)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder cannot be made: {error}", f"--out {args.out}", "name another") from None
    print(chat.describe(), flush=True)
    return chat


def check_room(chat: ChatModel, needed: int, option: str) -> None:
    """ConfigError when `needed` tokens are more than the model has positions for."""
    most = chat.config.max_position_embeddings
    if needed > most:
        raise ConfigError(
            f"{needed} tokens are needed, the model has {most} positions",
            option,
            "give smaller ones",
        )


def longest_answer(chat: ChatModel, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest expected answer, its end included: what is longer is wrong already."""
    return max(len(encode_answer(chat, prompt.expected)) for prompt in prompts)


def exact_of(chat: ChatModel, prompts: Sequence[Prompt], decoded: Decoded) -> list[int]:
    """1 where the whole answer equals the expected text, else 0."""
    texts = [
        chat.tokenizer.decode([t for t in tokens if t not in chat.end_tokens], clean_up_tokenization_spaces=False)
        for tokens in decoded.tokens
    ]
    return [int(text == prompt.expected) for text, prompt in zip(texts, prompts, strict=True)]
