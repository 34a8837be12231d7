"""What `make` installs is locked to the last package, and each has its reason in docs/dependencies.md."""

from __future__ import annotations

import re

from helpers import ROOT


def locked() -> dict[str, set[str]]:
    """Versions by package, of all lock files; each entry has hashes."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.glob("requirements*.lock")):
        for entry in re.findall(r"^[^\s#].*\n(?:\s+.*\n)*", path.read_text(encoding="utf-8"), re.M):
            name, version = re.match(r"([\w.-]+)==(\S+) ", entry).groups()
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), name
            found.setdefault(name, set()).add(version)
    return found


def test_locks_hold_what_is_asked_for():
    versions = locked()
    assert len(versions) > 80
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = [re.split(r"([=<>]+)", line.split(";")[0].split(" ")[0]) for line in lines if line and line[0] != "#"]
    for name, *pin in asked:
        assert name in versions, f"{name}: run .ci/lock"
        assert pin[:1] != ["=="] or versions[name] == {pin[1]}, f"{name}: run .ci/lock"


def test_every_package_has_its_reason():
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\S+) \| (\S.*?) \| (?:\w|`).* \|$", page, re.M))
    fairseq = (ROOT / "requirements-fairseq.txt").read_text(encoding="utf-8")
    assert f"fairseq-fixed=={rows.pop('fairseq-fixed')} " in fairseq
    rows.pop("package")
    assert {name: set(versions.split(" or ")) for name, versions in rows.items()} == locked()


def test_make_installs_nothing_else():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--no-deps --no-build-isolation --require-hashes -r" in makefile
    installs = [line for line in makefile.splitlines() if re.search(r"\$\((PIP|LOCKED)\)", line) and ":=" not in line]
    ours = r"\$\(LOCKED\) requirements\S*|--no-deps --no-build-isolation --editable \."
    assert len(installs) == 5
    assert all(re.search(ours, line) for line in installs), installs
