"""What is written appears whole or not at all, whoever else writes there; and one training a --save-dir."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT

from admin_fairseq import save_dir
from admin_fairseq.errors import AdminError
from admin_fairseq.files import refuse_output, writing


def write(path, content=b"new"):
    with writing(str(path)) as out:
        out.write(content)


def test_a_file_keeps_its_mode_and_a_new_one_has_that_of_any_new_file(tmp_path):
    old, new, plain = tmp_path / "old", tmp_path / "new", tmp_path / "plain"
    old.write_bytes(b"old")
    old.chmod(0o640)
    plain.touch()
    for path in (old, new):
        write(path)
    assert [path.read_bytes() for path in (old, new)] == [b"new"] * 2
    assert old.stat().st_mode & 0o777 == 0o640
    assert new.stat().st_mode == plain.stat().st_mode


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").write_bytes(b"old")
    for name, target in (("link", "elsewhere/file"), ("ahead", "elsewhere/none")):
        (tmp_path / name).symlink_to(target)
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["ahead", "elsewhere", "link"]
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["file", "none"]


def test_only_a_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    before = sorted(os.listdir(tmp_path))
    for path, fault in (
        ("/dev/null", "not a file"),
        ("pipe", "not a file"),
        ("link", "not a file"),
        ("socket", "not a file"),
        ("folder", "it is a folder"),
        ("no/file", "there is no folder"),
    ):
        with pytest.raises(AdminError, match=f"cannot write .*{path}: .*{fault}"):
            write(tmp_path / path)
        with pytest.raises(AdminError, match=f"cannot write .*{path}: .*{fault}"):
            refuse_output("in.pt", str(tmp_path / path))
    assert sorted(os.listdir(tmp_path)) == before
    assert not os.path.isfile("/dev/null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_write_protected(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(AdminError, match="write-protected"):
        write(tmp_path / "file")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, AdminError, OSError, RuntimeError])
def test_whatever_goes_wrong_the_old_file_stays_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error if not issubclass(error, (OSError, RuntimeError)) else AdminError), writing(
        str(tmp_path / "file")
    ) as out:
        out.write(b"half")
        raise error("no")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_folder_goes_away(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(AdminError, match="cannot write"), writing(str(tmp_path / "folder/file")) as out:
        out.write(b"half")
        (tmp_path / "folder").rename(tmp_path / "other")


def test_many_writers_of_one_path(tmp_path):
    """Each file is of one writer, also while the others write, and none takes away another's."""
    path, torn, done = tmp_path / "file", [], threading.Event()

    def writer(letter):
        for _ in range(30):
            with writing(str(path)) as out:
                for _ in range(20):
                    out.write(letter * 500)

    def reader():
        while not done.is_set():
            if path.exists():
                content = path.read_bytes()
                if content != content[:1] * 10_000:
                    torn.append(content)

    errors = []
    threading.excepthook, hook = lambda args: errors.append(args.exc_value), threading.excepthook
    threads = [threading.Thread(target=writer, args=(bytes([65 + number]),)) for number in range(8)]
    watch = threading.Thread(target=reader)
    for thread in (*threads, watch):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watch.join()
    threading.excepthook = hook
    assert not errors
    assert not torn
    assert os.listdir(tmp_path) == ["file"]


# Both modules need nothing of the package but its errors, whose __init__ takes seconds to import.
ALONE = f"""
import sys, types
sys.modules["admin_fairseq"] = package = types.ModuleType("admin_fairseq")
package.__path__ = [{str(ROOT / "admin_fairseq")!r}]
from admin_fairseq import files, save_dir
"""


def child(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", ALONE + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_a_killed_writer_left_goes_and_a_living_ones_stays(tmp_path):
    code = 'with files.writing(sys.argv[1]) as out: out.write(b"half"); out.flush(); print(0, flush=True); input()'
    writers = [child(code, tmp_path / "file") for _ in range(2)]
    for process in writers:
        process.stdout.readline()
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    assert len(os.listdir(tmp_path)) == 2
    write(tmp_path / "file")
    assert len(os.listdir(tmp_path)) == 2
    writers[1].kill()
    writers[1].wait()
    write(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


# ---- one training a --save-dir -----------------------------------------------------------------------------------

TRAINING = """
save_dir.BEAT, save_dir.PATIENCE = 0.1, 0.4
release = save_dir.claim(sys.argv[1])
print("at work", flush=True)
input()
"""


@pytest.fixture
def training(tmp_path):
    process = child(TRAINING, tmp_path)
    assert process.stdout.readline() == "at work\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_training_is_refused_until_the_first_was_killed(tmp_path, training):
    with pytest.raises(AdminError, match=rf"another training is at work in .*process {training.pid} on .*--save-dir"):
        save_dir.claim(str(tmp_path))
    training.kill()
    training.wait()
    assert os.listdir(tmp_path) == [save_dir.MARK]
    release = save_dir.claim(str(tmp_path))
    save_dir.claim(str(tmp_path))()  # another model in this process
    assert json.loads((tmp_path / save_dir.MARK).read_text())["pid"] == os.getpid()
    release()
    assert not os.listdir(tmp_path)


@pytest.fixture
def elsewhere(monkeypatch):
    """This process as one on another machine, whose locks do not reach here."""
    monkeypatch.setattr(save_dir, "BEAT", 0.1)
    monkeypatch.setattr(save_dir, "PATIENCE", 0.4)
    monkeypatch.setattr(save_dir, "_machine", lambda: "elsewhere 1")
    monkeypatch.setattr(save_dir.fcntl, "lockf", lambda *_: None)


def test_another_machine_sees_whether_the_mark_moves(tmp_path, training, elsewhere):
    with pytest.raises(AdminError, match=rf"process {training.pid} on {socket.gethostname()}"):
        save_dir.claim(str(tmp_path))
    training.kill()
    training.wait()
    started = time.time()
    save_dir.claim(str(tmp_path))()
    assert time.time() - started < 2
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b"[" * 200_000])
def test_a_mark_that_says_nothing_is_no_obstacle(tmp_path, elsewhere, content):
    (tmp_path / save_dir.MARK).write_bytes(content)
    save_dir.claim(str(tmp_path))()
    assert not os.listdir(tmp_path)


def test_a_mark_that_is_a_link_or_a_pipe_is_left_alone(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    (folder / save_dir.MARK).symlink_to(victim)
    with pytest.raises(AdminError, match="cannot write to"):
        save_dir.claim(str(folder))
    assert victim.read_text() == "precious"
    (folder / save_dir.MARK).unlink()
    os.mkfifo(folder / save_dir.MARK)
    with pytest.raises(AdminError, match="no regular file"):
        save_dir.claim(str(folder))


def test_a_file_system_without_locks(tmp_path, training, elsewhere, monkeypatch):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(save_dir.fcntl, "lockf", lockf)
    with pytest.raises(AdminError, match="another training is at work"):
        save_dir.claim(str(tmp_path))


def test_no_folder_no_mark(tmp_path):
    save_dir.claim(str(tmp_path / "none"))()
    assert not Path(tmp_path / "none").exists()
