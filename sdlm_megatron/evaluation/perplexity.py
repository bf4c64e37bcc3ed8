"""Perplexity: next-token perplexity of text unrelated to the training data, a measure of forgetting.

Compare a model with its base. Texts are read by plain causal passes without a window, in pieces without a start token;
the first token of a piece is context only. Without --text, reads texts that are installed on every machine with this
package. Perplexities of different tokenizers cannot be compared. Writes OUT/perplexity.json.
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

from sdlm_megatron.chat.chat_model import ChatModel
from sdlm_megatron.config.command_line import at_least
from sdlm_megatron.errors import DataError, make_console, run_cli
from sdlm_megatron.evaluation import measurement
from sdlm_megatron.progress import track

# Modules of Python's standard library with long docstrings that are mostly prose.
MODULES = ("argparse", "copy", "heapq", "re", "sched", "shelve", "socketserver", "timeit", "unittest")


@dataclass(frozen=True)
class NamedText:
    name: str
    text: str


def installed_texts() -> list[NamedText]:
    """Freely licensed texts that come with Python and its packages; names contain the versions, which differ."""
    python = f"Python {platform.python_version()}"
    documents = "\n\n".join((importlib.import_module(name).__doc__ or "").strip() for name in MODULES)
    texts = [
        NamedText(f"{python}, heapq.__about__", vars(heapq)["__about__"].strip()),
        NamedText(f"{python}, docstrings of {', '.join(MODULES)}", documents),
    ]
    package = distribution("transformers")
    readme = package.metadata.json.get("description")
    if readme:
        texts.append(NamedText(f"transformers {package.version}, its README", str(readme).strip()))
    # the place of the license inside a wheel changed with the metadata version
    license_text = package.read_text("licenses/LICENSE") or package.read_text("LICENSE")
    if license_text:
        name = f"transformers {package.version}, its licence (Apache 2.0)"
        texts.append(NamedText(name, license_text.strip()))
    return texts


def read_text(path: Path) -> NamedText:
    """A file of --text, named after the file. DataError when it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text cannot be read: {error}", f"--text {path}", "name a file in UTF-8") from None
    if not text:
        raise DataError("the file is empty", f"--text {path}", "name a file with text")
    return NamedText(path.name, text)


def pieces_of(chat: ChatModel, text: NamedText, length: int, most: int) -> list[list[int]]:
    """The first `most` tokens of a text in pieces of `length` ids; a last piece of one token is dropped.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    ids = chat.encode_text(text.text)[:most]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    if len(ids) < 2:
        raise DataError("the text has only one token", text.name, "use a longer text")
    return [piece for piece in pieces if len(piece) > 1]


@torch.inference_mode()
def nll_of(chat: ChatModel, piece: Sequence[int]) -> float:
    """Negative log-likelihood of all tokens but the first, summed, in nats."""
    ids = torch.tensor([piece], device=chat.model.device)
    logits = chat.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


def measure(
    chat: ChatModel, texts: Sequence[tuple[NamedText, list[list[int]]]], progress: Callable[[float], None]
) -> list[dict[str, Any]]:
    """Rows of perplexity.json: "tokens" counts the predicted tokens, "sha256" identifies the whole text."""
    rows: list[dict[str, Any]] = []
    for text, pieces in texts:
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
    parser = measurement.make_parser("perplexity", __doc__, example="--model runs/quickstart/hf --out results")
    add = parser.add_argument
    add(
        "--text", type=Path, nargs="+", metavar="FILE", help="files in UTF-8; default: texts of Python and its packages"
    )
    add("--length", type=at_least(2), default=1024, metavar="N", help="tokens per piece")
    add("--most", type=at_least(2), default=4096, metavar="N", help="tokens read of each text")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    texts = [read_text(path) for path in args.text] if args.text else installed_texts()
    chat = measurement.load_model(args)
    measurement.check_positions(chat, args.length, "--length")
    pieces = [(text, pieces_of(chat, text, args.length, args.most)) for text in texts]
    total = sum(len(piece) for _, part in pieces for piece in part)
    with track("read", total, "tokens", make_console()) as advance:
        rows = measure(chat, pieces, advance)
    measurement.write_result(chat, args, argv, "perplexity", {"texts": rows}, length=args.length)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
