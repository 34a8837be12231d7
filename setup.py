import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent

setup(
    name="admin_fairseq",
    version=re.search(r'__version__ = "(.+)"', (here / "admin_fairseq/__init__.py").read_text())[1],
    description="Admin for fairseq: Transformers too deep for anyone else's recipe",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["admin_fairseq"],
    python_requires=">=3.8",
    install_requires=["torch>=1.12", "numpy", "tqdm>=4.58", "sacrebleu", "sacremoses", "subword-nmt"],
    extras_require={
        # Never a hard requirement: PyPI's fairseq, fairseq-fixed and a git checkout all provide the module
        # "fairseq", and installing one over another breaks both.
        "fairseq": ["fairseq-fixed==0.12.3.1"],
        "demo": ["matplotlib"],
        "test": ["pytest", "ruff"],
    },
    entry_points={"console_scripts": ["admin-fairseq = admin_fairseq.cli:main"]},
)
