import os
import subprocess
import sys

import pytest
from helpers import ROOT

from admin_fairseq.errors import AdminError, explain, install_excepthook, is_running


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


def called_from(file, function):
    """What a function raises or returns when it is called from another file."""
    names = {"function": function}
    exec(compile("def call(): return function()", file, "exec"), names)
    try:
        return names["call"]()
    except AdminError as error:
        return error


def test_only_commands_lose_their_tracebacks(monkeypatch, capsys):
    """In a command only its own errors do."""
    assert called_from("/somewhere/fairseq_cli/train.py", lambda: is_running("fairseq_cli"))
    assert not called_from("/somewhere/fairseq_cli.py", lambda: is_running("fairseq_cli"))
    kept = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: kept.append(error))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    install_excepthook("fairseq_cli")

    def refuse():
        raise AdminError("what is wrong")

    theirs, own = called_from("/x/fairseq_cli/train.py", refuse), called_from("/x/notebook.py", refuse)
    for error in (theirs, own):
        sys.excepthook(type(error), error, error.__traceback__)
    assert kept == [own]
    assert capsys.readouterr().err == "admin_fairseq: error: what is wrong\n"


def test_importing_the_plugin_leaves_everybodys_tracebacks():
    script = "import sys, admin_fairseq; sys.exit(sys.excepthook is not sys.__excepthook__)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", [["-m", "admin_fairseq", "show", "x"], ["-c", "import admin_fairseq"]])
def test_without_fairseq_the_plugin_says_what_to_install(tmp_path, command):
    (tmp_path / "fairseq.py").write_text("raise ImportError('none here')")
    environment = dict(os.environ, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    finished = subprocess.run([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 1
    if command[0] == "-c":  # a script's own matter
        assert finished.stderr.splitlines()[-1].startswith("ImportError: admin_fairseq needs fairseq 0.12")
        return
    assert finished.stderr.startswith("admin_fairseq: error: admin_fairseq needs fairseq 0.12")
    assert len(finished.stderr.splitlines()) == 1


def test_installing_with_a_setuptools_that_would_install_nothing():
    """One before 61 does not read pyproject.toml, and makes an empty package called UNKNOWN."""
    script = "import runpy, setuptools; setuptools.__version__ = '56.0.0'; runpy.run_path('setup.py')"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 1
    assert "needs setuptools 61" in finished.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("python", "needle"),
    [((3, 7, 17), "needs Python 3.8 or newer"), ((3, 11, 0), "pip install fairseq-fixed==0.12.3.1")],
)
def test_installing_where_it_cannot_work_says_what_to_install(tmp_path, python, needle):
    """setup.py as pip runs it, in an environment with PyPI's fairseq 0.12.2."""
    metadata = tmp_path / "fairseq-0.12.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fairseq\nVersion: 0.12.2\n")
    script = (
        "import runpy, setuptools, sys, sysconfig\n"  # while sys.version_info still is true
        f"sys.argv, sys.version_info = ['setup.py', '--version'], {python}\n"
        f"sysconfig.get_path = lambda name: {str(tmp_path)!r}\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert finished.returncode == 1
    assert needle in finished.stderr.splitlines()[-1]
