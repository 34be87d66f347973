"""Imports form no circles, files and folders are small, and docstrings are no fragments."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("stu", "train", "serve")
FILES = [
    path for package in (*PACKAGES, "benchmarks") for path in sorted((ROOT / package).rglob("*.py"))
]
FOLDERS = sorted({path.parent for path in FILES})
FRAGMENTS = ("Of ", "What ", "To be ", "And ")


def relative(path):
    return str(path.relative_to(ROOT))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree):
    """Yield the modules that a file imports anywhere, except for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not is_for_types(node):
            yield from imports(node)


@functools.cache
def graph():
    """Return each module of the packages with the ones that it imports."""
    found = {}
    paths = {module_of(path): path for path in FILES}
    for module, path in paths.items():
        names = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
        names = {name if name in paths else name.rpartition(".")[0] for name in names}
        found[module] = {name for name in names if name in paths and name != module}
    return found


def test_imports_of_files_have_no_circle():
    TopologicalSorter(graph()).prepare()


def test_imports_of_folders_have_no_circle():
    """Each folder of a package is one node, and so is each file at its top."""

    def place(module):
        path = ROOT.joinpath(*module.split("."))
        parts = module.split(".")
        if path.is_dir() or len(parts) <= 2:
            return module
        return ".".join(parts[:-1])

    places = {}
    for module, names in graph().items():
        found = places.setdefault(place(module), set())
        found |= {place(name) for name in names} - {place(module)}
    TopologicalSorter(places).prepare()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_neither_long_nor_tiny(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= 300
    assert num_lines >= 30 or path.name in ("__init__.py", "__main__.py")


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_folders_are_small(folder):
    assert len(list(folder.glob("*.py"))) <= 20


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_prose(path):
    """No docstring begins like an answer, and no name is `its`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str) and text.lstrip().startswith(FRAGMENTS):
                found.append(f"{node.lineno}: {text.strip()[:40]}")
        name = getattr(node, "id", getattr(node, "arg", None))
        if isinstance(node, ast.Name | ast.arg) and name.split("_")[0] == "its":
            found.append(f"{node.lineno}: {name}")
    assert found == []
