import os
import subprocess
import sys

from conftest import ROOT

from admin_fairseq.errors import AdminError, explain


def test_a_bug_keeps_its_traceback():
    assert explain(ValueError("some bug")) is None
    assert explain(IndexError("list index out of range")) is None
    try:
        os.stat("/does/not/exist")
    except FileNotFoundError as error:  # raised by a user's own script, not by fairseq
        assert explain(error) is None


def test_an_error_is_found_behind_the_one_fairseq_raises():
    try:
        try:
            raise AdminError("what is wrong")
        except AdminError:
            raise Exception("Cannot load model parameters")  # noqa: B904  (as fairseq does)
    except Exception as error:
        assert explain(error) == "what is wrong"


def test_an_error_is_found_in_a_spawned_process():
    parent = "Process 1 terminated\n  File x\nadmin_fairseq.errors.AdminError: what is wrong\n"
    assert explain(Exception(parent)) == "what is wrong"


def test_without_fairseq_the_plugin_says_what_to_install(tmp_path):
    (tmp_path / "fairseq.py").write_text("raise ImportError('none here')")
    environment = dict(os.environ, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    command = [sys.executable, "-c", "import admin_fairseq"]
    finished = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 1
    assert finished.stderr.startswith("admin_fairseq: error: admin_fairseq needs fairseq 0.12")
    assert len(finished.stderr.splitlines()) == 1
