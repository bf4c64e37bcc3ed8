"""Files, functions and commands named in the documents exist."""

import re
from pathlib import Path

import pytest
from helpers import REPO

from sdlm_megatron.cli import COMMANDS

DOCS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCS, ids=lambda p: p.name)
def test_paths_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    paths = set(
        re.findall(
            r"`((?:sdlm_megatron|data_prep|checkpoints_tools|dev|slurm|tests|docs)/[\w./]*)`",
            text,
        )
    )
    assert not [p for p in paths if "NAME" not in p and not (REPO / p).exists()]


def test_functions_named_in_the_method_exist() -> None:
    """Each section of docs/method.md names its file; its functions are defined there or in a file named later."""
    text = (REPO / "docs" / "method.md").read_text()
    sources = "".join((REPO / p).read_text() for p in set(re.findall(r"`([\w/]+\.py)`", text)))
    for name in ("block_count", "draw_starts", "row_targets", "visible", "RowAttention", "pack_row"):
        assert re.search(rf"`(\w+\.)?{name}`", text), name
        assert re.search(rf"(def|class) {name}\b", sources), name


@pytest.mark.parametrize("document", DOCS, ids=lambda p: p.name)
def test_commands_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    for module in set(re.findall(r"-m ((?:data_prep|sdlm_megatron|checkpoints_tools|dev)\.[\w.]*\w)", text)):
        placeholder = module.rsplit(".", 1)[-1].isupper()
        assert placeholder or (REPO / (module.replace(".", "/") + ".py")).exists(), module
    assert set(re.findall(r"(?:^|`)sdlm ([a-z]+)", text, re.MULTILINE)) <= set(COMMANDS)
    makefile = (REPO / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert not {t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)}


def test_no_machine_specific_path_is_committed() -> None:
    """Documents and code name no absolute path of the machine they were written on."""
    suspicious = re.compile(r"/(?:work|root|home/\w+)/\w")
    files = [p for p in REPO.rglob("*") if p.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh"} and p.is_file()]
    ours = [p for p in files if not {".venv", "runs", ".cache", "build"} & set(p.relative_to(REPO).parts)]
    assert len(ours) > 50
    assert not [p for p in ours if p != Path(__file__) and suspicious.search(p.read_text(errors="ignore"))]
