"""The plan of a run, decided before the first step: model shape, source of the weights, rows and number of steps.

This module does not import Megatron-Core, so that errors are reported before its slow import.
"""

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdlm_megatron.config.explain import typed
from sdlm_megatron.config.schema import DiffusionConfig, ModelConfig, RunConfig, TrainConfig
from sdlm_megatron.config.validate import check_model, check_schedule, resolve_shape, row_unit
from sdlm_megatron.data.cut import StepGrid, choose_grid
from sdlm_megatron.data.format import PackedDataset
from sdlm_megatron.data.sample import sample_steps
from sdlm_megatron.data.tokenizer_identity import TEXT_MASK, same_tokenizer
from sdlm_megatron.errors import CheckpointError, ConfigError, DataError
from sdlm_megatron.weights.adapter_tensors import saved_adapters
from sdlm_megatron.weights.checkpoint_folder import TrainState, newest, read_run, read_state, step_of
from sdlm_megatron.weights.hf_config import read_hf_config
from sdlm_megatron.weights.hf_weights import HFWeights
from sdlm_megatron.weights.positions import check_dataset
from sdlm_megatron.weights.shape import NewMaskToken, find_mask_token
from sdlm_megatron.weights.tensors import HFAsCheckpoint

Notice = Callable[[str], None]

KEPT, TAKEN, REFUSED = "kept", "taken", "refused"
_CLASSES = {
    KEPT: "model checkpoint.base checkpoint.adapter",
    TAKEN: "run_dir data parallel checkpoint observe fault train.steps train.epochs train.stop_after train.attention "
    "train.layers train.micro_batches train.recompute train.recompute_layers train.logits_mb",
    REFUSED: "diffusion lora optimizer schedule train.seed train.global_batch train.global_batch_unit train.precision "
    "train.gradient_dtype train.fp8 train.loss_normalization train.next_token_balance",
}
RESUME = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
"""Classes of settings on a resume; a section stands for those of its settings that are not listed themselves.

kept: the run's value stays; taken: the new value applies from the next step on; refused: an error."""
_SAME = ("row_length", "block_size", "target_shift", "mask_token_id", "eos_token_id")
"""Fields of the manifest in which validation data must agree with the training data."""


@dataclass(frozen=True)
class RunPlan:
    """Decisions about a run, the same on every process."""

    config: RunConfig
    """The settings that apply: on a resume, with those that the run keeps."""
    state: TrainState
    """State before the first step."""
    source: Path | None
    """Folder of the weights; None: random weights."""
    kind: str
    """"resume", "checkpoint" (a converted base), "huggingface" or "random"."""
    assets: Path | None
    """Folder with the base's configuration and tokenizer files, which are copied into each checkpoint."""
    new_mask: NewMaskToken | None
    """Initialization of the mask token's row; None if the base has it."""
    total_rows: int
    steps: int
    """Length of the learning rate schedule."""

    def last_step(self, config: RunConfig) -> int:
        """The step at which the run ends."""
        return min(self.steps, config.train.stop_after or self.steps)

    def to_continue(self, config: RunConfig) -> str:
        """The change of settings with which a run that has ended trains on."""
        if self.last_step(config) < self.steps:
            return "raise train.stop_after, or set it to 0,"
        return f"raise train.{'steps' if config.train.steps else 'epochs'}"


def make_run_plan(config: RunConfig, dataset: PackedDataset, notice: Notice) -> RunPlan:
    """Plans a run from its folder, the base and the dataset: a checkpoint of the run comes before the base.

    Args:
        notice: receives messages for the user.

    Raises:
        UserError: run folder, base, dataset and configuration do not match.
    """
    config = resolve_diffusion(config, dataset)
    resume = newest(Path(config.run_dir) / "ckpt", notice)
    if resume is not None:
        plan = _resume(config, dataset, resume, notice)
    elif config.checkpoint.base:
        plan = _from_base(config, dataset, Path(config.checkpoint.base), notice)
    else:
        if config.lora.rank or config.checkpoint.adapter:
            what = "adapters are trained beside the weights of a base, and there is none"
            raise ConfigError(what, "lora.rank", "set checkpoint.base, or lora.rank=0 and no checkpoint.adapter")
        notice("no base model: training starts from random weights")
        shape = resolve_shape(config.model, None, "model")
        plan = _plan(config, dataset, shape, dataset.manifest["mask_token_id"], None, "random")
    check_schedule(config, plan.steps)
    _check_end(plan)
    _check_step(plan, dataset.row_length)
    check_model(plan.state.shape, config, dataset.row_length)
    if plan.assets:
        check_dataset(dataset, plan.assets)
    # the mask token usually has the highest id of a dataset: it is appended to the vocabulary
    needed = max(dataset.manifest["mask_token_id"] + 1, 1)
    if needed > plan.state.shape.vocab_size:
        raise ConfigError(
            f"the dataset uses token id {needed - 1}, the model has {plan.state.shape.vocab_size} rows",
            "model.vocab_size",
            f"a dataset of this model's tokenizer; without a base, --model.vocab_size={-(-needed // 128) * 128}",
        )
    return plan


def _check_step(plan: RunPlan, row_length: int) -> None:
    """ConfigError for steps with more targets than Megatron-Core's int32 counter holds; a row's tokens bound them."""
    tokens = plan.state.rows_per_step * row_length
    if tokens >= 2**31:
        rows = plan.state.rows_per_step
        what = f"a step has {rows:,} rows of {row_length:,} tokens = {tokens:,} tokens, the limit is 2^31"
        raise ConfigError(what, "train.global_batch", f"at most {(2**31 - 1) // row_length:,} rows")


def _check_end(plan: RunPlan) -> None:
    """ConfigError for a step or rows of the configuration that the run does not have."""
    stop, rows = plan.config.train.stop_after, [n for n in plan.config.data.skip_rows if n >= plan.total_rows]
    if stop > plan.steps:
        fix = "a step of the run, or 0 to train to its end"
        raise ConfigError(f"stop_after is {stop}, but the run ends with step {plan.steps}", "train.stop_after", fix)
    if rows:
        what = f"skip_rows has row {rows[0]}, but the run has rows 0 to {plan.total_rows - 1}"
        raise ConfigError(what, "data.skip_rows", "row numbers as in spikes.jsonl")


def resolve_diffusion(config: RunConfig, dataset: PackedDataset) -> RunConfig:
    """The configuration with block size, target shift and mask token of the dataset.

    Raises:
        DataError: the configuration states another value.
    """
    unset, manifest = DiffusionConfig(), dataset.manifest
    # datasets of older versions do not record the mask token's text
    token = manifest.get("mask_token") or config.diffusion.mask_token or TEXT_MASK
    values = {"block_size": manifest["block_size"], "target_shift": manifest["target_shift"], "mask_token": token}
    for key, value in values.items():
        stated = getattr(config.diffusion, key)
        if stated != getattr(unset, key) and stated != value:
            raise DataError(
                f"diffusion.{key} is {stated}, the dataset was built with {value}",
                str(dataset.path / "manifest.json"),
                f"--diffusion.{key}={typed(getattr(unset, key))} takes the dataset's; or build one with "
                f"sdlm prepare … --{key}={typed(stated)}",
            )
    return replace(config, diffusion=replace(config.diffusion, **values))


def open_validation(config: RunConfig, dataset: PackedDataset) -> PackedDataset | None:
    """The held-out rows, or None if validation is off.

    Raises:
        DataError: their settings or tokenizer differ from those of the training data.
    """
    if not config.data.validation or not config.observe.validate_every:
        return None
    held_out = PackedDataset(config.data.validation)
    where = f"data.validation: {held_out.path / 'manifest.json'}"
    for key in _SAME:
        if held_out.manifest[key] != dataset.manifest[key]:
            raise DataError(
                f"{key} is {held_out.manifest[key]}, in the training data it is {dataset.manifest[key]}",
                where,
                "build it with the tokenizer and the settings of the training data",
            )
    fingerprints = {d.manifest["tokenizer"].get("fingerprint") for d in (held_out, dataset)} - {None}
    if len(fingerprints) > 1:
        raise DataError(
            "the validation data was built with another tokenizer than the training data",
            where,
            "build it with the tokenizer of the training data",
        )
    return held_out


def _rows_per_step(config: RunConfig, dataset: PackedDataset) -> int:
    size = config.train.global_batch
    if config.train.global_batch_unit == "rows":
        return size
    # the reference counts documents; rows hold several, so the step size is met on average
    return max(1, round(size / dataset.manifest["mean_documents_per_row"]))


def _length(train: TrainConfig, dataset: PackedDataset, state: TrainState) -> tuple[int, int]:
    """Rows and steps of the whole run, from the steps and rows done so far."""
    # A step at the end of the data may have had fewer rows: the rows that are left decide, not the steps done.
    step, done, rows = state.step, state.consumed_rows, state.rows_per_step
    if train.steps:
        return done + max(0, train.steps - step) * rows, train.steps
    whole = int(train.full_epochs)
    part = train.full_epochs - whole
    total = sum(dataset.rows(e) for e in range(whole)) + round(part * dataset.rows(whole))
    return total, step + math.ceil((total - done) / rows)


def _identity(dataset: PackedDataset) -> dict[str, Any]:
    """Values that change if the dataset's rows or their order change; compared when a run resumes."""
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
) -> RunPlan:
    state = TrainState(
        step=0,
        consumed_rows=0,
        rows_per_step=_rows_per_step(config, dataset),
        shape=shape,
        diffusion=config.diffusion,
        mask_token_id=mask_token_id,
        precision=config.train.precision,
        eos_token_id=dataset.manifest["eos_token_id"],
        with_optimizer=True,
        dataset=_identity(dataset),
        lora=config.lora,
    )
    return RunPlan(config, state, source, kind, assets, new_mask, *_length(config.train, dataset, state))


def _from_base(config: RunConfig, dataset: PackedDataset, base: Path, notice: Notice) -> RunPlan:
    """Starts from a Hugging Face folder, or from one converted by hf_to_mcore."""
    if (base / "complete.json").exists():
        state = read_state(base)
        if state.lora.rank:
            raise CheckpointError("the base holds adapters beside its weights", str(base), _new_run(base, state))
        mask_id = state.mask_token_id
        if mask_id < 0:
            raise CheckpointError(
                "the converted base has no mask token",
                str(base),
                "convert it again: sdlm import … --mask-token '<text_mask>'",
            )
        shape = resolve_shape(config.model, state.shape, str(base), mask_id)
        assets, kind, new_mask = base / "hf", "checkpoint", None
    else:
        hf = read_hf_config(base)
        mask_id, new_mask = find_mask_token(hf, base, config.diffusion.mask_token, dataset.manifest["mask_token_id"])
        shape = resolve_shape(config.model, hf.shape, str(base), mask_id)
        if new_mask:
            shape = replace(shape, vocab_size=max(shape.vocab_size, new_mask.row + 1))
            notice(f"mask token {config.diffusion.mask_token} = id {mask_id}: its row starts as the mean of all others")
        assets, kind = base, "huggingface"
    _check_tokenizer(dataset, assets, mask_id, notice)
    if saved_adapters(config, shape, mask_id):
        notice(f"adapters start from {config.checkpoint.adapter}")
    plan = _plan(config, dataset, shape, mask_id, base, kind, assets=assets, new_mask=new_mask)
    few = plan.steps < 100 and config.optimizer.lr < 1e-4  # the quickstart has 54 steps at 5e-4
    if few and kind == "huggingface" and not hf.is_sdlm:
        notice(
            f"{plan.steps} steps at a learning rate of {config.optimizer.lr:g} hardly turn a base into an SDLM: see "
            "'Few conversations, or a CPU' in docs/training.md"
        )
    return plan


def check_weights(plan: RunPlan) -> None:
    """Checks that the weights of a Hugging Face base can be used; CheckpointError names the wrong file or tensor."""
    # A dry run ends before the weights are loaded. The files of a checkpoint are checked when its state is read.
    if plan.kind == "huggingface" and plan.source is not None:
        HFAsCheckpoint(HFWeights(plan.source), read_hf_config(plan.source).shape, where=plan.source)


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
        notice("no tokenizer to compare: assuming that the dataset was built with the model's")
    elif not same:
        raise DataError(
            f"the dataset was built with another tokenizer ({manifest['tokenizer'].get('name')}) than the model's",
            f"{dataset.path / 'manifest.json'} and {assets}",
            "build the dataset with the tokenizer of this base",
        )


def _resume(config: RunConfig, dataset: PackedDataset, folder: Path, notice: Notice) -> RunPlan:
    """Continues from a checkpoint of this run, under the same or another parallel layout."""
    state, run = read_state(folder), read_run(folder)
    if state.step != step_of(folder):
        what = f"{folder.name} holds step {state.step}: a copy of another checkpoint"
        raise CheckpointError(what, str(folder), "give the copy a name of your own, or remove it")
    shape = resolve_shape(config.model, state.shape, str(folder), state.mask_token_id)
    if state.dataset != _identity(dataset):
        raise DataError(
            "the run was started with another dataset: rows would be skipped or repeated",
            str(dataset.path),
            f"use the run's first dataset, or start a new run from this checkpoint: {_new_run(folder, state)}",
        )
    if not state.with_optimizer:
        raise CheckpointError(
            "the checkpoint holds no optimizer state: a run cannot resume from it",
            str(folder),
            f"start a new run from it: {_new_run(folder, state)}",
        )
    before: dict[str, dict[str, Any]] = run.get("settings", {})
    before = before | {"diffusion": asdict(state.diffusion), "lora": asdict(state.lora)}
    before["train"] = before.get("train", {}) | {"precision": state.precision}
    _refuse_changes(config, before, folder, _new_run(folder, state))
    if (rows := _rows_per_step(config, dataset)) != state.rows_per_step:  # of a run that did not record its settings
        raise CheckpointError(
            f"a step would have {rows} rows, the run has trained with {state.rows_per_step}",
            str(folder),
            f"--train.global_batch={state.rows_per_step} --train.global_batch_unit=rows",
        )
    # without notices: they were printed when the run started
    _check_tokenizer(dataset, folder / "hf", state.mask_token_id, lambda text: None)
    total, steps = _resumed_length(config, before["train"], dataset, state, notice)
    if run.get("base") and not (folder / "hf" / "config.json").exists():  # lost by earlier versions after a resume
        notice(
            f"{folder / 'hf'} lacks the config and tokenizer of {run['base']}, and so will exports: stop the run; then "
            "copy the base's config.json, generation_config.json and tokenizer files into the hf folder of the newest "
            f"checkpoint in {folder.parent}, and start again"
        )
    for key, without in (("base", "random weights"), ("adapter", "no saved adapters")):
        stated = getattr(config.checkpoint, key)
        if key in run and run[key] != Path(stated).name:
            if stated:
                started = run[key] or without
                notice(f"checkpoint.{key} {stated} is not read: the run started from {started} and resumes")
            config = replace(config, checkpoint=replace(config.checkpoint, **{key: run[key]}))
    return RunPlan(config, replace(state, shape=shape), folder, "resume", folder / "hf", None, total, steps)


def resume_class(name: str) -> str:
    """KEPT, TAKEN or REFUSED for a setting such as "train.seed"; KeyError where RESUME has no class for it."""
    return RESUME[name] if name in RESUME else RESUME[name.partition(".")[0]]


def _new_run(folder: Path, state: TrainState) -> str:
    """Settings of a new run from a checkpoint: one with adapters is no base, but its export is."""
    if not state.lora.rank:
        return f"--run_dir=… --checkpoint.base={folder}"
    return (
        f"sdlm export --ckpt {folder} --out DIR, then --run_dir=… --checkpoint.base=DIR; to train its adapters on, "
        "export with --adapter, then --checkpoint.adapter=DIR and the base of the run"
    )


def _refuse_changes(config: RunConfig, before: Mapping[str, Mapping[str, Any]], folder: Path, new_run: str) -> None:
    """Raises CheckpointError for settings that would change the result of the run in the middle.

    Args:
        before: settings of the run so far, by section. What an older version did not record is not compared.
        new_run: from `_new_run`.
    """
    changed = {}
    for section, values in before.items():
        now = vars(getattr(config, section))
        for key in values.keys() & now.keys():
            if values[key] != now[key] and resume_class(f"{section}.{key}") == REFUSED:
                changed[f"{section}.{key}"] = (now[key], values[key])
    if changed:
        differences = [f"{key} is {new}, the run has trained with {old}" for key, (new, old) in sorted(changed.items())]
        options = shlex.join(f"--{key}={typed(old)}" for key, (_, old) in sorted(changed.items()))
        raise CheckpointError(
            "; ".join(differences),
            str(folder),
            f"{options}, or start a new run from this checkpoint: {new_run}",
        )


def _resumed_length(
    config: RunConfig, before: Mapping[str, Any], dataset: PackedDataset, state: TrainState, notice: Notice
) -> tuple[int, int]:
    """Rows and steps of the whole run, which a resume may extend; ConfigError where it has trained more already."""
    total, steps = _length(config.train, dataset, state)
    if total < state.consumed_rows or steps < state.step:
        raise ConfigError(
            f"the run has trained {state.step} steps and {state.consumed_rows} rows, the configuration asks for "
            f"{steps if config.train.steps else total} {'steps' if config.train.steps else 'rows'}",
            "train.steps" if config.train.steps else "train.epochs",
            "the run's own value or more; to repeat steps, remove the checkpoints after the wanted one",
        )
    earlier = {key: before[key] for key in ("steps", "epochs") if key in before}
    if (old := _length(replace(config.train, **earlier), dataset, state)[1]) != steps:
        decay = "" if config.schedule.style == "constant" else f"; the {config.schedule.style} schedule ends there"
        notice(f"the run now ends with step {steps} instead of {old}{decay}")
    return total, steps


def make_grid(config: RunConfig, dataset: PackedDataset, rows_per_step: int, ranks: int) -> StepGrid:
    """The grid of a run on `ranks` data-parallel ranks: the same on every process, and after a resume."""
    return choose_grid(
        sample_steps(dataset, rows_per_step, seed=config.train.seed),
        rows_per_step,
        dataset.row_length,
        ranks=ranks,
        multiple=config.parallel.group,
        unit=row_unit(dataset.row_length, config.parallel, config.train),
        micro_batches=config.train.micro_batches,
        whole_rows=config.train.loss_normalization == "rows",
    )


def parse_profile_steps(text: str) -> tuple[int, int]:
    """ "10:12" to (10, 12), "10" to (10, 10); ConfigError for anything else."""
    first, colon, last = text.partition(":")
    last = last if colon else first
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ConfigError(
            f"--profile {text} is not a range of steps",
            "the command line",
            "--profile 10:12 for steps 10 to 12, or --profile 10",
        )
    return int(first), int(last)


def steps_to_profile(steps: tuple[int, int], start: int, stop: int) -> tuple[int, int] | None:
    """`steps` for a run that trains steps start + 1 to stop; None if it resumes after them.

    A job that is started again with the same command therefore continues. Raises ConfigError for steps after `stop`.
    """
    if steps[1] > stop:
        raise ConfigError(
            f"--profile {steps[0]}:{steps[1]}, but this run ends with step {stop}",
            "the command line",
            f"--profile with some of steps {start + 1} to {stop}",
        )
    return steps if steps[0] > start else None
