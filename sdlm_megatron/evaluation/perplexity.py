"""Next-token perplexity of text that has nothing to do with the training: what a model has forgotten.

Plain causal passes, no window: compare a model with what it was before. A text is cut into pieces that are read one by
one without a start token; the first token of a piece is given, the others count. Numbers of other tokenizers cannot
be compared. Without --text, texts that are on any machine with this package. The result is DIR/perplexity.json.
"""

import argparse
import hashlib
import heapq
import importlib
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.errors import ConfigError, DataError, run_cli
from sdlm_megatron.evaluation.common_options import check_room, load_model, parser_of
from sdlm_megatron.evaluation.facts import facts_of
from sdlm_megatron.files import write_json
from sdlm_megatron.progress import track

MODULES = ("argparse", "copy", "heapq", "re", "sched", "shelve", "socketserver", "timeit", "unittest")
"""Of Python's library: their docstrings are long, and mostly prose."""


@dataclass(frozen=True)
class Text:
    """What is read."""

    name: str
    text: str


def texts_at_hand() -> list[Text]:
    """Texts with a free licence that this Python and its packages bring along; versions differ, so names have them."""
    python = f"Python {platform.python_version()}"
    documents = "\n\n".join((importlib.import_module(name).__doc__ or "").strip() for name in MODULES)
    found = [
        Text(f"{python}, heapq.__about__", vars(heapq)["__about__"].strip()),
        Text(f"{python}, docstrings of {', '.join(MODULES)}", documents),
    ]
    package = distribution("transformers")
    readme = package.metadata.json.get("description")
    if readme:
        found.append(Text(f"transformers {package.version}, its README", str(readme).strip()))
    licence = package.read_text("licenses/LICENSE") or package.read_text("LICENSE")
    if licence:
        found.append(Text(f"transformers {package.version}, its licence (Apache 2.0)", licence.strip()))
    return found


def read_text(path: Path) -> Text:
    """A file of --text, named after the file. DataError when it holds no text."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text cannot be read: {error}", f"--text {path}", "name a file in UTF-8") from None
    if not text:
        raise DataError("the file is empty", f"--text {path}", "name a file with text")
    return Text(path.name, text)


def pieces_of(chat: ChatModel, text: Text, length: int, most: int) -> list[list[int]]:
    """The first `most` tokens of a text in pieces of `length` ids; a last piece of one token is dropped."""
    encoded = chat.tokenizer(text.text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids: list[int] = encoded["input_ids"][:most]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


@torch.inference_mode()
def nll_of(chat: ChatModel, piece: Sequence[int]) -> float:
    """Sum of -log p of all tokens but the first, in nats."""
    ids = torch.tensor([piece], device=chat.model.device)
    logits = chat.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


def measure(chat: ChatModel, cut: Sequence[tuple[Text, list[list[int]]]], progress: Callable[[float], None]) -> list:
    """Rows of perplexity.json. "tokens" are those that count, "sha256" that of the whole text."""
    rows: list[dict[str, Any]] = []
    for text, pieces in cut:
        total = 0.0
        for piece in pieces:
            total += nll_of(chat, piece)
            progress(len(piece))
        count = sum(len(piece) - 1 for piece in pieces)
        rows.append(
            {
                "name": text.name,
                "tokens": count,
                "nll": total / count,
                "perplexity": math.exp(total / count),
                "sha256": hashlib.sha256(text.text.encode()).hexdigest(),
            }
        )
        print(f"{rows[-1]['perplexity']:9.2f}  {count:6} tokens  {text.name}", flush=True)
    return rows


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = parser_of("sdlm evaluate perplexity", __doc__, "--model runs/quickstart/hf --out results")
    add = parser.add_argument
    add("--text", type=Path, nargs="+", metavar="FILE", help="in UTF-8; default: texts of Python and its packages")
    add("--length", type=int, default=1024, metavar="N", help="tokens of a piece; default: 1024")
    add("--most", type=int, default=4096, metavar="N", help="tokens read of each text; default: 4096")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    _check(args)
    texts = [read_text(path) for path in args.text] if args.text else texts_at_hand()
    chat = load_model(args)
    check_room(chat, args.length, "--length")
    cut = [(text, pieces_of(chat, text, args.length, args.most)) for text in texts]
    for text, pieces in cut:
        if not pieces:
            raise DataError("the text has only one token", text.name, "give a longer one")
    total = sum(len(piece) for _, pieces in cut for piece in pieces)
    with track("read", total, "tokens", Console()) as advance:
        rows = measure(chat, cut, advance)
    facts = facts_of(chat, parser.prog, argv, length=args.length)
    result = {"kind": "perplexity", "model": str(args.model), "facts": facts, "texts": rows}
    write_json(args.out / "perplexity.json", result)


def _check(args: argparse.Namespace) -> None:
    for option, value in (("--length", args.length), ("--most", args.most)):
        if value < 2:
            raise ConfigError(f"{option} is {value}", "the command line", "give at least 2")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
