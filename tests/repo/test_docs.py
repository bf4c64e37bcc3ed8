"""What the documents say exists."""

import importlib
import re
from pathlib import Path

import pytest
from helpers import REPO, run_python

DOCS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCS, ids=lambda p: p.name)
def test_paths_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    paths = set(
        re.findall(
            r"`((?:sdlm_megatron|data_prep|checkpoints_tools|evaluation|evidence|quickstart|bench|tests|docs)/[\w./]*)`",
            text,
        )
    )
    assert paths or document.name == "benchmarks.md"
    assert not [p for p in paths if not (REPO / p).exists()]


def test_functions_named_in_the_method_exist() -> None:
    """Each section of docs/method.md names its file; the functions named in it live there or in a file named later."""
    text = (REPO / "docs" / "method.md").read_text()
    sources = "".join((REPO / p).read_text() for p in set(re.findall(r"`([\w/]+\.py)`", text)))
    for name in ("block_count", "draw_starts", "row_targets", "visible", "RowAttention", "pack_row"):
        assert re.search(rf"`(\w+\.)?{name}`", text), name
        assert re.search(rf"(def|class) {name}\b", sources), name


@pytest.mark.parametrize(
    "module",
    [
        "data_prep.build",
        "data_prep.inspect",
        "data_prep.stats",
        "data_prep.verify",
        "sdlm_megatron.chat.generate",
        "sdlm_megatron.ops.driver.launch",
        "sdlm_megatron.planner.plan",
        "sdlm_megatron.ops.driver.preflight",
        "sdlm_megatron.train",
        "checkpoints_tools.compare",
        "checkpoints_tools.hf_to_mcore",
        "checkpoints_tools.mcore_to_hf",
        "sdlm_megatron.evaluation.page",
        "dev.evidence.document",
        "sdlm_megatron.evaluation.table",
        "dev.bench.attention_speed",
        "dev.bench.convert",
        "dev.bench.cpu_choices",
        "dev.bench.data_prep_speed",
        "dev.bench.packing_speed",
        "dev.bench.step",
        "dev.bench.synthetic_mixture",
        "dev.quickstart.base_model",
    ],
)
def test_every_command_has_help_with_an_example(module: str) -> None:
    done = run_python("-m", module, "--help")
    assert "example" in done.stdout
    assert f"-m {module}" in done.stdout


def test_commands_of_the_readme_exist() -> None:
    text = (REPO / "README.md").read_text()
    for module in set(re.findall(r"-m ((?:data_prep|sdlm_megatron|checkpoints_tools|quickstart|bench)[\w.]*)", text)):
        importlib.util.find_spec(module)  # type: ignore[attr-defined]
        assert (REPO / (module.replace(".", "/") + ".py")).exists(), module
    targets = set(re.findall(r"make (\w+)", text))
    makefile = (REPO / "Makefile").read_text()
    assert {t for t in targets if not re.search(rf"^{t}:", makefile, re.M)} <= {"a"}


def test_no_path_of_a_machine_is_committed() -> None:
    """Documents and code name no absolute path of the machine they were written on."""
    suspicious = re.compile(r"/(?:work|root|home/\w+)/\w")
    files = [p for p in REPO.rglob("*") if p.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh"} and p.is_file()]
    ours = [p for p in files if not {".venv", "runs", ".cache", "build"} & set(p.relative_to(REPO).parts)]
    assert len(ours) > 50
    assert not [p for p in ours if p != Path(__file__) and suspicious.search(p.read_text(errors="ignore"))]
