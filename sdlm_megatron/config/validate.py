"""Checks of a configuration before anything is built. No check changes a setting."""

from collections.abc import Iterator
from dataclasses import is_dataclass

from sdlm_megatron.config.schema import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
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
POSITIVE = {
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "train.global_batch",
    "train.logits_mb",
    "optimizer.lr",
    "observe.log_every",
    "fault.heartbeat_seconds",
    "fault.hang_factor",
    "fault.hang_min_seconds",
    "fault.start_seconds",
}
"""Settings that must be above 0; every other number may be 0 but not negative."""


def _require(condition: object, what: str, where: str, fix: str) -> None:
    if not condition:
        raise ConfigError(what, where, fix)


def _values(config: RunConfig) -> Iterator[tuple[str, object]]:
    """Dotted name and value of every setting in a section."""
    for section, settings in vars(config).items():
        if is_dataclass(settings):
            yield from ((f"{section}.{name}", value) for name, value in vars(settings).items())


def check_values(config: RunConfig) -> None:
    """Checks every setting by itself. Raises ConfigError with the setting and a fix."""
    for key, value in _values(config):
        if key in CHOICES:
            _require(value in CHOICES[key], f"{key} is {value!r}", key, f"one of {', '.join(CHOICES[key])}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            # Written so that NaN, which compares false with everything, is refused.
            valid = value > 0 or (value == 0 and key not in POSITIVE)
            _require(valid, f"{key} is {value}", key, f"set it {'above 0' if key in POSITIVE else 'to 0 or more'}")


def check_run(config: RunConfig, world_size: int) -> None:
    """Checks what can be known without model and dataset. Raises ConfigError with the setting and a fix."""
    check_values(config)
    length = config.train.steps or config.train.epochs > 0
    _require(length, "train.steps and train.epochs are both 0", "train", "set one of them")
    _require(config.data.path, "no dataset", "data.path", "--data.path=DIR, a folder written by `sdlm prepare`")
    rows = all(row >= 0 for row in config.data.skip_rows)
    _require(rows, "a row number is negative", "data.skip_rows", "use the row numbers in spikes.jsonl")
    _check_parallel(config.parallel, world_size)
    _check_recompute(config.train)
    _check_checkpoint(config.checkpoint)
    _check_samples(config)


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
    model_size = parallel.tensor * parallel.pipeline
    _require(
        world_size % model_size == 0,
        f"{world_size} processes are not a multiple of tensor {parallel.tensor} x pipeline {parallel.pipeline}",
        "parallel",
        f"start a multiple of {model_size} processes, or change parallel.tensor / parallel.pipeline",
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


def _check_samples(config: RunConfig) -> None:
    validates = config.data.validation and config.observe.validate_every
    for enabled, key in ((config.observe.sample_every, "sample_every"), (validates, "validate_every")):
        _require(
            config.train.fp8 != "delayed" or not enabled,
            "delayed FP8 scaling also records the tensors of samples and validation, which would change training",
            f"observe.{key}",
            f"set observe.{key}=0 or train.fp8=current",
        )


def check_model(model: ModelConfig, config: RunConfig, row_length: int) -> None:
    """Checks that the model can be split over the configured degrees. Raises ConfigError."""
    tp, chunks = config.parallel.tensor, config.parallel.pipeline * config.parallel.virtual_pipeline
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    for key in sizes:
        what, fix = f"model.{key} is {getattr(model, key)}", "set it, or set checkpoint.base to read it from there"
        _require(getattr(model, key) > 0, what, f"model.{key}", fix)
    heads, kv_heads = model.num_attention_heads, model.num_query_groups
    _require(
        heads % kv_heads == 0,
        f"{heads} heads are not a multiple of {kv_heads} KV heads",
        "model.num_query_groups",
        "set a divisor of model.num_attention_heads",
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
    setting = "parallel.pipeline" + (" x virtual_pipeline" if config.parallel.virtual_pipeline > 1 else "")
    _check_divisible("model.num_layers", model.num_layers, setting, chunks)
    layers, recomputed = model.num_layers // chunks, config.train.recompute_layers
    _require(
        recomputed <= layers,
        f"recompute_layers is {recomputed}, but a model chunk has {layers} layers",
        "train.recompute_layers",
        "set a smaller number, or 0 for all layers",
    )
    if config.parallel.sequence:
        _check_divisible("the dataset's row_length", row_length, "parallel.tensor", tp)
    if config.train.fp8 != "none":
        _check_fp8(model, tp, row_length // (tp if config.parallel.sequence else 1))


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
