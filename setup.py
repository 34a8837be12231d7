import re
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

if sys.version_info < (3, 8):  # noqa: UP036  (pip comes here before it looks at python_requires)
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

here = Path(__file__).parent

setup(
    name="admin_fairseq",
    version=re.search(r'__version__ = "(.+)"', (here / "admin_fairseq/__init__.py").read_text())[1],
    description="Admin for fairseq: Transformers too deep for anyone else's recipe",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["admin_fairseq", "admin_fairseq.analysis"],
    python_requires=">=3.8",
    install_requires=["torch>=1.12", "numpy", "tqdm>=4.58", "sacrebleu", "sacremoses", "subword-nmt"],
    extras_require={
        # Never a hard requirement: PyPI's fairseq, fairseq-fixed and a git checkout all provide the module
        # "fairseq", and installing one over another breaks both.
        "fairseq": [
            "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
            "fairseq==0.12.2; python_version < '3.11'",
        ],
        "analyze": ["matplotlib"],
        "demo": ["matplotlib"],
        "deploy": ["ctranslate2>=4", "starlette", "uvicorn"],
        "test": ["pytest", "pytest-xdist", "ruff", "tensorboard", "triton>=3; platform_system == 'Linux'"],
    },
    entry_points={"console_scripts": ["admin-fairseq = admin_fairseq.cli:main"]},
)
