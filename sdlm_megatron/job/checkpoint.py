"""How far a run is, as its checkpoints tell."""

from pathlib import Path

from sdlm_megatron.checkpoint_files import newest


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; -1 without one."""
    folder = newest(run_dir / "ckpt", lambda text: None)
    return int(folder.name.removeprefix("step-")) if folder else -1
