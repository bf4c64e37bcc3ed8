"""Docstrings, comments and messages use plain technical English: a grep for phrases that mark the opposite.

CONTRIBUTING.md ("Writing") has the rule; a phrase that is the right word in its place is listed in ALLOWED.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPO

AREAS = (
    *sorted(p.name for p in (REPO / "sdlm_megatron").iterdir() if (p / "__init__.py").exists()),
    "loose modules",
    "data_prep",
    "checkpoints_tools",
    "dev",
    *(f"tests/{name}" for name in ("unit", "distributed", "parity", "gpu", "slurm", "fixtures")),
)
OPENING = re.compile(r"(What|Which|Where|How|Who)\b")
"""A docstring names its subject first."""
PHRASES = re.compile(
    r"\b(nobody|dear(er|est)|dear|righter|mends?|so many|so long|a word|told|(is|are|was|were) given|nothing is left"
    r"|(the|each|every|no|all|one) found)\b",
    re.IGNORECASE,
)
NAMES = {"found", "one", "given", "said", "sure", "held", "mine", "told", "asked", "dear"}
"""Names of variables, parameters, functions and attributes that say nothing about their value."""
ALLOWED: set[tuple[str, str]] = set()
"""(file name, phrase) where a phrase is the right one."""


def _sources(area: str) -> list[Path]:
    if area == "loose modules":
        return sorted((REPO / "sdlm_megatron").glob("*.py"))
    folder = REPO / area if (REPO / area).is_dir() else REPO / "sdlm_megatron" / area
    helpers = (REPO / "tests").glob("*.py") if area == "tests/unit" else ()
    return sorted(p for p in (*folder.rglob("*.py"), *helpers) if "__pycache__" not in p.parts)


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Docstrings of modules, classes and functions, and those below attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def _texts(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string literal and every comment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that the module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def dialect(path: Path) -> list[str]:
    """Every place in a file that breaks the rule, as `file:line: text`."""
    source = path.read_text()
    tree = ast.parse(source)
    where = path.relative_to(REPO).as_posix()
    places = [
        f"{where}:{doc.lineno}: opens with {doc.value.split()[0]!r}"
        for doc in _docstrings(tree)
        if OPENING.match(str(doc.value).strip())
    ]
    for line, text in _texts(source, tree):
        places += [
            f"{where}:{line}: {match.group()!r} in {text.strip()[:80]!r}"
            for match in PHRASES.finditer(text)
            if (path.name, match.group().lower()) not in ALLOWED
        ]
    places += [f"{where}:{line}: the name {name!r}" for line, name in _names(tree) if name in NAMES]
    return places


@pytest.mark.parametrize("area", AREAS)
def test_plain_english(area: str) -> None:
    sources = _sources(area)
    assert sources, f"no sources in {area}"
    places = [place for path in sources for place in dialect(path)]
    assert not places, f"{len(places)} places:\n" + "\n".join(places)


def test_dialect_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.REPO", tmp_path)
    sample = tmp_path / "sample.py"
    sample.write_text('"""What steps did."""\n\nfound = "a mistake that a retry does not mend"\n')
    assert len(dialect(sample)) == 3
    sample.write_text('"""Per-step metrics."""\n\nlimit = "user error; not retrying"\n')
    assert not dialect(sample)
