"""Adapters (LoRA) as tensors: their initial values beside a base, their names in peft, and the weights with them added.

A checkpoint of a run with adapters holds the base's weights as they were and, under names of their own
(`names.adapter_names`), the factors A and B of each adapter and the mask token's row.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdlm_megatron.config.schema import PROJECTIONS, LoraConfig, ModelConfig, RunConfig
from sdlm_megatron.diffusion.settings import SDLMSettings, SettingError
from sdlm_megatron.errors import CheckpointError
from sdlm_megatron.files import checked, read_json_object, regular_file
from sdlm_megatron.weights.checkpoint_folder import TrainState, read_state
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.names import (
    MASK_ROW,
    VOCABULARY,
    Rows,
    adapter_columns,
    adapter_names,
    adapter_rows,
    checkpoint_key,
    inverse_rows,
)
from sdlm_megatron.weights.tensors import EMBEDDING, CheckpointAsHF, HFAsCheckpoint, Index, TensorReader
from sdlm_megatron.weights.torch_dist import TorchDist

PREFIX = "base_model.model."
"""Before the names of a Hugging Face model in peft's files."""
TRAINED_FILE = "sdlm.json"
"""File of an adapter folder that peft does not read: `Trained.to_json`."""
_FORM: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (None, True, False, "gaussian"),  # others change the base's weights
    **dict.fromkeys(("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"), (None, False, {})),
    **dict.fromkeys(("layers_to_transform", "layer_replication", "modules_to_save"), (None, [])),
}
"""Fields of adapter_config.json, and the values that adapters of this project's form can have there."""


def adapter_shapes(shape: ModelConfig, lora: LoraConfig) -> dict[str, Index]:
    """Shapes of the adapters' tensors in a checkpoint, where layers are stacked, by key."""
    shapes: dict[str, Index] = {}
    for name in adapter_names(shape, lora):
        key, layer = checkpoint_key(name)
        if key not in shapes:
            rows = sum(stop - start for _, start, stop in adapter_rows(name, shape, lora))
            size = (rows, adapter_columns(name, shape, lora))
            shapes[key] = size if layer is None else (shape.num_layers, *size)
    return shapes


class InitialAdapters:
    """A base under a checkpoint's keys (a `tensors.TensorReader`), with adapters before their first update.

    A is uniform in ±1 / sqrt(inputs of the layer), as in peft, and a function of (seed, layer, name) whatever the
    parallel layout; B is 0, and the mask token's row is the base's.

    Args:
        base: tensors of the base.
        shape: of the model.
        lora: which layers have adapters.
        mask_token_id: row of the embedding.
        seed: of the run.
        saved: adapters that take the place of these values.
    """

    def __init__(
        self,
        base: TensorReader,
        shape: ModelConfig,
        lora: LoraConfig,
        *,
        mask_token_id: int,
        seed: int,
        saved: "SavedAdapters | None" = None,
    ) -> None:
        self._base, self._mask, self._seed, self._saved = base, mask_token_id, seed, saved
        self._shapes = adapter_shapes(shape, lora)

    def names(self) -> list[str]:
        return [*self._base.names(), *self._shapes]

    def shape(self, name: str) -> Index:
        return self._shapes[name] if name in self._shapes else self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(VOCABULARY[0] if name in self._shapes else name)

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        if name not in self._shapes:
            return self._base.read(name, start, size)
        if self._saved is not None:
            return self._saved.read(name, start, size)
        if name.endswith(MASK_ROW):
            return self._base.read(VOCABULARY[0], (self._mask + start[0], start[1]), size)
        if name.endswith(".B"):
            return torch.zeros(size)
        layers, rows, columns = (slice(a, a + n) for a, n in zip(start, size, strict=True))
        return torch.stack([self._random(name, i)[rows, columns] for i in range(layers.start, layers.stop)])

    def _random(self, name: str, layer: int) -> torch.Tensor:
        """A of one layer, whole."""
        _, rows, columns = self._shapes[name]
        kinds = list(self._shapes)
        # different numbers for every tensor of every layer, and for neighboring seeds
        number = (self._seed * len(kinds) + kinds.index(name)) * 10_000 + layer
        values = torch.rand(rows, columns, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        return ((values * 2 - 1) / math.sqrt(columns)).float()

    def identity(self) -> dict[str, Any]:
        return self._base.identity()


class SavedAdapters(HFAsCheckpoint):
    """The adapters of a folder in peft's format under a checkpoint's keys; see HFAsCheckpoint.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors, as `sdlm export --adapter` writes it.
        shape: of the model.
        lora: of the run.
        mask_token_id: row of the embedding.
        base: name of the run's base.

    Raises CheckpointError where the folder's adapters are not those that the run trains.
    """

    def __init__(self, folder: Path, shape: ModelConfig, lora: LoraConfig, *, mask_token_id: int, base: str) -> None:
        _check_peft_config(folder, lora, mask_token_id, base)
        self._folder, self._where = HFWeights(folder, "adapter_model.safetensors"), folder
        self._shape, self._lora, self._keys = shape, lora, adapter_shapes(shape, lora)
        stored = {name: self._folder.shape(name) for name in self._folder.names()}
        expected: dict[str, Index] = {}
        for name in adapter_names(shape, lora):
            width = adapter_columns(name, shape, lora)
            expected |= {PREFIX + hf: (stop, width) for hf, _, stop in adapter_rows(name, shape, lora)}
        for name in sorted(stored.keys() | expected):
            if stored.get(name) != expected.get(name):
                what = f"'{name:.200}' is {stored.get(name)} in the adapters, {expected.get(name)} in this model"
                raise CheckpointError(what, str(folder), "use adapters of this base, or leave checkpoint.adapter out")

    def _rows(self, key: str, layer: int) -> list[Rows]:
        name = key.replace("layers.", f"layers.{layer}.", 1)
        return [(PREFIX + hf, start, stop) for hf, start, stop in adapter_rows(name, self._shape, self._lora)]


def _check_peft_config(folder: Path, lora: LoraConfig, mask_token_id: int, base: str) -> None:
    """CheckpointError unless adapter_config.json has the form that `peft_config` writes, with the run's values."""
    path = regular_file(folder, "adapter_config.json", CheckpointError)
    values = read_json_object(path, CheckpointError, "export the adapters again")
    merge = "merge them into the base with peft, and start from that folder"
    for field, usual in _FORM.items():
        if values.get(field) not in usual:
            what = f"{field} is {values.get(field)!r:.60}: adapters of another form than this project trains"
            raise CheckpointError(what, str(path), merge)
    rank = checked(values, "r", int, path, CheckpointError)
    alpha = checked(values, "lora_alpha", float, path, CheckpointError)
    targets, name = _targets(values), Path(str(values.get("base_model_name_or_path") or base)).name
    known = isinstance(targets, list) and targets and {*targets} <= {*PROJECTIONS}
    same = "start from that base; of a copy with another name, write its name to base_model_name_or_path"
    for key, ours, theirs, fix in (
        ("lora.rank", lora.rank, rank, f"--lora.rank={rank}"),
        ("lora.alpha", lora.alpha, alpha, f"--lora.alpha={alpha}"),
        ("lora.targets", sorted(lora.targets), targets, f"--lora.targets=[{','.join(targets)}]" if known else merge),
        ("checkpoint.base", base, name, same),
        (
            "the trained row of the embedding",
            {"embed_tokens": [mask_token_id]},
            values.get("trainable_token_indices"),
            "use adapters that were trained with this mask token",
        ),
    ):
        if ours != theirs:
            raise CheckpointError(f"{key} is {ours}, the adapters were trained with {theirs!s:.200}", str(path), fix)


def _targets(values: Mapping[str, Any]) -> Any:
    """target_modules in the form of sorted(lora.targets), or the value itself where it names no list of layers."""
    targets = values.get("target_modules")
    if targets == "all-linear":
        targets = [*PROJECTIONS]
    return sorted({*map(str, targets)}) if isinstance(targets, list) else targets


def saved_adapters(config: RunConfig, shape: ModelConfig, mask_token_id: int) -> SavedAdapters | None:
    """The adapters that a run starts from; None where checkpoint.adapter is empty. CheckpointError as of the class."""
    start = config.checkpoint
    if not start.adapter:
        return None
    name = Path(start.base).name
    return SavedAdapters(Path(start.adapter), shape, config.lora, mask_token_id=mask_token_id, base=name)


class AdaptersAsHF(CheckpointAsHF):
    """The adapters of a checkpoint under peft's names without PREFIX, such as
    "model.layers.0.self_attn.q_proj.lora_A.weight"; see CheckpointAsHF."""

    def __init__(self, checkpoint: TensorReader, shape: ModelConfig, lora: LoraConfig, where: Path) -> None:
        present = set(checkpoint.names())
        for key, expected in adapter_shapes(shape, lora).items():
            if key not in present or checkpoint.shape(key) != expected:
                stored = checkpoint.shape(key) if key in present else "missing"
                what = f"'{key}' is {stored}, the state.json says {expected}"
                raise CheckpointError(what, str(where), "use another checkpoint")
        self._checkpoint = checkpoint
        self._segments = inverse_rows({name: adapter_rows(name, shape, lora) for name in adapter_names(shape, lora)})

    def whole(self, name: str) -> torch.Tensor:
        return self.read(name, (0, 0), self.shape(name))


class MergedAdapters:
    """The weights of a checkpoint with the adapters added, under Hugging Face names (a `tensors.TensorReader`).

    Sums are computed in fp32 and rounded once.

    Args:
        weights: of the base.
        adapters: of the same checkpoint.
        factor: alpha / rank.
        mask_token_id: row of the embedding that was trained.
        dtype: of the sums; None: that of the weights.
    """

    def __init__(
        self,
        weights: TensorReader,
        adapters: AdaptersAsHF,
        *,
        factor: float,
        mask_token_id: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._weights, self._adapters, self._factor, self._mask = weights, adapters, factor, mask_token_id
        self._dtype = dtype
        self._adapted = {
            name.removesuffix("lora_B.weight") + "weight" for name in adapters.names() if name.endswith("lora_B.weight")
        }

    def names(self) -> list[str]:
        return self._weights.names()

    def shape(self, name: str) -> Index:
        return self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return (self._dtype if name in self._adapted else None) or self._weights.dtype(name)

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        region = self._weights.read(name, start, size)
        if name in self._adapted:
            head = name.removesuffix("weight")
            a = self._adapters.whole(f"{head}lora_A.weight")[:, start[1] : start[1] + size[1]].float()
            b = self._adapters.read(f"{head}lora_B.weight", (start[0], 0), (size[0], len(a))).float()
            return (region.float() + self._factor * (b @ a)).to(self.dtype(name))
        if name == EMBEDDING and start[0] <= self._mask < start[0] + size[0]:
            region = region.clone()
            (row,) = (n for n in self._adapters.names() if n.startswith(EMBEDDING.removesuffix("weight")))
            region[self._mask - start[0]] = self._adapters.whole(row)[0, start[1] : start[1] + size[1]]
        return region

    def identity(self) -> dict[str, Any]:
        return self._weights.identity()


class AdapterFile:
    """The adapters of a checkpoint under the names of peft's adapter_model.safetensors (a `tensors.TensorReader`)."""

    def __init__(self, adapters: AdaptersAsHF) -> None:
        self._adapters = adapters

    def names(self) -> list[str]:
        return sorted(PREFIX + name for name in self._adapters.names())

    def shape(self, name: str) -> Index:
        return self._adapters.shape(name.removeprefix(PREFIX))

    def dtype(self, name: str) -> torch.dtype:
        return self._adapters.dtype(name.removeprefix(PREFIX))

    def read(self, name: str, start: Index, size: Index) -> torch.Tensor:
        return self._adapters.read(name.removeprefix(PREFIX), start, size)

    def identity(self) -> dict[str, Any]:
        return self._adapters.identity()


def adapters_of(ckpt: Path, state: TrainState) -> AdaptersAsHF:
    """The adapters of a checkpoint; CheckpointError where it has none."""
    if not state.lora.rank:
        raise CheckpointError("the checkpoint has no adapters", str(ckpt), "leave --adapter out to export its weights")
    return AdaptersAsHF(TorchDist(ckpt / "weights"), state.shape, state.lora, ckpt)


def checkpoint_weights(
    ckpt: Path, state: TrainState | None = None, *, dtype: torch.dtype | None = None
) -> TensorReader:
    """The model of a checkpoint folder under Hugging Face names, with adapters added to the weights.

    Args:
        dtype: of weights with adapters; None: as stored.
    """
    state = state or read_state(ckpt)
    weights = CheckpointAsHF(TorchDist(ckpt / "weights"), state.shape, ckpt)
    if not state.lora.rank:
        return weights
    options: dict[str, Any] = {"factor": state.lora.alpha / state.lora.rank, "mask_token_id": state.mask_token_id}
    return MergedAdapters(weights, adapters_of(ckpt, state), **options, dtype=dtype)


def peft_config(lora: LoraConfig, mask_token_id: int, base: str) -> Mapping[str, Any]:
    """Content of peft's adapter_config.json; fields that are not listed have peft's defaults.

    Args:
        base: name of the base model.
    """
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": lora.targets,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": {"embed_tokens": [mask_token_id]},
    }


class Trained(NamedTuple):
    """Training of the adapters in a folder, as far as decoding depends on it."""

    sdlm: SDLMSettings
    eos_token_id: int
    """As in TrainState."""
    data: dict[str, Any]
    """Of run.json: system_prompt of the dataset, where it is known."""

    def to_json(self) -> dict[str, Any]:
        """Content of TRAINED_FILE."""
        return {**self.sdlm.to_config_json(), "eos_token_id": self.eos_token_id, **self.data}


def read_trained(folder: Path) -> Trained:
    """TRAINED_FILE of a folder with adapters; CheckpointError where it is missing or wrong."""
    path, fix = folder / TRAINED_FILE, "export the adapters again: sdlm export --adapter --ckpt RUN --out FOLDER"
    if not os.path.lexists(path):
        what = f"the folder has no {TRAINED_FILE}, which holds the settings that the adapters were trained with"
        raise CheckpointError(what, str(folder), fix)
    values = read_json_object(regular_file(folder, TRAINED_FILE, CheckpointError), CheckpointError, fix)
    try:
        sdlm = SDLMSettings.from_config_json(values)
    except SettingError as error:
        raise CheckpointError(error.what, f"{path}, field {error.field}", fix) from None
    if sdlm is None or not sdlm.mask_token:
        raise CheckpointError("block_size or text_mask_token is missing", str(path), fix)
    eos = checked(values, "eos_token_id", int, path, CheckpointError, -1)
    if values.get("system_prompt") is not None:
        checked(values, "system_prompt", str, path, CheckpointError)
    data = {key: values[key] for key in ("system_prompt",) if key in values}
    return Trained(sdlm, eos, data)
