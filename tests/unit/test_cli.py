"""Command `sdlm`: dispatch, help, completion, doctor."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from sdlm_megatron import __version__, doctor
from sdlm_megatron.cli import COMMANDS, main
from sdlm_megatron.errors import ConfigError, UserError

REPO = Path(__file__).parents[2]


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        main(argv)
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in COMMANDS)
        assert "example:" in shown
    main(["--version"])
    assert capsys.readouterr().out == f"sdlm {__version__}\n"


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("trian", "`sdlm train`"),
        ("exprot", "`sdlm export`"),
        ("help", "`sdlm --help`"),
        ("--verson", "`sdlm --version`"),
        ("x", "one of: "),
    ],
)
def test_unknown_command_suggests_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UserError, match=f"unknown command {word}") as raised:
        main([word, "--help"])
    assert near in raised.value.fix


def test_command_receives_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--config", "tiny", "--print-config", "--train.steps=3"])
    assert "  steps: 3\n" in capsys.readouterr().out


def test_a_reader_that_leaves_causes_no_traceback() -> None:
    """Output that is larger than the pipe's buffer, and output that is only flushed at the end."""
    for call in ("print('x' * 10**6)", "print('x')", "errors.make_console().print('x' * 10**6)"):
        code = f"from sdlm_megatron import errors; errors.run_cli(lambda argv: {call})"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO
        )
        assert process.stdout and process.stderr
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.fixture
def complete(tmp_path: Path) -> Callable[..., list[str]]:
    """Returns the completions of a command line, requested as argcomplete's shell function does."""

    def ask(line: str, *, without: str = "") -> list[str]:
        blocked = f"sys.modules.update(dict.fromkeys({without.split()!r}))"
        code = f"import sys; {blocked}; from sdlm_megatron import cli; cli.entry()"
        answer = tmp_path / "answer"
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_TYPE": "9",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        return answer.read_text().split("\n")

    return ask


def test_completion(complete: Callable[..., list[str]]) -> None:
    # Modules set to None cannot be imported: these completions load neither torch nor YAML.
    assert complete("sdlm tr", without="torch yaml numpy") == ["train "]
    assert set(complete("sdlm ", without="torch yaml numpy")) >= set(COMMANDS)
    assert complete("sdlm train --train.recompute_", without="torch") == ["--train.recompute_layers="]
    assert complete("sdlm prepare --row") == ["--row_length="]
    assert complete("sdlm export --max") == ["--max-shard-gb "]
    assert complete("sdlm evaluate sp") == ["speed "]
    assert complete("sdlm evaluate speed --cont") == ["--contexts "]


def test_completion_of_values(complete: Callable[..., list[str]]) -> None:
    values = complete("sdlm train --train.recompute=", without="torch")
    assert [value.rpartition("=")[2].strip() for value in values] == ["none", "selective", "full"]
    assert "sdlm_3b_d4" in complete("sdlm train --config sdlm_3b", without="torch")
    assert "sdlm_3b_d4" in complete("sdlm plan sdlm_3b", without="torch")
    assert complete("sdlm prepare --format q") == ["query_response", "question_answer"]


def test_doctor_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] and {"python", "torch", "megatron-core", "Apex", "compiler", "current folder"} <= set(checks)
    assert all(check["fix"] for check in checks.values() if check["state"] != "ok")
    assert doctor.TE_FIX == "on a GPU machine: make venv EXTRAS=gpu"  # of a checkout, as here
    doctor.main([])
    shown = capsys.readouterr().out
    assert shown.endswith("training is possible\n") and "FAIL" not in shown


def test_doctor_reports_broken_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["megatron-core>=99", "numpy>=99", "no-such>=1"])
    with pytest.raises(SystemExit) as raised:
        doctor.main([])
    assert raised.value.code == 1
    shown = capsys.readouterr().out
    for line in (
        "FAIL  python             3.",
        f"FAIL  megatron-core      megatron-core is {importlib.metadata.version('megatron-core')}, supported: >=99\n",
        f"FAIL  packages           numpy is {importlib.metadata.version('numpy')}, supported: >=99; no-such is",
        "fix: pip install -c constraints.txt -e . in the checkout",
        "FAIL  temporary files    /proc cannot be written",
        "--    compiler           missing: gcc, g++",
        "--    Slurm ",
        "training is not possible",
    ):
        assert line in shown, line


def test_doctor_works_when_torch_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    results = {result["name"]: result for result in doctor.diagnose()}
    assert results["torch"]["state"] == "broken" and "pip install" in results["torch"]["fix"]
    assert results["GPUs"]["state"] == "limited"


def test_doctor_says_why_a_package_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (("sound", "__version__ = '1.2'"), ("built_wrong", "raise ImportError('undefined symbol: x')")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._optional("sound") == "1.2"
    with pytest.raises(doctor.Problem, match="^not installed$"):
        doctor._optional("absent_package")
    with pytest.raises(doctor.Problem, match="installed, but it does not load: ImportError: undefined symbol: x"):
        doctor._optional("built_wrong")


def test_doctor_lists_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.check_driver() == "570.1"
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=80 * 2**30))
    assert doctor._gpus() == "2 x NVIDIA H100, 80 GiB each"
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(doctor.Problem, match="^570.1; torch's CUDA 13.0 needs 580 or newer$"):
        doctor.check_driver()
    smi.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    with pytest.raises(doctor.Problem, match="^no devices were found$"):
        doctor.check_driver()
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(doctor, "SMI_SECONDS", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        doctor.check_driver()


def gpu_trial(name: str) -> str:
    """A trial on the CPU. What torch would compile there, it runs as it is: compiling takes half a minute."""
    from sdlm_megatron.model.gpu_trials import run_trial

    with torch.compiler.set_stance("force_eager"):
        return run_trial(name, torch.device("cpu"))


def test_trials_compare_with_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.fusions.fused_bias_swiglu as fused

    from sdlm_megatron.model import gpu_trials

    assert gpu_trial("SwiGLU").startswith("Megatron-Core's, compiled by torch, relative error 0.00")
    assert gpu_trial("attention").startswith("per_document")
    monkeypatch.setattr(fused, "bias_swiglu_impl", lambda x, bias: x.chunk(2, -1)[0] * 0.5)
    with pytest.raises(UserError, match="runs, but its results are wrong: relative error 1"):
        gpu_trial("SwiGLU")
    monkeypatch.setattr(fused, "bias_swiglu_impl", lambda x, bias: x.chunk(2, -1)[0] * float("nan"))
    with pytest.raises(UserError, match="runs, but its results are wrong: relative error inf"):
        gpu_trial("SwiGLU")
    for error, text, fix in (
        (subprocess.CalledProcessError(1, "gcc"), "does not run: CalledProcessError: Command 'gcc'", gpu_trials.FIX),
        (ConfigError("no kernel works", "train.attention", "the fix"), "no kernel works", "the fix"),
    ):
        monkeypatch.setattr(fused, "bias_swiglu_impl", Mock(side_effect=error))
        with pytest.raises(ConfigError, match=text) as caught:
            gpu_trial("SwiGLU")
        assert caught.value.fix == fix

    class LayerNormLinear(torch.nn.Linear):
        """TransformerEngine's, with the arguments that the trial uses."""

        def __init__(self, inputs: int, outputs: int, *, normalization: str, **options: object) -> None:
            super().__init__(inputs, outputs, bias=False, dtype=options["params_dtype"])
            assert (normalization, options["eps"], options["bias"]) == ("RMSNorm", 1e-6, False)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(inputs, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, 1e-6))

    package = SimpleNamespace(LayerNormLinear=LayerNormLinear)
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=package))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", package)
    assert gpu_trial("layer").startswith("norm and linear layer in bf16, relative error 0.00")
    assert set(gpu_trials.TRIALS) == {name for name, *_ in doctor.GPU_CHECKS}


def test_trials_refuse_a_device_that_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "square", lambda x: x * 0)
    with pytest.raises(UserError, match=r"the device computes 0 \+ 1 \+ 4 \+ 9 \+ 16 = 0"):
        gpu_trial("SwiGLU")


def test_doctor_reports_trials_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run where there is a GPU, each in its own process; a failure is broken, with its message and time."""
    sound = [(name, lambda: "fine", needed, fix) for name, _, needed, fix in doctor.CHECKS]
    monkeypatch.setattr(doctor, "CHECKS", sound)
    monkeypatch.setattr(doctor, "GPU_CHECKS", doctor.GPU_CHECKS[1:])  # without SwiGLU, which takes long to compile
    results = {result["name"]: result for result in doctor.diagnose()}
    assert (
        results["attention"]["state"] == "ok" and "per_document: the fastest on a CPU" in results["attention"]["detail"]
    )
    layer = results["layer"]
    assert layer["state"] == "broken" and "train.layers=megatron" in layer["fix"]
    assert re.match(r"does not run: .*transformer_engine.* \(exit code 2, \d+ s\)$", layer["detail"])
