"""Files that appear whole: write beside, fsync, rename."""

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step; a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_tree(folder: Path) -> None:
    """Flushes every file below `folder` and the folders themselves to the disk."""
    for root, _, files in os.walk(folder):
        for name in [*(os.path.join(root, f) for f in files), root]:
            handle = os.open(name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
