"""The one table of what is used where, and docs/speed.md, which shows it."""

import re

import pytest
import torch
from helpers import ROOT

from admin_fairseq.fast.measured import MEASURED, wanted


def test_the_page_shows_the_table():
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    rows = [row for row in rows if len(row) == 5]
    assert {row[0].strip("`"): row[3] == "on" for row in rows} == {
        feature: "cpu" in devices for feature, devices in MEASURED.items()
    }
    on_gpus = any(devices - {"cpu"} for devices in MEASURED.values())
    assert all(row[4].startswith("`all`") for row in rows) == (not on_gpus)


@pytest.mark.parametrize("feature", MEASURED)
def test_modes(feature, monkeypatch):
    cpu, gpu, other = (torch.device(kind) for kind in ("cpu", "cuda", "meta"))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "some GPU")
    assert [wanted(feature, device, "all") for device in (cpu, gpu, other)] == [True, True, False]
    assert not any(wanted(feature, device, "off") for device in (cpu, gpu, other))
    assert wanted(feature, cpu, "measured") == ("cpu" in MEASURED[feature])
    assert not wanted(feature, gpu, "measured")
    monkeypatch.setitem(MEASURED, feature, frozenset({"some GPU"}))
    assert wanted(feature, gpu, "measured")
