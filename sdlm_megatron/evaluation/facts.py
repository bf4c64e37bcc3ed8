"""Where a figure comes from: what each result file says about its command, the model and the machine."""

import datetime
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from sdlm_megatron.chat.chat_model import ChatModel


def facts_of(chat: ChatModel, prog: str, argv: Sequence[str] | None, **more: Any) -> dict[str, Any]:
    """The "facts" of a result file, ready for JSON.

    Args:
        prog: the command without its arguments.
        argv: arguments of that command; None: those of this process.
        more: facts of one command, e.g. prompts="held_out.jsonl", n_prompts=512.
    """
    arguments = sys.argv[1:] if argv is None else argv
    device = chat.model.device
    return {
        "command": f"{prog} {shlex.join(arguments)}".rstrip(),
        **more,
        "block_size": chat.config.block_size or 1,
        "causal_attn": chat.config.causal_attn,
        "parameters": sum(p.numel() for p in chat.model.parameters()),
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
