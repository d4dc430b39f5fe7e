"""The package is a ladder: a layer imports only the layers below it, and no file outgrows a sitting."""

import ast
from pathlib import Path

import pytest
import torch

import sharpness

ROOT = Path(sharpness.__file__).parent
MAX_LINES = 400

BASE = {"errors", "results", "_record", "_checks", "_progress", "_version", "_warn", "_write"}
ALLOWED = {
    "errors": set(),
    "_version": set(),
    "_checks": {"errors"},
    "_warn": {"errors"},
    "_progress": {"_checks"},
    "_record": {"errors"},
    "_write": {"errors", "_checks"},
    "results": {"errors", "_checks", "_record", "_write"},
    "datasets": {"_checks"},
    "linalg": BASE,
    "objective": BASE,  # a sibling of linalg: neither sees the other
    "operators": BASE | {"linalg", "objective"},
    "metrics": BASE | {"linalg", "objective", "operators"},
    "plotting": {"results", "errors", "_checks"},
    "comparison": BASE | {"metrics", "objective"},
    "demo": BASE | {"comparison", "datasets"},
    "cli": BASE | {"demo", "comparison", "metrics", "objective", "datasets"},
    "__main__": {"cli"},
}
DEFERRED = {("results", "plotting")}  # Result.plot() reaches up for its picture


def imports(path):
    """Yield (layer, line, deferred) for each import of our own package."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: use absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "sharpness" and rest:
                yield rest[0], node.lineno, id(node) not in top


def layer_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def wrong_arrows():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        layer = layer_of(path)
        if layer == "__init__":
            continue
        for target, line, deferred in imports(path):
            if deferred and (layer, target) in DEFERRED:
                continue
            if deferred or target not in ALLOWED[layer] | {layer}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} -> {target}")
    return wrong


def test_imports_point_one_way():
    assert wrong_arrows() == []


def private_parts(path):
    """Return the private names that a file defines, and those it uses: name, line, and layer where that is plain."""
    tree = ast.parse(path.read_text())
    own, used = set(), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sharpness."):
            used += [
                (alias.name, node.lineno, layer_of(ROOT / Path(*node.module.split(".")[1:]))) for alias in node.names
            ]
        elif isinstance(node, ast.Attribute):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            own.add(node.attr) if mine else used.append((node.attr, node.lineno, None))
    hidden = {name for name in own if name.startswith("_") and not name.startswith("__")}
    return hidden, [use for use in used if use[0].startswith("_") and not use[0].startswith("__")]


def test_no_layer_reaches_into_the_private_parts_of_another():
    files = {path: private_parts(path) for path in ROOT.rglob("*.py")}
    own = {}
    for path, (hidden, _) in files.items():
        own.setdefault(layer_of(path), set()).update(hidden)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, (_, used) in files.items()
        for name, line, origin in used
        if not hasattr(torch.Tensor, name)
        and (
            origin not in (None, layer_of(path))
            or (name not in own[layer_of(path)] and any(name in names for names in own.values()))
        )
    ]
    assert wrong == []


def test_every_layer_is_in_the_table():
    layers = {layer_of(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert layers == set(ALLOWED)


def test_no_file_outgrows_a_sitting():
    lines = {str(path): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize("name", ["utils", "common", "helpers", "misc", "base"])
def test_there_are_no_drawers(name):
    assert not list(ROOT.rglob(f"{name}.py"))


def test_every_public_function_class_and_method_says_what_it_does():
    def public(nodes):
        kinds = (ast.FunctionDef, ast.ClassDef)
        return [node for node in nodes if isinstance(node, kinds) and not node.name.startswith("_")]

    missing = []
    for path in ROOT.rglob("*.py"):
        for node in public(ast.parse(path.read_text()).body):
            inner = public(node.body) if isinstance(node, ast.ClassDef) else []
            missing += [f"{path.name}:{n.name}" for n in (node, *inner) if not ast.get_docstring(n)]
    assert missing == []
