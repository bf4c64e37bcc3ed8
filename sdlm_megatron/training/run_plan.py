"""Everything that is decided before the first step: what to build, from which weights, on which rows, for how long."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdlm_megatron.config.schema import DiffusionConfig, ModelConfig, ParallelConfig, RunConfig
from sdlm_megatron.config.validate import check_model
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.order import micro_batches
from sdlm_megatron.data.tokenizer_identity import TEXT_MASK, same_tokenizer
from sdlm_megatron.errors import CheckpointError, ConfigError, DataError
from sdlm_megatron.weights.checkpoint_folder import TrainState, newest, read_state
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.shape import NewMaskToken, find_mask_token, resolve_shape

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a run will do; the same on every process."""

    state: TrainState
    """Where it starts."""
    source: Path | None
    """Folder the weights come from; None: random."""
    kind: str
    """"resume", "checkpoint" (a converted base), "huggingface" or "random"."""
    assets: Path | None
    """Folder with the base's config and tokenizer files, to travel with the checkpoints."""
    new_mask: NewMaskToken | None
    total_rows: int
    steps: int
    """Length of the schedule."""

    def last_step(self, config: RunConfig) -> int:
        """The step at which the run ends."""
        return min(self.steps, config.train.stop_after or self.steps)


def make_plan(config: RunConfig, dataset: PackedDataset, notice: Notice) -> Plan:
    """Looks at run folder, base and dataset; raises a UserError where they do not fit together."""
    config = resolve_diffusion(config, dataset)
    resume = newest(Path(config.run_dir) / "ckpt", notice)
    if resume is not None:
        plan = _resume(config, dataset, resume)
    elif config.checkpoint.base:
        plan = _from_base(config, dataset, Path(config.checkpoint.base), notice)
    else:
        notice("no base model: training starts from random weights")
        shape = resolve_shape(config.model, None, "model")
        plan = _plan(config, dataset, shape, dataset.manifest["mask_token_id"], None, "random")
    check_model(plan.state.shape, config, dataset.row_length)
    needed = max(dataset.manifest["mask_token_id"] + 1, 1)
    if needed > plan.state.shape.vocab_size:
        raise ConfigError(
            f"the dataset uses token id {needed - 1}, the model has {plan.state.shape.vocab_size} rows",
            "model.vocab_size",
            "use the dataset of this model's tokenizer, or a larger model.vocab_size",
        )
    return plan


def resolve_diffusion(config: RunConfig, dataset: PackedDataset) -> RunConfig:
    """The configuration with block size, target shift and mask token as the dataset was built.

    Raises DataError where the configuration states another value.
    """
    unset, manifest = DiffusionConfig(), dataset.manifest
    # Datasets of older versions do not record the mask token's text.
    token = manifest.get("mask_token") or config.diffusion.mask_token or TEXT_MASK
    values = {"block_size": manifest["block_size"], "target_shift": manifest["target_shift"], "mask_token": token}
    for key, value in values.items():
        stated = getattr(config.diffusion, key)
        if stated != getattr(unset, key) and stated != value:
            raise DataError(
                f"diffusion.{key} is {stated}, the dataset was built with {value}",
                str(dataset.path / "manifest.json"),
                f"leave diffusion.{key} unset, or rebuild the dataset: sdlm prepare … --{key}={stated}",
            )
    return replace(config, diffusion=replace(config.diffusion, **values))


def open_validation(config: RunConfig, dataset: PackedDataset) -> PackedDataset | None:
    """The held-out rows, or None where none are wanted; DataError where they are not made like the dataset."""
    if not config.data.validation or not config.observe.validate_every:
        return None
    found = PackedDataset(config.data.validation)
    for key in ("row_length", "block_size", "target_shift", "mask_token_id", "eos_token_id"):
        if found.manifest[key] != dataset.manifest[key]:
            raise DataError(
                f"{key} is {found.manifest[key]}, that of the training data {dataset.manifest[key]}",
                f"data.validation: {found.path / 'manifest.json'}",
                "build it with the tokenizer and the settings of the training data",
            )
    ours, theirs = (d.manifest["tokenizer"].get("fingerprint") for d in (found, dataset))
    if None not in (ours, theirs) and ours != theirs:
        raise DataError(
            "the validation data was made with another tokenizer than the training data",
            f"data.validation: {found.path / 'manifest.json'}",
            "build it with the tokenizer of the training data",
        )
    return found


def _rows_per_step(config: RunConfig, dataset: PackedDataset) -> int:
    size = config.train.global_batch
    if config.train.global_batch_unit == "rows":
        return size
    return max(1, round(size / dataset.manifest["mean_documents_per_row"]))


def _total_rows(config: RunConfig, dataset: PackedDataset, rows_per_step: int) -> int:
    if config.train.steps:
        return config.train.steps * rows_per_step
    whole = int(config.train.epochs)
    part = config.train.epochs - whole
    return sum(dataset.rows(e) for e in range(whole)) + round(part * dataset.rows(whole))


def _identity(dataset: PackedDataset) -> dict[str, Any]:
    """What a resume compares: same rows in the same order."""
    files = dataset.manifest["files"]
    return {"sha256": {n: files[n].get("sha256") for n in sorted(files)}, "row_length": dataset.row_length}


def _plan(
    config: RunConfig,
    dataset: PackedDataset,
    shape: ModelConfig,
    mask_token_id: int,
    source: Path | None,
    kind: str,
    *,
    assets: Path | None = None,
    new_mask: NewMaskToken | None = None,
) -> Plan:
    rows_per_step = _rows_per_step(config, dataset)
    total = _total_rows(config, dataset, rows_per_step)
    state = TrainState(
        step=0,
        consumed_rows=0,
        rows_per_step=rows_per_step,
        shape=shape,
        diffusion=config.diffusion,
        mask_token_id=mask_token_id,
        precision=config.train.precision,
        eos_token_id=dataset.manifest["eos_token_id"],
        with_optimizer=True,
        dataset=_identity(dataset),
    )
    return Plan(state, source, kind, assets, new_mask, total, math.ceil(total / rows_per_step))


def _from_base(config: RunConfig, dataset: PackedDataset, base: Path, notice: Notice) -> Plan:
    """A Hugging Face folder or a converted one."""
    if (base / "complete.json").exists():
        state = read_state(base)
        shape = resolve_shape(config.model, state.shape, str(base))
        mask_id = state.mask_token_id
        if mask_id < 0:
            raise CheckpointError(
                "the converted base has no mask token",
                str(base),
                "convert it again: python -m checkpoints_tools.hf_to_mcore … --mask-token '<text_mask>'",
            )
        assets, kind, new_mask = base / "hf", "checkpoint", None
    else:
        hf = read_hf_config(base)
        shape = resolve_shape(config.model, hf.shape, str(base))
        mask_id, new_mask = find_mask_token(hf, base, config.diffusion.mask_token, dataset.manifest["mask_token_id"])
        if new_mask:
            shape = replace(shape, vocab_size=max(shape.vocab_size, new_mask.row + 1))
            notice(
                f"mask token {config.diffusion.mask_token} = id {mask_id}: its row starts as the mean of the other rows"
            )
        assets, kind = base, "huggingface"
    _check_tokenizer(dataset, assets, mask_id, notice)
    return _plan(config, dataset, shape, mask_id, base, kind, assets=assets, new_mask=new_mask)


def _check_tokenizer(dataset: PackedDataset, assets: Path, mask_id: int, notice: Notice) -> None:
    manifest = dataset.manifest
    if manifest["mask_token_id"] != mask_id:
        raise DataError(
            f"the dataset's mask token has id {manifest['mask_token_id']}, the model's {mask_id}",
            str(dataset.path / "manifest.json"),
            "build the dataset with this model's tokenizer and the same mask_token",
        )
    same = same_tokenizer(assets, manifest)
    if same is None:
        notice("no tokenizer to compare: the dataset is taken to be made with the model's")
    elif not same:
        raise DataError(
            f"the dataset was made with another tokenizer ({manifest['tokenizer'].get('name')}) than the model's",
            f"{dataset.path / 'manifest.json'} and {assets}",
            "build the dataset with the tokenizer of this base",
        )


def _resume(config: RunConfig, dataset: PackedDataset, folder: Path) -> Plan:
    """Goes on from a checkpoint of this run, under whatever layout."""
    state = read_state(folder)
    shape = resolve_shape(config.model, state.shape, str(folder))
    if state.dataset != _identity(dataset):
        raise DataError(
            "this is not the dataset the run was started with: rows would be skipped or repeated",
            str(dataset.path),
            f"use the first one, or start a new run with --run_dir=… and --checkpoint.base={folder}",
        )
    if not state.with_optimizer:
        raise CheckpointError(
            "the checkpoint holds weights only: no run can go on from it",
            str(folder),
            f"start a new run with --run_dir=… and --checkpoint.base={folder}",
        )
    if state.precision != config.train.precision:
        raise CheckpointError(
            f"the checkpoint was trained in {state.precision}, the run wants {config.train.precision}",
            str(folder),
            f"--train.precision={state.precision}",
        )
    if state.diffusion != config.diffusion:
        raise CheckpointError(
            f"the checkpoint was trained with {state.diffusion}, the run says {config.diffusion}",
            str(folder),
            "give the same diffusion section",
        )
    _check_tokenizer(dataset, folder / "hf", state.mask_token_id, lambda text: None)
    total = _total_rows(config, dataset, state.rows_per_step)
    steps = math.ceil(total / state.rows_per_step)
    return Plan(replace(state, shape=shape), folder, "resume", folder / "hf", None, total, steps)


def micro_batch_multiple(parallel: ParallelConfig) -> int:
    """What the micro-batches of a rank must be a multiple of: the interleaved schedule takes them in turns of PP."""
    return parallel.pipeline if parallel.virtual_pipeline > 1 else 1


def _interleaved(parallel: ParallelConfig, shape: ModelConfig) -> str:
    if parallel.virtual_pipeline == 1:
        return ""
    layers = shape.num_layers // (parallel.pipeline * parallel.virtual_pipeline)
    return f" (interleaved, {parallel.virtual_pipeline} chunks of {layers} layers a stage)"


def _settings(config: RunConfig) -> list[str]:
    """Precision and what is recomputed and overlapped, in words."""
    train, parallel = config.train, config.parallel
    words = [train.precision]
    if train.recompute == "selective":
        words.append("selective recompute (norms)")
    elif train.recompute == "full":
        layers = f"first {train.recompute_layers} layers of each chunk" if train.recompute_layers else "all layers"
        words.append(f"full recompute ({layers})")
    overlapped = {
        "gradient reduction": parallel.overlap_grad_reduce,
        "weight gathering": parallel.overlap_param_gather,
        "tensor parallelism": parallel.overlap_tensor,
    }
    if any(overlapped.values()):
        words.append(f"overlapped: {', '.join(k for k, on in overlapped.items() if on)}")
    if not parallel.distributed_optimizer:
        words.append("replicated optimizer")
    return words


def describe(config: RunConfig, plan: Plan, dataset: PackedDataset, dp_size: int) -> str:
    """What is about to happen, for the console."""
    shape, state, parallel = plan.state.shape, plan.state, config.parallel
    multiple = micro_batch_multiple(parallel)
    count = micro_batches(state.rows_per_step, dp_size, multiple)
    idle = count * dp_size - state.rows_per_step
    divisor = f"{dp_size}" + (f" x {multiple}, data-parallel ranks x stages" if multiple > 1 else " ranks")
    source = {"resume": f"resumes {plan.source} at step {state.step}", "random": "random weights"}.get(
        plan.kind, f"starts from {plan.source}"
    )
    lines = [
        f"model    {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_attention_heads} heads / "
        f"{shape.num_query_groups} KV, ffn {shape.ffn_hidden_size}, vocabulary {shape.vocab_size}"
        f"{', tied' if shape.tied_embeddings else ''}; {source}",
        f"data     {dataset.path}: {dataset.rows(0)} rows of {dataset.row_length} tokens, "
        f"{dataset.manifest['mean_documents_per_row']:.2f} documents a row, block size {dataset.block_size}",
        f"layout   TP {parallel.tensor} (sequence parallel {'on' if parallel.sequence else 'off'}) x PP "
        f"{parallel.pipeline}{_interleaved(parallel, shape)} x DP {dp_size}, {', '.join(_settings(config))}",
        f"step     {state.rows_per_step} rows = {count} micro-batches on each data-parallel rank"
        + (f" ({idle} empty in all: rows a step is no multiple of {divisor})" if idle else ""),
        f"length   {plan.steps} steps, {plan.total_rows} rows, learning rate {config.optimizer.lr:g} "
        f"{config.schedule.style}",
    ]
    return "\n".join(lines)
