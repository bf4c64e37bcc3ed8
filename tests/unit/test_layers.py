"""Layer selection and its reason, arguments for Megatron-Core, tensor names of both kinds in both directions."""

import dataclasses
import inspect
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ENV, REPO, make_hf

from sdlm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from sdlm_megatron.config.validate import check_model, check_run
from sdlm_megatron.errors import ConfigError
from sdlm_megatron.model.layers import choose_layers, start_tensor_overlap
from sdlm_megatron.model.packages import Package, Packages
from sdlm_megatron.weights.names import hf_rows, partition_dim, to_hf

NOTHING = Package(problem="it is not installed")
BROKEN = Package(problem="it cannot be loaded (undefined symbol)")
MACHINES = {
    "H100": Packages((9, 0), Package("2.20.2"), NOTHING),
    "A100": Packages((8, 0), Package("2.20.2"), NOTHING),
    "plain": Packages((9, 0), NOTHING, NOTHING),
    "broken": Packages((9, 0), BROKEN, NOTHING),
    "old": Packages((9, 0), Package("2.7.1"), NOTHING),
    "cpu": Packages(None, Package(problem="there is no GPU"), NOTHING),
}


def choose(machine: str, parallel: ParallelConfig | None = None, **train: str):
    return choose_layers(TrainConfig(**train), parallel or ParallelConfig(), MACHINES[machine])


@pytest.mark.parametrize(
    ("machine", "train", "text"),
    [
        ("H100", {}, "transformer_engine 2.20.2: it is installed"),
        ("A100", {}, "transformer_engine 2.20.2: it is installed"),
        ("H100", {"precision": "fp32"}, "megatron: TransformerEngine would run fp32 products in TF32"),
        ("H100", {"layers": "megatron"}, "megatron: set by train.layers"),
        (
            "H100",
            {"layers": "transformer_engine", "precision": "fp32"},
            "transformer_engine 2.20.2: set by train.layers, fp32 products run in TF32",
        ),
        (
            "H100",
            {"fp8": "delayed"},
            "transformer_engine 2.20.2: it is installed, FP8 with delayed scaling, head and embedding in bf16",
        ),
        ("plain", {}, "megatron: TransformerEngine: it is not installed"),
        ("broken", {"layers": "megatron"}, "megatron: set by train.layers"),
        ("broken", {"precision": "fp32"}, "megatron: TransformerEngine would run fp32 products in TF32"),
        ("cpu", {}, "megatron: there is no GPU"),
        ("cpu", {"layers": "megatron"}, "megatron: set by train.layers"),
    ],
)
def test_choice_and_reason(machine: str, train: dict[str, str], text: str) -> None:
    choice = choose(machine, **train)
    assert choice.text == text
    assert choice.kind == text.split(" ")[0].rstrip(":")


@pytest.mark.parametrize(
    ("machine", "train", "key", "what", "fix"),
    [
        ("broken", {}, "train.layers", "undefined symbol", "pip install --no-build-isolation"),
        ("broken", {"fp8": "current"}, "train.layers", "undefined symbol", "--train.layers=megatron"),
        ("old", {}, "train.layers", "2.7.1 is too old, 2.8 is needed", "--train.layers=megatron"),
        ("plain", {"layers": "te"}, "train.layers", "no layers 'te'", "one of auto, megatron, transformer_engine"),
        ("cpu", {"layers": "transformer_engine"}, "train.layers", "there is no GPU", "--train.layers=megatron"),
        ("plain", {"layers": "transformer_engine"}, "train.layers", "not installed", "pip install"),
        ("broken", {"layers": "transformer_engine"}, "train.layers", "undefined symbol", "pip install"),
        ("old", {"layers": "transformer_engine"}, "train.layers", "too old", "pip install"),
        ("cpu", {"fp8": "current"}, "train.fp8", "there is no GPU", "--train.fp8=none"),
        ("plain", {"fp8": "delayed"}, "train.fp8", "not installed", "--train.fp8=none"),
        (
            "H100",
            {"fp8": "current", "layers": "megatron"},
            "train.fp8",
            "set by train.layers",
            "--train.layers=transformer_engine",
        ),
        ("H100", {"fp8": "current", "precision": "fp32"}, "train.fp8", "TF32", "--train.fp8=none"),
        ("A100", {"fp8": "current"}, "train.fp8", "compute capability 8.0, 8.9", "--train.fp8=none"),
    ],
)
def test_unsupported_settings_are_refused(machine: str, train: dict[str, str], key: str, what: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        choose(machine, **train)
    assert caught.value.where == key
    assert fix in caught.value.fix


def test_overlap_requires_te_layers_and_sequence_parallelism() -> None:
    overlap = ParallelConfig(tensor=2, sequence=True, overlap_tensor=True)
    assert "overlapped" in choose("H100", overlap).text
    for machine in ("plain", "cpu"):
        with pytest.raises(ConfigError) as caught:
            choose(machine, overlap)
        assert caught.value.where == "parallel.overlap_tensor"
    config = RunConfig(parallel=ParallelConfig(tensor=2, overlap_tensor=True))
    config.data.path = "somewhere"
    with pytest.raises(ConfigError, match="needs sequence parallelism"):
        check_run(config, 2)
    config.parallel.sequence = True
    check_run(config, 2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, None),
        ({"tensor": 2}, None),
        ({"row_length": 136}, "row_length is 136"),
        ({"row_length": 144, "tensor": 2, "sequence": True}, "row_length is 72"),
        ({"hidden_size": 72}, "hidden_size is 72"),
        ({"ffn_hidden_size": 96, "tensor": 4}, "ffn_hidden_size is 24"),
        ({"head_dim": 24, "tensor": 4, "ffn_hidden_size": 192}, "heads is 24"),
        ({"head_dim": 12, "num_query_groups": 1}, "q, k and v is 72"),
    ],
)
def test_shapes_unsupported_by_fp8_are_refused(change: dict, what: str | None) -> None:
    numbers = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4}
    numbers |= {"num_query_groups": 4, "head_dim": 16, "vocab_size": 264, "row_length": 128, "tensor": 1} | change
    row_length, tensor, sequence = (numbers.pop(k, False) for k in ("row_length", "tensor", "sequence"))
    config = RunConfig(parallel=ParallelConfig(tensor=tensor, sequence=sequence))
    check_model(ModelConfig(**numbers), config, row_length)
    config.train.fp8 = "delayed"
    if what is None:
        check_model(ModelConfig(**numbers), config, row_length)
        return
    with pytest.raises(ConfigError, match=what):
        check_model(ModelConfig(**numbers), config, row_length)


def test_arguments_exist_in_megatron_core(make_engine: Callable) -> None:
    """Every argument exists in the installed version, for every choice."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    overlap = ParallelConfig(tensor=2, sequence=True, overlap_tensor=True)
    for fp8, recipe in (("none", None), ("delayed", "delayed"), ("current", "tensorwise")):
        arguments = choose("H100", overlap, fp8=fp8).arguments
        assert set(arguments) <= known
        assert arguments.get("fp8_recipe") == recipe
        assert arguments["apply_rope_fusion"] and arguments["tp_comm_overlap"]
    assert not choose("cpu").arguments["bias_activation_fusion"]
    assert not choose("plain").arguments["apply_rope_fusion"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is so on a CPU")
def test_run_logs_its_optimizer(make_engine: Callable, tmp_path: Path) -> None:
    from sdlm_megatron.parallel.optimizer import optimizer_text

    engine = make_engine(make_hf(tmp_path / "hf"))
    assert engine.layers.text == "megatron: there is no GPU"
    assert optimizer_text() == "torch's fused AdamW, gradient norms by Megatron-Core's kernels"


# Arguments of TransformerEngine's pytorch.module.base.initialize_ub, by release.
OVERLAP_SIGNATURES = {
    "2.8 to 2.16": "shape tp_size use_fp8 quantization_modes dtype ub_cfgs bootstrap_backend",
    "2.19 and 2.20": "shape tp_size use_fp8 quantization_modes dtype ub_cfgs bootstrap_backend with_cublasmp",
}


@pytest.mark.parametrize("version", OVERLAP_SIGNATURES)
@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_overlap_calls_match_transformer_engine_signatures(version: str, fp8: str | None, monkeypatch) -> None:
    names = OVERLAP_SIGNATURES[version].split()
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in names]
    calls = []

    def initialize_ub(**arguments):
        calls.append(inspect.Signature(parameters).bind(**arguments).arguments)
        if len(calls) > 1:
            raise AssertionError("no multicast\nlong text")

    base = types.SimpleNamespace(
        initialize_ub=initialize_ub, UserBufferQuantizationMode=types.SimpleNamespace(FP8="8", NONE="16")
    )
    monkeypatch.setattr("sdlm_megatron.model.layers.import_module", lambda name: base)
    config = types.SimpleNamespace(fp8=fp8, hidden_size=64, tensor_model_parallel_size=2, params_dtype=torch.bfloat16)
    start_tensor_overlap(config, 128)  # type: ignore[arg-type]
    assert calls[0]["shape"] == [128, 64] and calls[0]["quantization_modes"] == ["8" if fp8 else "16"]
    with pytest.raises(ConfigError, match="on this machine: no multicast$|on this machine: no multicast\n"):
        start_tensor_overlap(config, 128)  # type: ignore[arg-type]


def test_broken_packages_are_hidden(tmp_path: Path) -> None:
    """Broken compiled parts of Apex, TransformerEngine, no GPU: Megatron-Core sees only what works."""
    files = ("amp_C.py", "transformer_engine.py", "transformer_engine_torch.py", "fused_weight_gradient_mlp_cuda.py")
    for name in (*files, "apex/__init__.py", "apex/optimizers.py", "apex/multi_tensor_apply.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import os\nif __name__ in os.environ['BROKEN']: raise ImportError('undefined')")
    code = """
import os, sys
import torch
from sdlm_megatron.model import packages
names = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda")
packages.gpu_number, torch.cuda.get_device_capability = int, lambda number: (9, 0)
packages.gpu_available = lambda: bool(os.environ["BROKEN"])
for part in ("fused_weight_gradient_mlp_cuda", "amp_C", ""):
    os.environ["BROKEN"] = part and f"transformer_engine {part}"
    for module in [m for m in sys.modules if m.startswith(names)]:
        del sys.modules[module]
    result = packages.find_packages.__wrapped__()
    print(result.transformer_engine.problem, result.apex.problem, sep="|")
    print(*(name for name in names if sys.modules.get(name, 0) is None))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**ENV, "PYTHONPATH": f"{tmp_path}:{REPO}", "CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    te, apex, fused = "transformer_engine transformer_engine_torch", "apex amp_C", "fused_weight_gradient_mlp_cuda"
    assert done.stdout.splitlines() == [
        *("it cannot be loaded (undefined)|", f"{te} {fused}"),
        *("it cannot be loaded (undefined)|it cannot be loaded (undefined)", f"{te} {apex} {fused}"),
        *("there is no GPU|there is no GPU", f"{te} {apex} {fused}"),
    ]


def test_pypi_apex_is_not_nvidia_apex(tmp_path: Path, monkeypatch) -> None:
    """On a GPU machine, the modules that Megatron-Core uses are imported; PyPI's package has none of them."""
    from sdlm_megatron.model import packages

    for name, text in (("apex_a", ""), ("apex_b", "raise OSError('libcudart.so.12: cannot open')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    gpu = (9, 0)
    assert "No module named 'apex_a.optimizers'" in packages._find("apex_a", ("apex_a.optimizers",), gpu).problem
    assert "libcudart" in packages._find("apex_b", ("apex_b.optimizers",), gpu).problem
    assert packages._find("apex_c", (), gpu).problem == "it is not installed"
    assert packages._find("apex_a", ("apex_a",), gpu) == Package(version="of unknown version")


SHAPE = ModelConfig(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=2,
    vocab_size=10,
)
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
LAYER = {
    "self_attention.linear_qkv.weight": [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ],
    "self_attention.linear_qkv.bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
    "input_layernorm.weight": ["input_layernorm.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
}


@pytest.mark.parametrize("fused", [False, True])
def test_tensor_names_round_trip_for_both_layer_kinds(fused: bool) -> None:
    """Every tensor name of a layer round-trips, and other names are rejected."""
    rows = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "q_norm": 2, "k_norm": 2, "gate_proj": 12, "up_proj": 12}
    for name, theirs in LAYER.items():
        ours = f"decoder.layers.1.{NORMS.get(name, name) if fused else name}"
        hf = {f"model.layers.1.{t}": torch.randn(rows.get(t.split(".")[1], 8), 3) for t in theirs}
        whole = torch.cat([hf[name][start:stop] for name, start, stop in hf_rows(ours, SHAPE)])
        back = dict(to_hf(ours, whole, SHAPE))
        assert set(back) == set(hf)
        assert all(torch.equal(back[k], hf[k]) for k in hf)
    for wrong in ("mlp.linear_fc1.layer_norm_bias", "mlp.linear_fc1.bias", "self_attention.q_layernorm.bias"):
        with pytest.raises(KeyError):
            hf_rows(f"decoder.layers.0.{wrong}", SHAPE)
        with pytest.raises(KeyError):
            list(to_hf(f"decoder.layers.0.{wrong}", torch.zeros(4), SHAPE))


def test_norms_are_replicated_on_every_rank() -> None:
    for pair in (*NORMS.items(), ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")):
        for name in pair:
            assert partition_dim(f"decoder.layers.0.{name}") is None
    assert partition_dim("decoder.layers.0.self_attention.linear_qkv.bias") == 0
    assert partition_dim("decoder.layers.0.mlp.linear_fc2.weight") == 1


class NormWithState(torch.nn.RMSNorm):
    """Mimics TransformerEngine: an extra state entry whose content may not be loadable."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        assert state is None, "refused"


@pytest.mark.parametrize("written", [False, True], ids=["missing", "refused"])
def test_checkpoints_of_other_layer_kinds_load(written: bool, make_engine: Callable, tmp_path: Path) -> None:
    """The extra state of the writing layers is neither required nor read."""
    from sdlm_megatron.checkpoint import restore as checkpointing
    from sdlm_megatron.checkpoint.async_writer import CheckpointWriter
    from sdlm_megatron.config.schema import CheckpointConfig
    from sdlm_megatron.weights.checkpoint_folder import TrainState

    engine = make_engine(make_hf(tmp_path / "hf"))
    optimizer, engine.optimizer = engine.optimizer, None  # so that only weights are saved
    norm = engine.module.decoder.final_layernorm
    own, saved = type(norm), norm.weight.detach().clone()
    norm.__class__ = NormWithState if written else own
    state = TrainState(0, 0, 0, engine.shape, engine.config.diffusion, -1, "fp32", True, {})
    CheckpointWriter(engine, tmp_path, CheckpointConfig()).save(state, final=True)
    norm.__class__ = NormWithState
    with torch.no_grad():
        norm.weight.zero_()
    engine.optimizer = optimizer
    checkpointing.load(tmp_path / "ckpt" / "step-0000000", engine, step=None)
    assert torch.equal(norm.weight, saved)
