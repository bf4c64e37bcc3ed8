"""Checks of a configuration before anything is built. No check changes a setting."""

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
"""Divisor of all dimensions of an FP8 matrix product."""
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
    """Checks what can be known without model and dataset. Raises ConfigError with the setting and a fix."""
    for key, allowed in CHOICES.items():
        if _get(config, key) not in allowed:
            raise ConfigError(f"{key} is {_get(config, key)!r}", key, f"one of {', '.join(allowed)}")
    for key in (*POSITIVE, *NOT_NEGATIVE):
        value = _get(config, key)
        assert isinstance(value, (int, float))
        # Written so that NaN, which compares false with everything, is refused.
        if not (value > 0 or (value == 0 and key in NOT_NEGATIVE)):
            raise ConfigError(f"{key} is {value}", key, f"set it {'above 0' if key in POSITIVE else 'to 0 or more'}")
    if not config.train.steps and config.train.epochs <= 0:
        raise ConfigError("train.steps and train.epochs are both 0", "train", "set one of them")
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
            "virtual_pipeline divides the bubble of a pipeline, but there is only one stage",
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
            f"{world_size} processes are not a multiple of tensor {parallel.tensor} x pipeline {parallel.pipeline}",
            "parallel",
            f"start a multiple of {model_size} processes, or change parallel.tensor / parallel.pipeline",
        )


def _check_data(data: DataConfig) -> None:
    if not data.path:
        raise ConfigError("no dataset", "data.path", "--data.path=DIR, a folder written by `sdlm prepare`")
    if any(row < 0 for row in data.skip_rows):
        raise ConfigError("a row number is negative", "data.skip_rows", "use the row numbers in spikes.jsonl")


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
            f"keep_every {checkpoint.keep_every} is not a multiple of save_every {checkpoint.save_every}",
            "checkpoint.keep_every",
            "set a multiple of checkpoint.save_every, or 0",
        )


def _check_recompute(train: TrainConfig) -> None:
    if train.recompute_layers and train.recompute != "full":
        raise ConfigError(
            f"recompute_layers needs recompute full, but recompute is {train.recompute!r}",
            "train.recompute_layers",
            "set train.recompute=full or recompute_layers=0",
        )
    if train.recompute == "selective" and train.fp8 == "delayed":
        raise ConfigError(
            "delayed FP8 scaling records each tensor once per step, so the norms' outputs cannot be recomputed",
            "train.recompute",
            "use train.recompute=full or none, or train.fp8=current",
        )


def _check_samples(config: RunConfig) -> None:
    validates = config.data.validation and config.observe.validate_every
    for enabled, key in ((config.observe.sample_every, "sample_every"), (validates, "validate_every")):
        if enabled and config.train.fp8 == "delayed":
            raise ConfigError(
                "delayed FP8 scaling also records the tensors of samples and validation, which would change training",
                f"observe.{key}",
                f"set observe.{key}=0 or train.fp8=current",
            )


def check_model(model: ModelConfig, config: RunConfig, row_length: int) -> None:
    """Checks that the model can be split over the configured degrees. Raises ConfigError."""
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
                "set it, or set checkpoint.base to read it from there",
            )
    if model.num_attention_heads % model.num_query_groups:
        raise ConfigError(
            f"{model.num_attention_heads} heads are not a multiple of {model.num_query_groups} KV heads",
            "model.num_query_groups",
            "set a divisor of model.num_attention_heads",
        )
    for key in ("num_attention_heads", "ffn_hidden_size"):
        if getattr(model, key) % tp:
            raise _indivisible(f"model.{key}", getattr(model, key), "parallel.tensor", tp)
    if model.num_query_groups % tp and tp % model.num_query_groups:
        raise ConfigError(
            f"{model.num_query_groups} KV heads cannot be split or replicated over tensor parallelism {tp}",
            "parallel.tensor",
            f"use a divisor or a multiple of {model.num_query_groups} that divides {model.num_attention_heads} heads",
        )
    if model.num_layers % chunks:
        setting = "parallel.pipeline" + (" x virtual_pipeline" if config.parallel.virtual_pipeline > 1 else "")
        raise _indivisible("model.num_layers", model.num_layers, setting, chunks)
    layers = model.num_layers // chunks
    if config.train.recompute_layers > layers:
        raise ConfigError(
            f"recompute_layers is {config.train.recompute_layers}, but a model chunk has {layers} layers",
            "train.recompute_layers",
            "set a smaller number, or 0 for all layers",
        )
    if config.parallel.sequence and row_length % tp:
        raise _indivisible("the dataset's row_length", row_length, "parallel.tensor", tp)
    if config.train.fp8 != "none":
        _check_fp8(model, config, row_length)


def _check_fp8(model: ModelConfig, config: RunConfig, row_length: int) -> None:
    """Checks that each dimension of the FP8 matrix products is a multiple of FP8_MULTIPLE on each GPU."""
    tp = config.parallel.tensor
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    for name, size, setting in (
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
                f"FP8 needs multiples of {FP8_MULTIPLE}: {name} is {size} per GPU",
                setting,
                "set train.fp8=none, another size, or another parallel.tensor",
            )


def _indivisible(name: str, value: int, setting: str, degree: int) -> ConfigError:
    divisors = [d for d in range(1, min(value, 64) + 1) if value % d == 0]
    return ConfigError(
        f"{name} = {value} is not divisible by {setting} = {degree}",
        setting,
        f"set {setting} to one of {', '.join(map(str, divisors))}",
    )
