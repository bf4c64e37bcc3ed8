"""The product as a user installs it: from the wheel, in its own environment, outside any checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers import REPO, make_hf

from tests import byte_tokenizer

pytestmark = pytest.mark.slow
SETTINGS = {"row_length": 320, "max_document_length": 320, "system_prompt": None}
PROGRAM = """
import contextlib, io, json, sys, traceback
from sdlm_megatron import cli

answers = []
for words in json.loads(sys.argv[1]):
    code, text = 0, io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            cli.main(words)
        except SystemExit as exit:
            code = exit.code or 0
        except Exception:
            code = traceback.print_exc()
    answers.append((code, text.getvalue()))
print(json.dumps(answers))
"""
"""Commands of sdlm, one after the other in one interpreter: each imports torch."""


class Installation:
    """Virtual environment with the wheel, and an empty folder to run commands in."""

    def __init__(self, root: Path, wheel: Path) -> None:
        self.root, self.folder = root, root / "work"
        self.folder.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
        self.bin = root / "venv" / "bin"
        # Dependencies come from this environment. Python does not read .pth files of a folder named in a .pth file, so
        # the checkout, which is installed here through one, is not importable.
        site = next((root / "venv" / "lib").glob("python*/site-packages"))
        (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "-q"]
        subprocess.run([*pip, "--no-deps", "--no-index", "--force-reinstall", str(wheel)], check=True)
        drop = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.environment = {key: value for key, value in os.environ.items() if key not in drop}
        self.environment |= {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(root),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the folder; its output is captured."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done

    def sdlm(self, *commands: tuple[str, ...], failing: tuple[str, ...] = ()) -> list[str]:
        """Output of each command; those in `failing` must exit with 1."""
        answers = json.loads(self.run("python", "-P", "-c", PROGRAM, json.dumps(commands)).stdout.splitlines()[-1])
        for (name, *_), (code, text) in zip(commands, answers, strict=True):
            assert code == int(name in failing), f"sdlm {name}: {code}\n{text[-6000:]}"
        return [text for _, text in answers]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installed"), wheel)


def test_package_is_imported_from_the_wheel(installed: Installation) -> None:
    ours, others = ("sdlm_megatron", "data_prep", "checkpoints_tools"), ("dev", "evaluation", "tests", "bench")
    code = "import sys, importlib.util as u; [print(s and s.origin) for s in map(u.find_spec, sys.argv[1:])]"
    paths = installed.run("python", "-c", code, *ours, *others).stdout.splitlines()
    assert len(paths) == len((*ours, *others))
    assert all(Path(path).is_relative_to(installed.root) for path in paths[: len(ours)])
    assert not any(str(REPO) in path for path in paths)


def test_commands_work_without_data(installed: Installation) -> None:
    assert installed.run("sdlm", "--version").stdout.startswith("sdlm ")
    assert "did you mean `sdlm train`" in installed.run("sdlm", "trian", check=False).stderr
    expected = {
        ("--help",): "doctor",
        ("doctor",): "training is possible",
        ("train", "--help"): "--train.recompute=STR",
        ("plan", "sdlm_32b_d4", "--gpus", "64"): "recommended",
        ("train", "--config", "sdlm_3b_d8", "--print-config"): "block_size: 8",
    }
    for text, shown in zip(expected.values(), installed.sdlm(*expected), strict=True):
        assert text in shown, shown


def test_submit_finds_its_scripts(installed: Installation) -> None:
    """Every check but Slurm's own passes without a cluster."""
    (installed.folder / "clusters").mkdir()
    (installed.folder / "clusters" / "mine.yaml").write_text("gpus_per_node: 8\npartition: mine\n")
    for cluster, text in (("example", "8 = 232 processes"), ("mine", "--partition=mine")):
        command = ("sdlm", "submit", "train_32b_d4", "--cluster", cluster, "--dry-run", "--no-simulate")
        done = installed.run(*command, check=False, DATA="data", BASE="base")
        assert text in done.stdout, done.stdout + done.stderr
        assert done.returncode == 0 or shutil.which("sbatch"), done.stdout + done.stderr
        assert "ops/slurm/train_32b_d4.sh" in done.stdout and "Traceback" not in done.stderr


def test_commands_turn_conversations_into_answers(installed: Installation) -> None:
    """prepare -> verify -> train on two processes -> export -> compare -> generate."""
    folder = installed.folder
    plain = dict.fromkeys(("block_size", "causal_attn", "text_mask_token", "text_mask_token_id"))
    byte_tokenizer.write_folder(make_hf(folder / "base", layers=1, **plain))
    turns = [("user", "What is twice {}?"), ("assistant", "Twice {0} is {0} plus {0}.")]
    rows = [{"messages": [{"role": r, "content": text.format(i)} for r, text in turns]} for i in range(60)]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"name": "task", "format": "messages", "path": "task.jsonl"}]
    (folder / "data.yaml").write_text(json.dumps({"sources": sources, **SETTINGS}))  # JSON is YAML
    prepare = ("prepare", "--config", "data.yaml", "--tokenizer", "base", "--out", "data")
    assert "clean" in installed.sdlm(prepare, ("verify", "data"))[1]
    train = ("--config", "tiny", "--data.path=data", "--checkpoint.base=base", "--run_dir=run", "--model.num_layers=0")
    sizes = ("--train.steps=2", "--train.global_batch=2", "--train.global_batch_unit=rows", "--train.precision=fp32")
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = installed.run(*torchrun, "-m", "sdlm_megatron.train", *train, *sizes)
    assert "2/2" in done.stdout
    saved = next((folder / "run" / "ckpt").glob("*/state.json"))
    # The run's settings name none of these: they come from the dataset.
    assert json.loads(saved.read_text())["diffusion"] == {
        "block_size": 4,
        "causal_attn": False,
        "target_shift": True,
        "next_token_weight": 0.0,
        "mask_token": "<text_mask>",
    }
    compared = installed.sdlm(
        ("export", "--ckpt", "run", "--out", "hf"),
        ("compare", "base", "hf"),
        ("generate", "--model", "hf", "--prompt", "Hi", "--max-new-tokens", "8"),
        ("report", "run"),
        failing=("compare",),
    )[1]
    assert "tensors differ" in compared
    assert (folder / "hf" / "modeling_sdlm.py").exists()
    assert (folder / "run" / "report.html").exists()
