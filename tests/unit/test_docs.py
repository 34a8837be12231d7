"""README and docs/: links and anchors resolve, every page is found from the index, files that are named are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS, *sorted((ROOT / "examples").rglob("*.md"))]
PAGES += sorted((ROOT / "benchmarks").rglob("*.md"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"^ {4,}.*$", "", text, flags=re.M)


def links(page: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of every link and picture that stays in the repository."""
    targets = re.findall(r"\]\(([^()\s]+)\)", prose(page))
    split = [target.partition("#") for target in targets if not re.match(r"[a-z]+:", target)]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in split]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.M)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    for path, anchor in links(page):
        assert path.exists(), f"{name(page)} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(path), f"{name(page)} links to #{anchor}, which {name(path)} has not"


def test_every_page_is_reachable_from_the_index():
    reached, waiting = set(), [ROOT / "docs/index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [path for path, _ in links(page)]
    assert set(DOCS) <= reached
    assert ROOT / "docs/index.md" in [path for path, _ in links(ROOT / "README.md")]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_files_in_the_map_exist_and_no_module_is_left_out():
    """docs/code.md: `folder/a.py`, `b.py` in one cell are of the same folder."""
    named = set()
    for cell in re.findall(r"^\| (.*?) \|", (ROOT / "docs/code.md").read_text(encoding="utf-8"), re.M):
        folder = ROOT
        for path in re.findall(r"`([\w/.]+)`", cell):
            found = ROOT / path if "/" in path else folder / path
            assert found.exists(), path
            folder = found.parent
            named.add(found)
    package = ROOT / "admin_fairseq"
    modules = {path for path in package.rglob("*.py") if not path.name.startswith("__")}
    missing = {path for path in modules if not named & {path, *path.parents}}
    assert not missing, f"docs/code.md leaves out {sorted(map(name, missing))}"


def test_the_same_ruff_everywhere():
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()
