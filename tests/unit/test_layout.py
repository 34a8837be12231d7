"""Which file of the package imports which: one way and without circles. Imports inside functions count as well."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import ROOT

# Files and folders, from the ground up: each imports from the rows above its own, and a folder's files from each other.
LAYERS = [
    "errors weights arguments",
    "config files save_dir",
    "norm",
    "omega family",
    "rules",
    "architectures",
    "fast optim norms_in_front",
    "model methods two_streams",
    "profile_file turns",
    "profiling",
    "start metrics watch checkpoints old_numpy listing",
    "hints",
    "hooks",
    "plugin",
    "__init__",  # the public face
    "analysis",
    "commands",
    "cli",
    "__main__",
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names.split()}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(path): path for path in sorted((ROOT / "admin_fairseq").rglob("*.py"))}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(module: str) -> set[str]:
    """What a file of the package imports of the package, by the files that the names are in."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = module.split(".")
            if node.level:
                start = start[: len(start) - node.level + (FILES[module].name == "__init__.py")]
            base = ".".join([*(start if node.level else []), *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return (found & FILES.keys()) - {module}


IMPORTS = {module: imports(module) for module in FILES}


def test_every_file_has_a_layer():
    assert {layer(module) for module in FILES} == set(ROW)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    wrong = {
        other for other in IMPORTS[module] if layer(other) != layer(module) and ROW[layer(other)] >= ROW[layer(module)]
    }
    assert not wrong


def reached(module: str) -> set[str]:
    found, ahead = set(), [module]
    while ahead:
        new = IMPORTS[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def test_no_circles():
    """Nor within a folder."""
    assert not {module for module in FILES if module in reached(module)}


def test_the_equation_stands_alone():
    assert not IMPORTS["admin_fairseq.norm"]


def test_who_knows_of_the_fast_computations():
    """What goes without them is written without them; and they are beside a model, which they never import."""
    users = {layer(module) for module, others in IMPORTS.items() if "fast" in map(layer, others)}
    assert users - {"fast"} <= {"model", "start", "hooks"}
    assert not any(layer(other) == "model" for m in FILES if layer(m) == "fast" for other in IMPORTS[m])
