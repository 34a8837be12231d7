"""A full disk and one that is read-only: one line, what was there stays, and nothing else is left."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from at_work import Command, commands, start

from admin_fairseq.errors import AdminError
from admin_fairseq.files import writing


@pytest.fixture
def disk(tmp_path):
    """disk(options, folder) mounts a file system in memory, or again with other options."""
    mounted = []

    def disk(options, folder=tmp_path / "disk"):
        folder.mkdir(exist_ok=True)
        again = "remount," if folder in mounted else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", again + options, "none", folder], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"no file system may be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield disk
    for folder in set(mounted):
        subprocess.run(["umount", folder], check=True)


def test_a_full_and_a_read_only_disk(data, inputs, tmp_path, disk):
    folder, log = disk("size=100k"), tmp_path / "log"
    for number, (options, fault) in enumerate((("size=100k", "No space left on device"), ("ro", "write-protected"))):
        for name in commands(data, inputs, folder):
            disk("size=100k,rw")
            (folder / "fill").write_bytes(bytes(92 * 1024))
            for old in ("out.pt", "admin_profile.json"):
                (folder / old).write_bytes(b"old")
            disk(options)
            assert Command([name, *commands(data, inputs, folder)[name]], log).end() == 1, log.read_text()
            printed = log.read_text()
            (line,) = [line for line in printed.splitlines() if line.startswith("admin_fairseq: error:")]
            assert fault in line or (number and "Read-only" in line), printed
            assert "Traceback" not in printed
            assert sorted(os.listdir(folder)) == ["admin_profile.json", "fill", "out.pt"]
            assert (folder / "out.pt").read_bytes() == (folder / "admin_profile.json").read_bytes() == b"old"


def test_a_disk_that_fills_up_in_the_middle_of_a_file(disk):
    folder = disk("size=64k")
    with pytest.raises(AdminError, match=r"cannot write .*: No space left on device"), writing(f"{folder}/file") as out:
        for _ in range(100):
            out.write(bytes(1024))
    assert not os.listdir(folder)


@pytest.mark.parametrize(("step", "full", "enough"), [("prepare", "48k", "4m"), ("evaluate", "24k", "4m")])
def test_a_recipe_goes_on_once_there_is_room(whole, tmp_path, disk, step, full, enough):
    made, _ = whole
    shutil.copytree(made, tmp_path / "copy")
    folder = tmp_path / "copy" / {"prepare": "data", "evaluate": "run/test"}[step]
    shutil.rmtree(folder)
    disk(f"size={full}", folder)
    assert start(step, tmp_path / "copy").wait(600) == 1
    printed = (tmp_path / "copy" / f"{step}.log").read_text()
    assert "No space left on device" in printed
    assert "Run the same command again to go on from here" in printed.splitlines()[-1]
    assert not list(folder.rglob("*.tmp"))
    disk(f"size={enough}", folder)
    assert start(step, tmp_path / "copy").wait(600) == 0, (tmp_path / "copy" / f"{step}.log").read_text()
    for path in (made / folder.relative_to(tmp_path / "copy")).iterdir():
        if path.suffix in (".bin", ".idx", ".txt") or path.name == "scores.json":
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
