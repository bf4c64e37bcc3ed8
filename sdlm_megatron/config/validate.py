"""Checks of a configuration before anything is built. No check changes a setting."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from sdlm_megatron.config.schema import (
    PROJECTIONS,
    CheckpointConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from sdlm_megatron.errors import ConfigError

CHOICES = {
    "model.rope_type": ("llama3", "yarn"),
    "train.global_batch_unit": ("documents", "rows"),
    "train.precision": ("bf16", "fp32"),
    "train.attention": ("auto", "per_document", "triton", "decomposed", "flex", "dense"),
    "train.gradient_dtype": ("fp32", "bf16"),
    "train.layers": ("auto", "megatron", "transformer_engine"),
    "train.fp8": ("none", "delayed", "current"),
    "train.recompute": ("none", "selective", "full"),
    "train.loss_normalization": ("targets", "rows"),
    "schedule.style": ("constant", "linear", "cosine", "wsd"),
    "observe.wandb": ("disabled", "offline", "online"),
}
SPLIT_ATTENTION = ("auto", "decomposed")
"""Values of train.attention that work on a part of a row, for context parallelism."""
_START = "start with torchrun or sdlm submit"
FP8_MULTIPLE = 16
"""Divisor of all dimensions of an FP8 matrix product."""
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
"""Fields of a model that must be above 0."""
STEPS, ROWS = "[0, 1e9]", "[0, 1e12]"
RANGES = {
    "model.num_layers": "[0, 10000]",
    "model.hidden_size": "[0, 1e6]",
    "model.ffn_hidden_size": "[0, 1e7]",
    "model.num_attention_heads": "[0, 10000]",
    "model.num_query_groups": "[0, 10000]",
    "model.head_dim": "[0, 10000]",
    "model.vocab_size": "[0, 1e7]",
    "model.rope_theta": "(0, 1e12]",
    "model.rms_norm_eps": "(0, 1)",
    "model.nope_interval": "[0, 10000]",
    "model.rope_factor": "[1, 1e6]",
    "model.rope_low_freq": "(0, 1e6]",
    "model.rope_high_freq": "(0, 1e6]",
    "model.rope_original_positions": "[1, 1e9]",
    "model.rope_attention_factor": "[0, 100]",
    "diffusion.block_size": "[0, 4096]",
    "diffusion.next_token_weight": "[0, 1000]",
    "data.skip_rows": ROWS,
    "parallel.tensor": "[1, 10000]",
    "parallel.pipeline": "[1, 10000]",
    "parallel.virtual_pipeline": "[1, 10000]",
    "parallel.context": "[1, 10000]",
    "lora.rank": "[0, 10000]",
    "lora.alpha": "(0, 1e6]",
    "optimizer.lr": "(0, 10]",
    "optimizer.beta1": "[0, 1)",
    "optimizer.beta2": "[0, 1)",
    "optimizer.eps": "(0, 1]",
    "optimizer.weight_decay": "[0, 100]",
    "optimizer.clip_grad": "[0, 1e9]",
    "schedule.warmup_steps": STEPS,
    "schedule.decay_steps": STEPS,
    "schedule.min_lr": "[0, 10]",
    "train.seed": "[0, 4294967295]",
    "train.steps": STEPS,
    "train.epochs": "[0, 10000]",
    "train.global_batch": "[1, 1e7]",
    "train.micro_batches": "[0, 1e6]",
    "train.stop_after": STEPS,
    "train.recompute_layers": "[0, 10000]",
    "train.logits_mb": "(0, 1e6]",
    "checkpoint.save_every": STEPS,
    "checkpoint.keep_last": STEPS,
    "checkpoint.keep_every": STEPS,
    "observe.log_every": "[1, 1e9]",
    "observe.sample_every": STEPS,
    "observe.validate_every": STEPS,
    "observe.validation_rows": ROWS,
    "fault.heartbeat_seconds": "(0, 86400]",
    "fault.hang_factor": "(0, 1e6]",
    "fault.hang_min_seconds": "(0, 1e7]",
    "fault.start_seconds": "(0, 1e7]",
    "fault.straggler_factor": "[0, 1e6]",
    "fault.spike_factor": "[0, 1e6]",
    "fault.replica_check_every": STEPS,
}
"""Values that each number of a run may have: [ and ] include the bound, ( and ) exclude it."""


def _require(condition: object, what: str, where: str, fix: str) -> None:
    if not condition:
        raise ConfigError(what, where, fix)


def process_number(name: str, default: int | None = None) -> int:
    """A whole number from 0 that torchrun, srun or sdlm submit gave this process in an environment variable."""
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    number = text.isascii() and text.isdigit() and len(text) < 10
    _require(number, f"{name} is '{text}', not a whole number", "the environment", f"{_START}, or unset {name}")
    return int(text)


def process_place() -> tuple[int, int]:
    """Rank of this process and number of processes, from RANK and WORLD_SIZE; (0, 1) for a process on its own."""
    rank, world = process_number("RANK", 0), process_number("WORLD_SIZE", 1)
    _require(rank < world, f"RANK is {rank} and WORLD_SIZE {world}: ranks count from 0", "the environment", _START)
    return rank, world


def check_range(value: float, allowed: str, key: str, where: str = "") -> None:
    """Raises ConfigError unless `value` is in the interval `allowed`, such as "(0, 1]"."""
    low, high = map(float, allowed[1:-1].split(","))
    # Comparisons with NaN are false, so it is refused.
    inside = (value > low or (value == low and allowed[0] == "[")) and (
        value < high or (value == high and allowed[-1] == "]")
    )
    first = "above" if allowed[0] == "(" else "from" if allowed[-1] == "]" else "of at least"
    last = "and below" if allowed[-1] == ")" else "and at most" if allowed[0] == "(" else "to"
    _require(inside, f"{key} is {value}", where or key, f"set it to a number {first} {low:.12g} {last} {high:.12g}")


def check_ranges(config: Any, ranges: Mapping[str, str], head: str = "", where: str = "") -> None:
    """Checks every number of a configuration, those of its sections and lists included. Raises ConfigError.

    Args:
        ranges: interval of each number by its dotted name, without the names of list entries.
        head: dotted name of `config` with a dot at the end, for messages.
        where: file or argument; "": the setting.
    """
    for name, value in vars(config).items():
        key = f"{head}{name}"
        if is_dataclass(value):
            check_ranges(value, ranges, f"{key}.", where)
        for i, item in enumerate(value if isinstance(value, list) else [value]):
            place = f"{key}[{i}]" if isinstance(value, list) else key
            if isinstance(value, list) and is_dataclass(item):
                check_ranges(item, ranges, f"{place}.", where)
            elif isinstance(item, int | float) and not isinstance(item, bool):
                plain = re.sub(r"\[\d+\]", "", key)
                assert plain in ranges, f"{plain} has no interval: add it to RANGES beside the checks of its schema"
                check_range(item, ranges[plain], place, where)


def check_values(config: RunConfig) -> None:
    """Checks every setting by itself. Raises ConfigError with the setting and a fix."""
    check_ranges(config, RANGES)
    for key, choices in CHOICES.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        _require(value in choices, f"{key} is {value!r}", key, f"one of {', '.join(choices)}")


def check_run(config: RunConfig, world_size: int) -> None:
    """Checks what can be known without model and dataset. Raises ConfigError with the setting and a fix."""
    check_values(config)
    check_length(config.train)
    _require(config.run_dir.strip(), "no run folder", "run_dir", "--run_dir=DIR, a folder to write the run to")
    _require(config.data.path, "no dataset", "data.path", "--data.path=DIR, a folder written by `sdlm prepare`")
    check_schedule(config, config.train.steps or None)
    _check_parallel(config.parallel, world_size)
    _check_context(config.train, config.parallel)
    _check_recompute(config.train)
    _check_checkpoint(config.checkpoint)
    _check_samples(config)
    _check_layers(config.train, config.parallel)
    _check_micro_batches(config.train, config.parallel)
    _check_precision(config.train, config.parallel)
    check_lora(config.lora, "lora.targets")
    _require(
        config.lora.rank or config.lora == LoraConfig(),
        "lora.alpha or lora.targets is set, but lora.rank is 0: all weights would be trained",
        "lora.rank",
        "set lora.rank, e.g. to 16, or leave them out",
    )
    _require(
        config.diffusion.next_token_weight or not config.train.next_token_balance,
        "next_token_balance scales diffusion.next_token_weight, which is 0",
        "train.next_token_balance",
        "set diffusion.next_token_weight, e.g. to 1, or leave next_token_balance out",
    )


def check_length(train: TrainConfig) -> None:
    """Checks that the length of a run is set once. Raises ConfigError."""
    steps, epochs = train.steps, train.full_epochs
    _require(steps or epochs, "train.steps and train.epochs are both 0", "train", "set one of them")
    _require(
        not (steps and train.epochs),
        f"train.steps is {steps} and train.epochs {epochs:g}: two lengths of one run",
        "train.steps and train.epochs",
        f"--train.epochs=null for {steps} steps, or --train.steps=0 for {epochs:g} epochs",
    )


def check_schedule(config: RunConfig, steps: int | None) -> None:
    """Checks the learning rates of a run of `steps` steps (None: not known yet). Raises ConfigError."""
    schedule, lr = config.schedule, config.optimizer.lr
    style, warmup, decay = schedule.style, schedule.warmup_steps, schedule.decay_steps
    _require(
        schedule.min_lr <= lr,
        f"min_lr {schedule.min_lr:g} is above the peak learning rate {lr:g}",
        "schedule.min_lr",
        "set at most optimizer.lr",
    )
    _require(
        style != "constant" or not schedule.min_lr,
        f"min_lr is {schedule.min_lr:g}, but a constant rate does not decay to it",
        "schedule.min_lr",
        "set schedule.style to linear, cosine or wsd, or min_lr=0",
    )
    _require(
        (style == "wsd") == (decay > 0),
        f"decay_steps is {decay}, but schedule.style is {style}: only wsd reads it, and needs it",
        "schedule.decay_steps",
        "set a number of steps above 0" if style == "wsd" else "set decay_steps=0 or schedule.style=wsd",
    )
    if steps is not None:
        what = f"{config.train.full_epochs:g} epochs of the dataset are not one row"
        _require(steps > 0, what, "train.epochs", "set more epochs, or train.steps")
        _require(
            warmup + decay <= steps and warmup < steps,
            f"{warmup} warm-up steps and {decay} decay steps do not fit into the {steps} steps of the run",
            "schedule.warmup_steps and schedule.decay_steps",
            "set smaller numbers of steps, or a longer run (train.steps, train.epochs)",
        )


def _check_parallel(parallel: ParallelConfig, world_size: int) -> None:
    _require(
        parallel.tensor > 1 or not parallel.sequence,
        "sequence parallelism needs tensor parallelism",
        "parallel.sequence",
        "set parallel.tensor > 1 or sequence=false",
    )
    # Megatron-Core gathers the weights in the buckets of the distributed optimizer's overlapped reduction.
    for key in ("distributed_optimizer", "overlap_grad_reduce"):
        _require(
            getattr(parallel, key) or not parallel.overlap_param_gather,
            f"overlap_param_gather needs {key}",
            "parallel.overlap_param_gather",
            f"set parallel.{key}=true or overlap_param_gather=false",
        )
    _require(
        parallel.pipeline > 1 or parallel.virtual_pipeline == 1,
        "virtual_pipeline divides the bubble of a pipeline, but there is only one stage",
        "parallel.virtual_pipeline",
        "set parallel.pipeline > 1 or virtual_pipeline=1",
    )
    _require(
        parallel.sequence or not parallel.overlap_tensor,
        "overlapping the communication of tensor parallelism needs sequence parallelism",
        "parallel.overlap_tensor",
        "set parallel.tensor > 1 and parallel.sequence=true, or overlap_tensor=false",
    )
    _require(
        world_size % parallel.model_size == 0,
        f"{world_size} processes are not a multiple of tensor {parallel.tensor} x pipeline {parallel.pipeline} x "
        f"context {parallel.context}",
        "parallel",
        f"start a multiple of {parallel.model_size} processes, or change parallel.tensor / parallel.pipeline / "
        "parallel.context",
    )


def _check_context(train: TrainConfig, parallel: ParallelConfig) -> None:
    _require(
        parallel.context == 1 or train.attention in SPLIT_ATTENTION,
        f"train.attention={train.attention} needs whole rows, but context parallelism {parallel.context} splits them",
        "train.attention",
        f"set train.attention to one of {', '.join(SPLIT_ATTENTION)}, or parallel.context=1",
    )


def _check_micro_batches(train: TrainConfig, parallel: ParallelConfig) -> None:
    _require(
        train.micro_batches % parallel.group == 0,
        f"micro_batches is {train.micro_batches}, but the interleaved schedule processes them in groups of pipeline",
        "train.micro_batches",
        f"set a multiple of {parallel.group}, or 0",
    )
    _require(
        not train.micro_batches or train.loss_normalization == "targets",
        "a loss by rows needs the dataset's rows, whose number decides the micro-batches",
        "train.micro_batches",
        "set train.loss_normalization=targets or micro_batches=0",
    )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    _require(
        not checkpoint.save_every or checkpoint.keep_every % checkpoint.save_every == 0,
        f"keep_every {checkpoint.keep_every} is not a multiple of save_every {checkpoint.save_every}",
        "checkpoint.keep_every",
        "set a multiple of checkpoint.save_every, or 0",
    )


def _check_recompute(train: TrainConfig) -> None:
    _require(
        train.recompute == "full" or not train.recompute_layers,
        f"recompute_layers needs recompute full, but recompute is {train.recompute!r}",
        "train.recompute_layers",
        "set train.recompute=full or recompute_layers=0",
    )
    _require(
        train.recompute != "selective" or train.fp8 != "delayed",
        "delayed FP8 scaling records each tensor once per step, so the norms' outputs cannot be recomputed",
        "train.recompute",
        "use train.recompute=full or none, or train.fp8=current",
    )


def _check_layers(train: TrainConfig, parallel: ParallelConfig) -> None:
    what = "train.fp8 and parallel.overlap_tensor need TransformerEngine's layers"
    needed = train.fp8 != "none" or parallel.overlap_tensor
    _require(train.layers != "megatron" or not needed, what, "train.layers", "set train.layers=auto")


def _check_precision(train: TrainConfig, parallel: ParallelConfig) -> None:
    # TransformerEngine's user buffers sum numbers of 2 bytes, whatever dtype they are allocated for
    for what, key, used, off in (
        ("FP8 needs", "train.fp8", train.fp8 != "none", "none"),
        ("bf16 gradients need", "train.gradient_dtype", train.gradient_dtype != "fp32", "fp32"),
        ("overlap_tensor needs", "parallel.overlap_tensor", parallel.overlap_tensor, "false"),
        ("the Triton kernels need", "train.attention", train.attention == "triton", "auto"),
    ):
        fix = f"set train.precision=bf16 or {key}={off}"
        _require(train.precision == "bf16" or not used, f"{what} bf16 weights", key, fix)


def check_lora(lora: LoraConfig, where: str) -> None:
    """Checks the names of the layers that get an adapter. Raises ConfigError."""
    wrong = [name for name in lora.targets if name not in PROJECTIONS]
    fix = f"some of {', '.join(PROJECTIONS)}"
    _require(not wrong, f"there is no linear layer {', '.join(map(repr, wrong))}", where, fix)
    _require(lora.targets, "no linear layer gets an adapter", where, fix)
    _require(len({*lora.targets}) == len(lora.targets), "lora.targets names a layer twice", where, fix)


def _check_samples(config: RunConfig) -> None:
    validates = config.data.validation and config.observe.validate_every
    for enabled, key in ((config.observe.sample_every, "sample_every"), (validates, "validate_every")):
        _require(
            config.train.fp8 != "delayed" or not enabled,
            "delayed FP8 scaling also records the tensors of samples and validation, which would change training",
            f"observe.{key}",
            f"set observe.{key}=0 or train.fp8=current",
        )


def resolve_shape(
    configured: ModelConfig, base: ModelConfig | None, where: str, mask_token_id: int = -1
) -> ModelConfig:
    """The shape to build: the base's if there is one; ConfigError where the config contradicts it.

    A base may have the rows up to the mask token's more than the configuration.
    """
    if base is None:
        heads = max(1, configured.num_attention_heads)
        return replace(configured, head_dim=configured.head_dim or configured.hidden_size // heads)
    if configured.hidden_size and not configured.num_layers:
        return base  # model.num_layers=0 takes the model section of a preset back
    if 0 < configured.vocab_size <= mask_token_id == base.vocab_size - 1:
        configured = replace(configured, vocab_size=base.vocab_size)
    for key, value in vars(configured).items():
        actual, stated = getattr(base, key), value != getattr(ModelConfig, key)
        if (stated or (configured.num_layers and key != "head_dim")) and value != actual:
            fix = f"--model.{key}={actual}, or leave the model section out to read it from the base"
            raise ConfigError(f"model.{key} is {value}, the base has {actual}", where, fix)
    return base


def check_model(model: ModelConfig, config: RunConfig, row_length: int) -> None:
    """Checks that the model can be split over the configured degrees. Raises ConfigError."""
    tp, chunks = config.parallel.tensor, config.parallel.pipeline * config.parallel.virtual_pipeline
    for key in SIZES:
        what, fix = f"model.{key} is {getattr(model, key)}", "set it, or set checkpoint.base to read it from there"
        _require(getattr(model, key) > 0, what, f"model.{key}", fix)
    heads, kv_heads = model.num_attention_heads, model.num_query_groups
    _require(
        heads % kv_heads == 0,
        f"{heads} heads are not a multiple of {kv_heads} KV heads",
        "model.num_query_groups",
        "set a divisor of model.num_attention_heads",
    )
    _require(
        model.rope_high_freq > model.rope_low_freq,
        f"rope_high_freq is {model.rope_high_freq:g}, rope_low_freq {model.rope_low_freq:g}",
        "model.rope_high_freq",
        "set a number above model.rope_low_freq",
    )
    for key in ("num_attention_heads", "ffn_hidden_size"):
        _check_divisible(f"model.{key}", getattr(model, key), "parallel.tensor", tp)
    # Fewer KV heads than ranks are replicated, which works for multiples only.
    _require(
        kv_heads % tp == 0 or tp % kv_heads == 0,
        f"{kv_heads} KV heads cannot be split or replicated over tensor parallelism {tp}",
        "parallel.tensor",
        f"use a divisor or a multiple of {kv_heads} that divides {heads} heads",
    )
    of_qkv = {"q_proj", "k_proj", "v_proj"} & {*config.lora.targets}
    _require(
        kv_heads % tp == 0 or not config.lora.rank or len(of_qkv) in (0, 3),
        f"with more TP ranks ({tp}) than KV heads ({kv_heads}), adapters of some of q, k and v cannot be split evenly",
        "lora.targets",
        "name all of q_proj, k_proj, v_proj or none, or use a smaller parallel.tensor",
    )
    setting = "parallel.pipeline" + (" x virtual_pipeline" if config.parallel.virtual_pipeline > 1 else "")
    _check_divisible("model.num_layers", model.num_layers, setting, chunks)
    layers, recomputed = model.num_layers // chunks, config.train.recompute_layers
    _require(
        recomputed <= layers,
        f"recompute_layers is {recomputed}, but a model chunk has {layers} layers",
        "train.recompute_layers",
        "set a smaller number, or 0 for all layers",
    )
    split = config.parallel.context > 1  # a rank's part of a row is padded to a multiple of `token_multiple`
    if config.parallel.sequence and not split:
        _check_divisible("the dataset's row_length", row_length, "parallel.tensor", tp)
    if config.train.fp8 != "none":
        tokens = row_length // (tp if config.parallel.sequence else 1)
        _check_fp8(model, tp, FP8_MULTIPLE if split else tokens)


def token_multiple(parallel: ParallelConfig, train: TrainConfig) -> int:
    """Divisor of the number of tokens that the TP ranks of a pipeline stage process together."""
    return (parallel.tensor if parallel.sequence else 1) * (FP8_MULTIPLE if train.fp8 != "none" else 1)


def row_unit(row_length: int, parallel: ParallelConfig, train: TrainConfig) -> int:
    """Number of tokens of which row lengths other than the dataset's are multiples, so that `check_model` accepts them.

    About an 80th of a row, and no more than 64 tokens unless the layout needs it.
    """
    power = 1 << min(6, (row_length // 80).bit_length() - 1) if row_length >= 80 else 1
    return math.lcm(power, token_multiple(parallel, train))


def _check_fp8(model: ModelConfig, tp: int, tokens: int) -> None:
    """Checks the dimensions of the FP8 matrix products on each GPU; `tokens`: of a row, on one rank."""
    # cuBLASLt has FP8 kernels for such sizes only; without this check the first forward pass fails inside a layer.
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    qkv_heads = model.num_attention_heads + 2 * model.num_query_groups
    for name, size, setting in (
        ("the dataset's row_length", tokens, "data.path"),
        ("model.hidden_size", model.hidden_size, "model.hidden_size"),
        ("model.ffn_hidden_size", model.ffn_hidden_size // tp, "model.ffn_hidden_size"),
        ("width of the heads", model.num_attention_heads * head // tp, "model.head_dim"),
        ("width of q, k and v", qkv_heads * head // tp, "model.head_dim"),
    ):
        _require(
            size % FP8_MULTIPLE == 0,
            f"FP8 needs multiples of {FP8_MULTIPLE}: {name} is {size} per GPU",
            setting,
            "set train.fp8=none, another size, or another parallel.tensor",
        )


def _check_divisible(name: str, value: int, setting: str, degree: int) -> None:
    # No machine has more ranks along one axis than this, and the list must stay readable.
    divisors = [d for d in range(1, min(value, 64) + 1) if value % d == 0]
    what = f"{name} = {value} is not divisible by {setting} = {degree}"
    _require(value % degree == 0, what, setting, f"set {setting} to one of {', '.join(map(str, divisors))}")
