"""Parts shared by all measuring commands: options, loading the model, and writing a result file."""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from sdlm_megatron.chat.chat_model import ChatModel, load, quiet_transformers
from sdlm_megatron.config import command_line
from sdlm_megatron.config.secret_text import masked_command
from sdlm_megatron.errors import CheckpointError, ConfigError
from sdlm_megatron.evaluation.held_out import prompts_sha256, read_prompts
from sdlm_megatron.evaluation.identity import model_sha256
from sdlm_megatron.files import make_folder, sha256, write_json
from sdlm_megatron.weights.dtypes import PRECISIONS
from sdlm_megatron.weights.positions import trained_positions

EXAMPLE = "--model runs/quickstart/hf --prompts runs/quickstart/task/heldout.jsonl --out results"
OUT_FOLDER = "folder of the result files"


def make_parser(
    kind: str, description: str | None, *, example: str = EXAMPLE, out: str = OUT_FOLDER, notes: str = ""
) -> command_line.CommandParser:
    """Parser of `sdlm evaluate KIND` with --model, --out, --dtype, --device and --threads."""
    command = f"sdlm evaluate {kind}".rstrip()
    parser = command_line.make_parser(command, description, example=f"{command} {example}", notes=notes)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="exported SDLM folder, or a plain base model")
    add("--out", type=Path, required=True, metavar="PATH", help=out)
    add("--dtype", choices=sorted(PRECISIONS), help="dtype of the weights; default: the folder's own")
    add("--device", help="torch device; default: a GPU if there is one, else cpu")
    add("--threads", type=command_line.at_least(1), metavar="N", help="CPU threads; default: torch's choice")
    return parser


def add_prompts(parser: argparse.ArgumentParser, most: int | None = None, *, batch: int | None = None) -> None:
    """Adds --prompts and --most (None: all prompts by default), and --batch with this default."""
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="JSONL", help='lines of {"prompt": …, "expected": …}')
    first = f"measure only the first N prompts{'; default: all' if most is None else ''}"
    add("--most", type=command_line.at_least(1), default=most, metavar="N", help=first)
    if batch is not None:
        add("--batch", type=command_line.at_least(1), default=batch, metavar="B", help="prompts per batch")


def load_folder(args: argparse.Namespace, folder: Path) -> ChatModel:
    """Loads a folder with --dtype, --device and --threads."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    quiet_transformers()
    return load(folder, dtype=args.dtype, device=args.device)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that decide a result of any kind: the model's content, --dtype, the measured prompts and their file.

    --shots and --contexts, which `sdlm evaluate` has too, are among them.
    """
    settings = {"model_sha256": model_sha256(args.model), "dtype": args.dtype}
    if "prompts" in args:
        if "shots" in args:  # examples come from the rest of the file
            settings["most"] = args.most
        read = read_prompts(args.prompts, 0 if "shots" in args else args.most or 0)
        settings |= {"prompts_sha256": prompts_sha256(read), "prompt_file_sha256": sha256(args.prompts)}
    return settings | {name: value for name, value in vars(args).items() if name in ("shots", "contexts")}


def load_model(args: argparse.Namespace) -> ChatModel:
    """Loads --model, creates the --out folder and prints a line about the model. UserError if that fails."""
    chat = load_folder(args, args.model)
    args.settings = settings_of(args)  # now: the folder may be replaced while the model is measured
    make_folder(args.out)
    print(chat.describe(), flush=True)
    return chat


def trained_block_size(chat: ChatModel, fix: str) -> int:
    """The block size of an SDLM; CheckpointError with this fix for a plain model."""
    if not chat.config.is_sdlm:
        raise CheckpointError("the model is not an SDLM: its config.json has no block_size", str(chat.folder), fix)
    return chat.config.decoding.block_size


def check_positions(chat: ChatModel, needed: int, option: str) -> None:
    """ConfigError when `option` asks for more tokens than the model has positions."""
    most = trained_positions(chat.config)
    if needed > most:
        raise ConfigError(f"{needed} tokens are needed, the model has {most} positions", option, "use smaller values")


def facts_of(chat: ChatModel, prog: str, argv: Sequence[str] | None, **more: Any) -> dict[str, Any]:
    """Command, model, machine and versions behind a result file, ready for JSON.

    Args:
        prog: the command without its arguments.
        argv: its arguments; None: those of this process.
        more: facts of one kind, such as n_prompts=512.
    """
    device = chat.model.device
    return {
        "command": f"{prog} {masked_command(sys.argv[1:] if argv is None else argv)}".rstrip(),
        **more,
        "block_size": chat.config.decoding.block_size,
        "causal_attn": chat.config.decoding.causal_attn,
        "parameters": sum(p.numel() for p in chat.model.parameters()),
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_result(
    chat: ChatModel, args: argparse.Namespace, argv: Sequence[str] | None, kind: str, content: Any, **facts: Any
) -> None:
    """Writes OUT/KIND.json: kind, model, settings (as `load_model` found them), facts and `content`."""
    if "prompts" in args:
        facts = {"prompts": str(args.prompts), **facts}
    header = {"kind": kind, "model": str(args.model), "settings": args.settings}
    header |= {"facts": facts_of(chat, f"sdlm evaluate {kind}", argv, **facts)}
    path = args.out / f"{kind}.json"
    write_json(path, header | content)
    print(f"wrote {path}")
