"""Identity of a model folder, by which a result file tells which model it was measured with."""

import hashlib
from pathlib import Path

import torch

from sdlm_megatron.files import sha256
from sdlm_megatron.weights.checkpoint_folder import ASSETS
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.tensors import EMBEDDING, HEAD

FIRST_VALUES = 2048  # of a tensor


def model_sha256(folder: Path) -> str:
    """SHA-256 of what decides the answers of a model folder, in a second for any size.

    Covers config.json, generation_config.json and the tokenizer's files, and of each tensor name, dtype, shape and the
    first values: training changes some of them in every model, and 65 GB would take minutes to read. Of the embeddings
    also the row of the mask token, in which alone two bases may differ. SHA256SUMS is not used: published folders have
    none, and files may be replaced without it.
    """
    weights, digest = HFWeights(folder), hashlib.sha256()
    mask = read_hf_config(folder).decoding.mask_token_id
    for path in (folder / name for name in ASSETS):
        if path.is_file():
            digest.update(f"{path.name} {sha256(path)}\n".encode())
    for name in weights.names():
        shape = weights.shape(name)
        size = tuple(min(length, FIRST_VALUES if axis == len(shape) - 1 else 1) for axis, length in enumerate(shape))
        first = weights.read(name, (0,) * len(shape), size)
        digest.update(f"{name} {weights.dtype(name)} {shape}\n".encode())
        digest.update(first.flatten().view(torch.uint8).numpy().tobytes())
        if name in (EMBEDDING, HEAD) and 0 <= mask < shape[0]:
            digest.update(weights.read(name, (mask, 0), (1, *shape[1:])).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
