"""Loads weights and optimizer from a checkpoint of any TP / PP / DP, and says whether its files are what was written.

How a checkpoint is written is in checkpoint/async_writer.py; its other files, and when it counts as complete, are in
weights/checkpoint_folder.py.
"""

from pathlib import Path

import torch

from sdlm_megatron.checkpoint.sharding import Box, Held, Piece, held, start_state
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.parallel.engine import Engine
from sdlm_megatron.parallel.groups import Groups
from sdlm_megatron.weights.checkpoint_folder import check_files
from sdlm_megatron.weights.torch_dist import TorchDist


def load(folder: Path, engine: Engine, *, step: int | None) -> None:
    """Fills the model from a complete checkpoint made under any layout; the optimizer too where `step` is given.

    Args:
        step: updates that the checkpoint's optimizer has made; None: the weights alone.

    Raises CheckpointError where a tensor is missing, damaged or of another shape.
    """
    files = TorchDist(folder / "weights")
    optimizer = engine.optimizer if step is not None else None
    with torch.no_grad():
        for part in held(engine, with_optimizer=optimizer is not None):
            for piece, box in part.boxes(part.low, part.low + part.flat.numel()):
                _fill(part, piece, box, files)
    if optimizer is not None:
        start_state(optimizer, step)
    else:
        engine.weights_changed()


def _fill(part: Held, piece: Piece, box: Box, files: TorchDist) -> None:
    key = part.prefix + piece.key
    if key not in files:
        raise CheckpointError(f"it has no '{key}'", str(files.weights), "use another checkpoint; this is another model")
    found, wanted = files.shape(key), piece.shape
    if found != wanted and not (piece.padded and found[1:] == wanted[1:]):
        raise CheckpointError(
            f"'{key}' is {found}, the model's {wanted}", str(files.weights), "use a checkpoint of this model"
        )
    target, rows = part.elements(box).view(box.size), box.size[0]
    if piece.padded:
        rows = max(0, min(rows, found[0] - box.start[0]))
        target[rows:] = 0
    if rows:
        target[:rows] = files.read(key, box.start, (rows, *box.size[1:]))


def damage(folder: Path, groups: Groups) -> str:
    """What is wrong with the files of a checkpoint, "" if nothing is; all processes call it and share the reading."""
    mine = ""
    try:
        check_files(folder, share=(groups.rank, groups.world_size))
    except CheckpointError as error:
        mine = error.what
    return next((text for text in groups.gather(mine) if text), "")
