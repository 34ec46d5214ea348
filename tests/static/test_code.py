"""The library: small files, short functions, documented and typed, each function in one place."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from utils.experiments.run import REPO

LIBRARY = sorted((REPO / "utils").rglob("*.py"))
TESTS = sorted((REPO / "tests").rglob("*.py"))
NAMES = ("README.md", "Makefile", "requirements.txt", "requirements-lock.txt", ".ci/run")
PLAIN = [REPO / name for name in NAMES]
# Written in pieces, so that this file does not hold what it forbids.
FORBIDDEN = [
    re.escape("../" + "shared"),
    r"(?<![\w.:-])/(?:" + "work|root|home" + r")/\w",
    *(re.escape(".".join(host)) for host in (("pypi", "org"), ("pythonhosted", "org"))),
    re.escape(".".join(("download", "pytorch", "org"))),
]

Function = ast.FunctionDef | ast.AsyncFunctionDef
each_library_file = pytest.mark.parametrize(
    "path", LIBRARY, ids=lambda path: path.relative_to(REPO).as_posix()
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def public(path: Path) -> Iterator[tuple[str, Function | ast.ClassDef, bool]]:
    """Yield the dotted name, the node and whether it is a method, of all that has no underscore."""
    for node in tree_of(path).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, False
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, Function) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner, True


def unannotated(node: Function, method: bool) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    arguments = arguments[1:] if method and not static else arguments
    arguments += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    missing = [argument.arg for argument in arguments if argument.annotation is None]
    return missing + (["return"] if node.returns is None else [])


@each_library_file
def test_file_has_at_most_400_lines(path: Path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, "split it: one job per file"


@each_library_file
def test_functions_have_at_most_60_lines(path: Path):
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, Function)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > 60}


@each_library_file
def test_public_names_are_documented_and_typed(path: Path):
    assert ast.get_docstring(tree_of(path)), "the file says nothing about itself"
    undocumented = [name for name, node, _ in public(path) if not ast.get_docstring(node)]
    assert not undocumented
    untyped = {
        name: unannotated(node, method)
        for name, node, method in public(path)
        if isinstance(node, Function) and unannotated(node, method)
    }
    assert not untyped


def test_a_function_lives_in_one_place():
    names = Counter(name for path in LIBRARY for name, _, method in public(path) if not method)
    names.pop("main")  # each command line has one
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("path", [*LIBRARY, *TESTS], ids=lambda path: path.stem)
def test_no_remote_code_is_trusted(path: Path):
    keywords = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.keyword)]
    trusting = [node for node in keywords if node.arg == "trust_remote_code"]
    assert all(isinstance(n.value, ast.Constant) and n.value.value is False for n in trusting)


@pytest.mark.parametrize(
    "path", [*LIBRARY, *TESTS, *PLAIN], ids=lambda path: path.relative_to(REPO).as_posix()
)
def test_the_text_depends_on_no_machine(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not [hit.group() for word in FORBIDDEN for hit in re.finditer(word, text)]
