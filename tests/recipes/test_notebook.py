"""examples/notebook: its cells, from top to bottom, as Jupyter runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

NOTEBOOK = ROOT / "examples/notebook/admin.ipynb"
# what Jupyter does with a cell: Python runs here, a line with ! in a shell, and plt.show() draws
RUN = """
import json, os, subprocess, sys
import matplotlib
matplotlib.use("Agg")
shell = ["bash", "-o", "pipefail", "-c"]
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "code" and text.startswith("!"):
        for command in text[1:].split("\\n!"):
            subprocess.run([*shell, command], check=True)
    elif cell["cell_type"] == "code":
        exec(compile(text, cell["id"], "exec"), globals())
"""


def test_it_is_kept_without_outputs():
    """Which would name places of the machine that it last ran on."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)


def test_from_a_profile_to_a_folded_translator(tmp_path: Path):
    """On a copy of the repository's folders that it reads, so that what it writes to demo/ stays there."""
    pytest.importorskip("matplotlib")
    for name in ("admin_fairseq", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "done training" in done.stdout
    assert float(re.search(r"BLEU = ([\d.]+)", done.stdout)[1]) > 40  # 81 when it was written
    assert "TransformerModel: 50 of 50 translations are the same" in done.stdout
    for name in ("profile/admin_profile.json", "run/checkpoint_last.pt", "run/folded.pt"):
        assert (tmp_path / "demo/notebook" / name).is_file()
