import re
import sys
import sysconfig

from setuptools import __version__ as setuptools_version
from setuptools import setup

if sys.version_info < (3, 8):  # noqa: UP036  (pip comes here before it looks at requires-python)
    sys.exit("admin_fairseq needs Python 3.8 or newer: install it with, for example, python3.11 -m pip")
if sys.version_info >= (3, 11):
    from importlib.metadata import distributions

    # pip builds in isolation, but with the interpreter whose packages ours will join
    for installed in distributions(path=[sysconfig.get_path("purelib")]):
        version = tuple(int(part) for part in re.findall(r"\d+", installed.version)[:3])
        if installed.metadata["Name"] == "fairseq" and version <= (0, 12, 2):
            sys.exit(
                f"fairseq {installed.version} does not work on Python 3.11 and newer:"
                " pip uninstall fairseq, pip install fairseq-fixed==0.12.3.1, then install admin_fairseq again"
            )

if int(setuptools_version.split(".")[0]) < 61:  # it would install an empty package called UNKNOWN, and say so to nobody
    sys.exit("admin_fairseq needs setuptools 61 or newer: pip install -U setuptools, or drop --no-build-isolation")

setup()  # everything else is in pyproject.toml
