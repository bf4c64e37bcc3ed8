"""Files, functions, commands and messages named in the documents exist, and errors name their fix."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from helpers import REPO, sources

from sdlm_megatron.cli import COMMANDS

DOCS = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
MESSAGES = ("operations.md", "data.md")


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
def test_modules_and_names_in_documents_exist(document: Path) -> None:
    """`package.module.name`: the module defines the name, at its top level."""
    names = r"`((?:sdlm_megatron|data_prep|checkpoints_tools|dev)(?:\.\w+)+)"
    for dotted in set(re.findall(names, document.read_text())):
        parts = dotted.split(".")
        depth = max(n for n in range(1, len(parts) + 1) if REPO.joinpath(*parts[:n]).is_dir() or _module(parts[:n]))
        if name := parts[depth : depth + 1]:
            module = sources()[_module(parts[:depth])][1]
            assert name[0] in {getattr(node, "name", "") for node in module.body}, dotted


def _module(parts: list[str]) -> str:
    """The file of a module; "" if there is none."""
    return file if (file := "/".join(parts) + ".py") in sources() else ""


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


def _text(node: ast.expr | None) -> str:
    """Text of a literal, with … in place of its values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…" if node else ""


def _parts(message: str) -> list[str]:
    """Runs of three words of a documented message, and its pieces of more than 7 characters between values."""
    words = message.split()
    runs = [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
    return runs + [part for part in re.split(r"…|[(),:]|\b[A-Z]+\b", message) if len(part.strip()) > 7]


@cache
def _nodes() -> list[ast.AST]:
    """All syntax nodes of the product."""
    return [node for file, (_, tree) in sources().items() if not file.startswith("dev/") for node in ast.walk(tree)]


def test_errors_name_their_fix_or_are_documented() -> None:
    """A UserError has a fix, or docs/operations.md or docs/data.md has its message."""
    errors = {"UserError", "ConfigError", "DataError", "CheckpointError", "TrainingError", "ReplicaError", "NotChosen"}
    errors |= {"UnreadableError"}
    documented = " ".join(" ".join((REPO / "docs" / name).read_text().split()) for name in MESSAGES)
    calls = [n for n in _nodes() if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in errors]
    assert len(calls) > 300
    missing = []
    for call in calls:
        fix = [*call.args[2:3], *(k.value for k in call.keywords if k.arg == "fix")]
        part = max(re.split("…|<|, not", _text(call.args[0])), key=len).strip(" `:") if call.args else ""
        if part and not any(map(_text, fix)) and part not in documented:
            missing.append(part)
    assert not missing


@pytest.mark.parametrize("document", MESSAGES)
def test_documented_messages_exist(document: str) -> None:
    """Some words of each message in the tables' first columns follow each other in a text of the sources."""
    texts = " ".join(_text(node) for node in _nodes() if isinstance(node, ast.JoinedStr | ast.Constant))
    cells = re.findall(r"^\| ([^|]+) \|", (REPO / "docs" / document).read_text(), re.MULTILINE)
    messages = [message for cell in cells for message in re.findall('"([^"]+)"', cell)]
    assert len(messages) > 20
    assert [m for m in messages if not any(part in texts for part in _parts(m))] == []
