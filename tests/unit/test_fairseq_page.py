"""docs/fairseq.md, a row an assumption: what it names is there, and so is the test that guards it."""

import ast
import importlib
import inspect
import re

import pytest
from helpers import ROOT

PAGE = (ROOT / "docs/fairseq.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| `")]
TESTS = {
    f"{path.name}::{node.name}"
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}
ERRORS = (ROOT / "admin_fairseq/errors.py").read_text(encoding="utf-8")


def resolve(name):
    """A module, or what is in one; pkgutil.resolve_name is of Python 3.9."""
    try:
        return importlib.import_module(name)
    except ImportError:
        parent, last = name.rsplit(".", 1)
        return getattr(resolve(parent), last)


@pytest.mark.parametrize("row", [row for row in ROWS if row[0].startswith("`fairseq.")], ids=lambda row: row[0])
def test_what_is_relied_on_is_there(row):
    resolve(row[0].strip("`"))


@pytest.mark.parametrize("row", [row for row in ROWS if not row[0].startswith("`fairseq.")], ids=lambda row: row[0])
def test_texts_are_what_fairseq_raises_and_what_is_looked_for(row):
    text = re.match(r"`(.+?)`(?: |$)", row[0])[1]
    assert text in ERRORS
    module = re.fullmatch(r"`([\w.]+)`", row[1])
    # an AttributeError's text is Python's, about a name in the module
    named = re.search(r"no attribute '(\w+)'", text)
    if module:
        assert (f".{named[1]}" if named else text) in inspect.getsource(importlib.import_module(module[1]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_is_guarded(row):
    assert row[-1].strip("`") in TESTS


def test_every_patch_is_listed():
    hooks = (ROOT / "admin_fairseq/hooks.py").read_text(encoding="utf-8")
    patched = re.findall(r"_wrap\(\w+, \"(\w+)\"", hooks)
    assert patched
    section = PAGE.split("\n## ")[1]
    for name in patched:
        assert f".{name}`" in section
