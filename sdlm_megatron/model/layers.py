"""Choice of the transformer layers of a run, TransformerEngine's or Megatron-Core's own, and of their fusions."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from sdlm_megatron.config.hardware import gpu_available
from sdlm_megatron.config.schema import ParallelConfig, TrainConfig
from sdlm_megatron.config.validate import CHOICES
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.packages import NO_GPU, NOT_INSTALLED, Packages, find_packages, first_line

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

KEY, FP8_KEY, OVERLAP_KEY = "train.layers", "train.fp8", "parallel.overlap_tensor"
MEGATRON, TRANSFORMER_ENGINE = "megatron", "transformer_engine"
OLDEST = "2.8"
"""Oldest TransformerEngine with FP8 current scaling under recomputed norms, and quantization modes of user buffers."""
FP8_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8 (Ada); Hopper has 9.0."""


@dataclass(frozen=True)
class Layers:
    """The layers of a run."""

    kind: str
    """MEGATRON or TRANSFORMER_ENGINE."""
    text: str
    """Kind and reason for the choice, for the console."""
    arguments: dict[str, Any]
    """Arguments of Megatron-Core's TransformerConfig."""


def choose_layers(train: TrainConfig, parallel: ParallelConfig, packages: Packages) -> Layers:
    """The layers for `train.layers`; raises ConfigError where they, or options that need them, cannot run."""
    kind, reason = _kind(train, packages)
    if kind == MEGATRON:
        for key, enabled in ((FP8_KEY, train.fp8 != "none"), (OVERLAP_KEY, parallel.overlap_tensor)):
            if enabled:
                off = f"--{key}={'none' if key == FP8_KEY else 'false'}"
                fix = off if train.layers == "auto" else f"{off}, or --{KEY}=transformer_engine"
                raise ConfigError(f"{key} needs TransformerEngine's layers: {reason}", key, fix)
        return Layers(kind, f"megatron: {reason}", _arguments(kind, train, parallel, packages))
    if train.fp8 != "none":
        _check_fp8(train, packages)
    parts = [reason]
    if train.precision == "fp32":
        parts.append("fp32 products run in TF32")
    if train.fp8 != "none":
        parts.append(f"FP8 with {train.fp8} scaling, head and embedding in bf16")
    if parallel.overlap_tensor:
        parts.append("tensor-parallel communication overlapped")
    name = f"transformer_engine {packages.transformer_engine.version}"
    return Layers(kind, f"{name}: {', '.join(parts)}", _arguments(kind, train, parallel, packages))


def check_layers(train: TrainConfig, parallel: ParallelConfig) -> str:
    """The layers in the words of a dry run, which a machine without a GPU may make; ConfigError as `choose_layers`."""
    if gpu_available():
        return choose_layers(train, parallel, find_packages()).text
    uses = {KEY: train.layers == TRANSFORMER_ENGINE, FP8_KEY: train.fp8 != "none", OVERLAP_KEY: parallel.overlap_tensor}
    named = ", ".join(key for key, used in uses.items() if used)
    return f"NOT CHECKED: {named}: TransformerEngine needs a GPU, and torch sees none here" if named else ""


def _kind(train: TrainConfig, packages: Packages) -> tuple[str, str]:
    """Kind of layers and the reason."""
    if train.layers not in CHOICES[KEY]:
        raise ConfigError(f"there are no layers '{train.layers}'", KEY, f"one of {', '.join(CHOICES[KEY])}")
    if train.layers == MEGATRON:
        return MEGATRON, f"set by {KEY}"
    problem, named = _problem(packages), train.layers == TRANSFORMER_ENGINE
    if not named and (packages.gpu is None or packages.transformer_engine.problem == NOT_INSTALLED):
        return MEGATRON, problem
    if not named and train.precision == "fp32":
        # TF32 keeps 10 bits of mantissa: a run in fp32 is for exact comparisons
        return MEGATRON, "TransformerEngine would run fp32 products in TF32"
    if problem:  # slower layers must not silently replace an installation that does not work
        fix = f"--{KEY}=megatron"
        if packages.gpu is not None:
            fix = f"pip install --no-build-isolation 'transformer-engine[pytorch]>={OLDEST}', or {fix}"
        raise ConfigError(f"TransformerEngine's layers cannot be built: {problem}", KEY, fix)
    return TRANSFORMER_ENGINE, f"set by {KEY}" if named else "it is installed"


def _problem(packages: Packages) -> str:
    """Reason why TransformerEngine's layers cannot be built, empty if they can."""
    te = packages.transformer_engine
    if packages.gpu is None:
        return NO_GPU
    if not te.version:
        return f"TransformerEngine: {te.problem}"
    if Version(te.version) < Version(OLDEST):
        return f"TransformerEngine {te.version} is too old, {OLDEST} is needed"
    return ""


def _check_fp8(train: TrainConfig, packages: Packages) -> None:
    assert packages.gpu is not None
    if packages.gpu < FP8_CAPABILITY:
        actual, needed = (".".join(map(str, x)) for x in (packages.gpu, FP8_CAPABILITY))
        raise ConfigError(
            f"this GPU has no FP8 (compute capability {actual}, {needed} is needed)", FP8_KEY, f"--{FP8_KEY}=none"
        )


def _arguments(kind: str, train: TrainConfig, parallel: ParallelConfig, packages: Packages) -> dict[str, Any]:
    """Arguments of TransformerConfig about fused kernels, overlap and FP8."""
    arguments: dict[str, Any] = {
        # TransformerEngine's kernel reads one row of angles per token, the same for all micro-batches. That fits
        # angles by position id, because a micro-batch is one row. It computes in fp32.
        "apply_rope_fusion": kind == TRANSFORMER_ENGINE,
        # SwiGLU in one compiled kernel; on a CPU, compiling takes longer than it saves
        "bias_activation_fusion": packages.gpu is not None,
        "bias_dropout_fusion": False,  # there is neither bias nor dropout
        "masked_softmax_fusion": False,  # unused: the core attention is ours
        "persist_layer_norm": False,  # LayerNorm only
        "tp_comm_overlap": parallel.overlap_tensor,
    }
    if train.fp8 != "none":
        # hybrid: e4m3 forward, e5m2 for gradients; the amax settings are TransformerEngine's defaults
        arguments |= {"fp8": "hybrid", "fp8_recipe": "delayed" if train.fp8 == "delayed" else "tensorwise"}
        arguments |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return arguments


def start_tensor_overlap(config: "TransformerConfig", row_length: int) -> None:
    """Allocates TransformerEngine's user buffers for overlapped communication. Must run before layers are built.

    Args:
        config: of the model.
        row_length: tokens of a packed row, over all TP ranks.

    Raises:
        ConfigError: this machine does not support user buffers.
    """
    base: Any = import_module("transformer_engine.pytorch.module.base")
    mode = base.UserBufferQuantizationMode.FP8 if config.fp8 else base.UserBufferQuantizationMode.NONE
    try:
        base.initialize_ub(
            shape=[row_length, config.hidden_size],
            tp_size=config.tensor_model_parallel_size,
            quantization_modes=[mode],
            dtype=config.params_dtype,
            bootstrap_backend="nccl",
        )
    except Exception as error:  # a GPU without multicast, e.g. a workstation's, fails TransformerEngine's assertion
        raise ConfigError(
            f"TransformerEngine cannot overlap communication on this machine: {first_line(error)}",
            OVERLAP_KEY,
            f"--{OVERLAP_KEY}=false",
        ) from error
