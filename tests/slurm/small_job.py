"""Job small enough for tests: base model with a tokenizer, conversations, held-out prompts."""

import json
from pathlib import Path

from helpers import make_hf

from dev.quickstart.task import write_task
from tests import byte_tokenizer


def small_job(folder: Path, *, layers: int = 2) -> dict[str, Path]:
    """Variables that slurm/pipeline.sh reads."""
    base = make_hf(folder / "base", layers=layers, text_mask_token_id=260)
    byte_tokenizer.write_folder(base)
    task = write_task(folder / "task", 60, 2, 0)
    sources = [{"name": "task", "format": "messages", "path": str(task.sources["messages"])}]
    sizes = {"row_length": 512, "max_document_length": 512, "system_prompt": None}
    config = folder / "data.yaml"
    config.write_text(json.dumps({"sources": sources, **sizes}))  # JSON is YAML
    return {
        "BASE": base,
        "CONFIG": config,
        "DATA": folder / "data",
        "RUN_DIR": folder / "run",
        "HELDOUT": task.heldout,
    }
