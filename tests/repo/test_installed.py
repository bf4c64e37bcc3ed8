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


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installed"), wheel)


def test_package_is_imported_from_the_wheel(installed: Installation) -> None:
    for name in ("sdlm_megatron", "data_prep", "checkpoints_tools"):
        path = installed.run("python", "-c", f"import {name}; print({name}.__file__)").stdout
        assert Path(path).is_relative_to(installed.root)
    for name in ("dev", "evaluation", "tests", "bench"):
        code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin)"
        assert str(REPO) not in installed.run("python", "-c", code).stdout


def test_commands_work_without_data(installed: Installation) -> None:
    assert "doctor" in installed.run("sdlm", "--help").stdout
    assert installed.run("sdlm", "--version").stdout.startswith("sdlm ")
    assert "did you mean `sdlm train`" in installed.run("sdlm", "trian", check=False).stderr
    assert "training is possible" in installed.run("sdlm", "doctor").stdout
    assert "--train.recompute=STR" in installed.run("sdlm", "train", "--help").stdout
    assert "recommended" in installed.run("sdlm", "plan", "sdlm_32b_d4", "--gpus", "64").stdout
    assert "block_size: 8" in installed.run("sdlm", "train", "--config", "sdlm_3b_d8", "--print-config").stdout


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
    installed.run("sdlm", "prepare", "--config", "data.yaml", "--tokenizer", "base", "--out", "data")
    assert "clean" in installed.run("sdlm", "verify", "data").stdout
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
    installed.run("sdlm", "export", "--ckpt", "run", "--out", "hf")
    assert (folder / "hf" / "modeling_sdlm.py").exists()
    assert "tensors differ" in installed.run("sdlm", "compare", "base", "hf", check=False).stdout
    answer = installed.run("sdlm", "generate", "--model", "hf", "--prompt", "Hi", "--max-new-tokens", "8")
    assert answer.returncode == 0
    installed.run("sdlm", "report", "run")
    assert (folder / "run" / "report.html").exists()
