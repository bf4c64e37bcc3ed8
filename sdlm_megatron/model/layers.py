"""Which layers a run builds, TransformerEngine's or Megatron-Core's own, with which fusions, and why."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from sdlm_megatron.config.schema import ParallelConfig, TrainConfig
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.packages import NO_GPU, Packages, first_line

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

KEY, FP8_KEY, OVERLAP_KEY = "train.layers", "train.fp8", "parallel.overlap_tensor"
MEGATRON, TRANSFORMER_ENGINE = "megatron", "transformer_engine"
OLDEST = "2.8"
"""TransformerEngine: current scaling together with recomputed norms, buffers of the overlap by kind of number."""
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Layers:
    """The layers of a run."""

    kind: str
    """MEGATRON or TRANSFORMER_ENGINE."""
    text: str
    """What and why, for the console."""
    arguments: dict[str, Any]
    """For Megatron-Core's TransformerConfig."""


def choose_layers(train: TrainConfig, parallel: ParallelConfig, packages: Packages) -> Layers:
    """The layers that `train.layers` names; ConfigError where they, or what else is asked of them, cannot run here."""
    kind, why = _kind(train, packages)
    if kind == MEGATRON:
        for key, asked in ((FP8_KEY, train.fp8 != "none"), (OVERLAP_KEY, parallel.overlap_tensor)):
            if asked:
                off = f"--{key}={'none' if key == FP8_KEY else 'false'}"
                way = off if train.layers == "auto" else f"{off}, or --{KEY}=transformer_engine"
                raise ConfigError(f"{key} needs TransformerEngine's layers: {why}", key, way)
        return Layers(kind, f"megatron: {why}", _arguments(kind, train, parallel, packages))
    if train.fp8 != "none":
        _check_fp8(train, packages)
    parts = [why]
    if train.precision == "fp32":
        parts.append("fp32 is multiplied in TF32")
    if train.fp8 != "none":
        parts.append(f"FP8 with {train.fp8} scaling, head and embedding in bf16")
    if parallel.overlap_tensor:
        parts.append("communication of tensor parallelism overlapped")
    name = f"transformer_engine {packages.transformer_engine.version}"
    return Layers(kind, f"{name}: {', '.join(parts)}", _arguments(kind, train, parallel, packages))


def _kind(train: TrainConfig, packages: Packages) -> tuple[str, str]:
    """Kind of layers and why."""
    problem = _problem(packages)
    if train.layers == TRANSFORMER_ENGINE:
        if problem:
            way = f"--{KEY}=auto"
            if packages.gpu is not None:
                way = f"pip install --no-build-isolation 'transformer-engine[pytorch]>={OLDEST}', or {way}"
            raise ConfigError(f"TransformerEngine's layers cannot be built: {problem}", KEY, way)
        return TRANSFORMER_ENGINE, f"as {KEY} says"
    if train.layers == MEGATRON:
        return MEGATRON, f"as {KEY} says"
    if problem:
        return MEGATRON, problem
    if train.precision == "fp32":
        return MEGATRON, "TransformerEngine would multiply fp32 in TF32"
    return TRANSFORMER_ENGINE, "it is installed"


def _problem(packages: Packages) -> str:
    """Why TransformerEngine's layers cannot be built here, "" if they can."""
    te = packages.transformer_engine
    if packages.gpu is None:
        return NO_GPU
    if not te.version:
        return f"TransformerEngine: {te.problem}"
    if Version(te.version) < Version(OLDEST):
        return f"TransformerEngine {te.version} is too old, {OLDEST} is needed"
    return ""


def _check_fp8(train: TrainConfig, packages: Packages) -> None:
    if train.precision != "bf16":
        raise ConfigError("FP8 goes with bf16 weights", FP8_KEY, f"--train.precision=bf16, or --{FP8_KEY}=none")
    assert packages.gpu is not None
    if packages.gpu < FP8_CAPABILITY:
        found, needed = (".".join(map(str, x)) for x in (packages.gpu, FP8_CAPABILITY))
        raise ConfigError(
            f"this GPU has no FP8 (compute capability {found}, {needed} is needed)", FP8_KEY, f"--{FP8_KEY}=none"
        )
    if train.fp8 == "delayed" and train.recompute == "selective":
        raise ConfigError(
            "delayed scaling cannot recompute norms: the second forward would change its statistics",
            FP8_KEY,
            f"--{FP8_KEY}=current, or --train.recompute=full or none",
        )


def _arguments(kind: str, train: TrainConfig, parallel: ParallelConfig, packages: Packages) -> dict[str, Any]:
    """What Megatron-Core's TransformerConfig has to say about fused kernels and FP8.

    - RoPE: TransformerEngine's kernel reads one row of angles for each row of the sequence, the same for all
      micro-batches: ours are by position id, and a micro-batch is one row. It computes in fp32.
    - SwiGLU: one compiled kernel; on a CPU compiling takes longer than it saves.
    - bias and dropout: there is neither, what remains is one addition. Masked softmax: the core attention is ours.
      Persistent norm: LayerNorm only.
    """
    te = kind == TRANSFORMER_ENGINE
    arguments: dict[str, Any] = {
        "apply_rope_fusion": te,
        "bias_activation_fusion": packages.gpu is not None,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "tp_comm_overlap": parallel.overlap_tensor,
    }
    if train.fp8 != "none":
        # e4m3 forward, e5m2 for gradients; history and rule of delayed scaling are TransformerEngine's own defaults
        arguments |= {"fp8": "hybrid", "fp8_recipe": "delayed" if train.fp8 == "delayed" else "tensorwise"}
        arguments |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return arguments


def start_tensor_overlap(config: "TransformerConfig", row_length: int) -> None:
    """Sets up the buffers through which TransformerEngine's layers overlap communication; before they are built.

    `row_length`: tokens of a packed row, over all TP ranks. ConfigError where this machine cannot do it.
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
    except RuntimeError as error:
        raise ConfigError(
            f"TransformerEngine cannot overlap communication here: {first_line(error)}",
            OVERLAP_KEY,
            f"--{OVERLAP_KEY}=false",
        ) from error


def optimizer_text() -> str:
    """Which Adam, and which kernels for gradient norm and clipping, Megatron-Core has taken."""
    adam = import_module("megatron.core.optimizer").Adam
    norm = import_module("megatron.core.optimizer.clip_grads").l2_norm_impl
    makers = [(x.__module__ or "other").split(".")[0] for x in (adam, norm)]
    adams, norms = (_MAKERS.get(m, m) for m in makers)
    return f"{adams} {adam.__name__}, gradient norms by {norms} kernels"


_MAKERS = {
    "transformer_engine": "TransformerEngine's",
    "transformer_engine_torch": "TransformerEngine's",
    "apex": "Apex's",
    "amp_C": "Apex's",
    "torch": "torch's fused",
    "megatron": "Megatron-Core's",
}
