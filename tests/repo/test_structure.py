"""Size and structure of the code: packages and imports between them, small modules, long functions, unique names."""

import ast
import collections
import io
import itertools
import tokenize
from functools import cache
from pathlib import Path

from helpers import sources

MOST_LINES = 49_500
MOST_PACKAGES, MOST_IMPORTS = 22, 95
MOST_SMALL_MODULES, SMALL = 8, 100
LONGEST_FUNCTION, P95_FUNCTION, LONGEST_FILE = 60, 35, 500
FEWEST_COMMENTS = 0.03
GROWTH = "remove as much as was added, or raise the limit in this file in the same change and say why"


@cache
def imports() -> dict[str, set[str]]:
    """Modules of the project that each module imports, anywhere in its file."""
    names = {f.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): f for f in sources()}
    edges: dict[str, set[str]] = {name: set() for name in names}
    for name, file in names.items():
        for node in ast.walk(sources()[file][1]):
            if isinstance(node, ast.ImportFrom) and node.module:
                package = ".".join(name.split(".")[: -node.level]) + "." if node.level else ""
                module = f"{package}{node.module}"
                candidates = [(f"{module}.{alias.name}", module) for alias in node.names]
            elif isinstance(node, ast.Import):
                candidates = [(alias.name,) for alias in node.names]
            else:
                continue
            for options in candidates:
                edges[name].update(itertools.islice((o for o in options if o in names and o != name), 1))
    return edges


def package_of(module: str) -> str:
    """Folder or module directly below sdlm_megatron that contains a module."""
    return module.split(".")[1]


def lines(file: str) -> int:
    return sources()[file][0].count("\n")


def test_lines_of_code_are_limited() -> None:
    total = sum(map(lines, sources()))
    assert total <= MOST_LINES, f"{total} lines: {GROWTH}"


def test_packages_and_imports_between_them_are_limited() -> None:
    inside = {m for m in imports() if m.startswith("sdlm_megatron.")}
    edges = {(package_of(m), package_of(i)) for m in inside for i in imports()[m] & inside} - {
        (r, r) for r in map(package_of, inside)
    }
    assert len({*map(package_of, inside)}) <= MOST_PACKAGES, GROWTH
    assert len(edges) <= MOST_IMPORTS, f"{len(edges)} imports between packages: {GROWTH}: {sorted(edges)}"


def test_small_modules_with_one_importer_are_few() -> None:
    users = collections.Counter(imported for targets in imports().values() for imported in targets)
    small = [
        m
        for m, count in users.items()
        if count == 1 and (f := m.replace(".", "/") + ".py") in sources() and lines(f) < SMALL
    ]
    assert len(small) <= MOST_SMALL_MODULES, f"{len(small)} small modules: {GROWTH}: {sorted(small)}"


def test_lengths_of_functions_and_files_are_limited() -> None:
    functions = sorted(
        ((node.end_lineno or 0) - node.lineno + 1, f"{file}:{node.name}")
        for file, (_, tree) in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert functions[-1][0] <= LONGEST_FUNCTION, functions[-5:]
    assert functions[int(len(functions) * 0.95)][0] <= P95_FUNCTION
    assert not [f for f in sources() if lines(f) > LONGEST_FILE]


def test_names_of_files_and_classes_are_unique() -> None:
    files = collections.Counter(Path(f).name for f in sources() if Path(f).name != "__init__.py")
    classes = collections.Counter(
        node.name for _, tree in sources().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    )
    assert not [name for counts in (files, classes) for name, count in counts.items() if count > 1]


def test_share_of_comments_is_sufficient() -> None:
    comments = sum(
        token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:"))
        for text, _ in sources().values()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    )
    assert comments >= FEWEST_COMMENTS * sum(map(lines, sources()))


def test_text_files_are_opened_as_utf8() -> None:
    """The default is the encoding of the user's locale, which is ASCII in many batch jobs."""
    found = []
    for file, (_, tree) in sources().items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            mode = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else "r"
            text = isinstance(call.func, ast.Name) and call.func.id == "open" and "b" not in str(mode)
            method = isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")
            # an argument of read_text that is no keyword belongs to importlib.metadata
            if (text or (method and (call.func.attr == "write_text" or not call.args))) and not any(
                keyword.arg == "encoding" for keyword in call.keywords
            ):
                found.append(f"{file}:{call.lineno}")
    assert not [place for place in found if not place.startswith(("dev/", "sdlm_megatron/chat/template.py"))]
