"""Checks of a configuration before anything is built. Nothing here changes a setting."""

from sdlm_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from sdlm_megatron.errors import ConfigError

CHOICES = {
    "train.global_batch_unit": ("documents", "rows"),
    "train.precision": ("bf16", "fp32"),
    "train.attention": ("auto", "per_document", "decomposed", "flex", "dense"),
    "train.layers": ("auto", "megatron", "transformer_engine"),
    "train.fp8": ("none", "delayed", "current"),
    "train.recompute": ("none", "selective", "full"),
    "train.loss_normalization": ("targets", "rows"),
    "schedule.style": ("constant", "linear", "cosine", "wsd"),
    "observe.wandb": ("disabled", "offline", "online"),
}
FP8_MULTIPLE = 16
"""Sides of the matrices of an FP8 product."""
POSITIVE = (
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "train.logits_mb",
    "train.global_batch",
    "optimizer.lr",
    "observe.log_every",
    "fault.heartbeat_seconds",
    "fault.hang_factor",
    "fault.hang_min_seconds",
    "fault.start_seconds",
)
NOT_NEGATIVE = (
    "diffusion.block_size",
    "diffusion.next_token_weight",
    "train.steps",
    "train.stop_after",
    "train.recompute_layers",
    "schedule.warmup_steps",
    "schedule.decay_steps",
    "optimizer.clip_grad",
    "optimizer.weight_decay",
    "checkpoint.save_every",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "observe.sample_every",
    "observe.validate_every",
    "observe.validation_rows",
    "fault.straggler_factor",
    "fault.spike_factor",
    "fault.replica_check_every",
)


def _get(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check_run(config: RunConfig, world_size: int) -> None:
    """Checks all that can be known without the model: raises ConfigError naming the setting and the way out."""
    for key, allowed in CHOICES.items():
        if _get(config, key) not in allowed:
            raise ConfigError(f"{key} is {_get(config, key)!r}", key, f"one of {', '.join(allowed)}")
    for keys, limit, word in ((POSITIVE, 0, "above 0"), (NOT_NEGATIVE, -1e-30, "0 or more")):
        for key in keys:
            value = _get(config, key)
            if not (isinstance(value, (int, float)) and value > limit):
                raise ConfigError(f"{key} is {value}", key, f"give a number {word}")
    if not config.train.steps and config.train.epochs <= 0:
        raise ConfigError("nothing to train: train.steps and train.epochs are 0", "train", "set one of them")
    _check_data(config.data)
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "sequence parallelism needs tensor parallelism",
            "parallel.sequence",
            "set parallel.tensor > 1 or sequence=false",
        )
    _check_overlap(parallel)
    _check_recompute(config.train)
    _check_checkpoint(config.checkpoint)
    _check_samples(config)
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ConfigError(
            "one pipeline stage has no bubble that model chunks could fill",
            "parallel.virtual_pipeline",
            "set parallel.pipeline > 1 or virtual_pipeline=1",
        )
    if parallel.overlap_tensor and not parallel.sequence:
        raise ConfigError(
            "overlapping the communication of tensor parallelism needs sequence parallelism",
            "parallel.overlap_tensor",
            "set parallel.tensor > 1 and parallel.sequence=true, or overlap_tensor=false",
        )
    model_size = parallel.tensor * parallel.pipeline
    if world_size % model_size:
        raise ConfigError(
            f"{world_size} processes do not divide by tensor {parallel.tensor} x pipeline {parallel.pipeline}",
            "parallel",
            f"start a multiple of {model_size} processes, or change parallel.tensor / parallel.pipeline",
        )


def _check_data(data: DataConfig) -> None:
    if not data.path:
        raise ConfigError("no dataset", "data.path", "--data.path=DIR, a folder written by `python -m data_prep.build`")
    if any(row < 0 for row in data.skip_rows):
        raise ConfigError("rows are numbered from 0", "data.skip_rows", "give the numbers that spikes.jsonl names")


def _check_overlap(parallel: ParallelConfig) -> None:
    if not parallel.overlap_param_gather:
        return
    for key in ("distributed_optimizer", "overlap_grad_reduce"):
        if not getattr(parallel, key):
            raise ConfigError(
                f"overlap_param_gather needs {key}",
                "parallel.overlap_param_gather",
                f"set parallel.{key}=true or overlap_param_gather=false",
            )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    if checkpoint.save_every and checkpoint.keep_every % checkpoint.save_every:
        raise ConfigError(
            f"no checkpoint is saved at every {checkpoint.keep_every} steps: save_every is {checkpoint.save_every}",
            "checkpoint.keep_every",
            "give a multiple of checkpoint.save_every, or 0",
        )


def _check_recompute(train: TrainConfig) -> None:
    if train.recompute_layers and train.recompute != "full":
        raise ConfigError(
            f"recompute_layers counts layers that are recomputed in full, recompute is {train.recompute!r}",
            "train.recompute_layers",
            "set train.recompute=full or recompute_layers=0",
        )
    if train.recompute == "selective" and train.fp8 == "delayed":
        raise ConfigError(
            "delayed scaling records each FP8 tensor once a step: the norms' outputs cannot be made a second time",
            "train.recompute",
            "use train.recompute=full or none, or train.fp8=current",
        )


def _check_samples(config: RunConfig) -> None:
    validates = config.data.validation and config.observe.validate_every
    for wanted, key in ((config.observe.sample_every, "sample_every"), (validates, "validate_every")):
        if wanted and config.train.fp8 == "delayed":
            raise ConfigError(
                "delayed scaling records what samples and validation pass through the layers: they would change the "
                "training",
                f"observe.{key}",
                f"set observe.{key}=0 or train.fp8=current",
            )


def check_model(model: ModelConfig, config: RunConfig, row_length: int) -> None:
    """Checks that the shape can be split as asked: raises ConfigError."""
    tp, chunks = config.parallel.tensor, config.parallel.pipeline * config.parallel.virtual_pipeline
    for key in (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "vocab_size",
    ):
        if getattr(model, key) < 1:
            raise ConfigError(
                f"model.{key} is {getattr(model, key)}",
                f"model.{key}",
                "set it, or name a base (checkpoint.base) to read it from",
            )
    if model.num_attention_heads % model.num_query_groups:
        raise ConfigError(
            f"{model.num_attention_heads} heads cannot share {model.num_query_groups} KV heads",
            "model.num_query_groups",
            "give a divisor of model.num_attention_heads",
        )
    for key in ("num_attention_heads", "ffn_hidden_size"):
        if getattr(model, key) % tp:
            raise _indivisible(f"model.{key}", getattr(model, key), "parallel.tensor", tp)
    if model.num_query_groups % tp and tp % model.num_query_groups:
        raise ConfigError(
            f"{model.num_query_groups} KV heads cannot be spread over tensor parallelism {tp}",
            "parallel.tensor",
            f"use a divisor or a multiple of {model.num_query_groups} that divides {model.num_attention_heads} heads",
        )
    if model.num_layers % chunks:
        setting = "parallel.pipeline" + (" x virtual_pipeline" if config.parallel.virtual_pipeline > 1 else "")
        raise _indivisible("model.num_layers", model.num_layers, setting, chunks)
    if config.train.recompute_layers > model.num_layers // chunks:
        raise ConfigError(
            f"{config.train.recompute_layers} layers to recompute, a model chunk has {model.num_layers // chunks}",
            "train.recompute_layers",
            "give fewer, or 0 for all",
        )
    if config.parallel.sequence and row_length % tp:
        raise _indivisible("the dataset's row_length", row_length, "parallel.tensor", tp)
    if config.train.fp8 != "none":
        _check_fp8(model, config, row_length)


def _check_fp8(model: ModelConfig, config: RunConfig, row_length: int) -> None:
    """Every matrix that is multiplied in FP8 has sides of whole multiples of 16 on each GPU."""
    tp = config.parallel.tensor
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    for what, size, setting in (
        ("the dataset's row_length", row_length // (tp if config.parallel.sequence else 1), "data.path"),
        ("model.hidden_size", model.hidden_size, "model.hidden_size"),
        ("model.ffn_hidden_size", model.ffn_hidden_size // tp, "model.ffn_hidden_size"),
        ("width of the heads", model.num_attention_heads * head // tp, "model.head_dim"),
        (
            "width of q, k and v",
            (model.num_attention_heads + 2 * model.num_query_groups) * head // tp,
            "model.head_dim",
        ),
    ):
        if size % FP8_MULTIPLE:
            raise ConfigError(
                f"FP8 needs multiples of {FP8_MULTIPLE}: {what} is {size} on a GPU",
                setting,
                "--train.fp8=none, another size, or another parallel.tensor",
            )


def _indivisible(what: str, value: int, setting: str, degree: int) -> ConfigError:
    fits = [d for d in range(1, min(value, 64) + 1) if value % d == 0]
    return ConfigError(
        f"{what} = {value} does not divide by {setting} = {degree}",
        setting,
        f"{setting} may be {', '.join(map(str, fits))}",
    )
