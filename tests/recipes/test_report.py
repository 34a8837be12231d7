"""analyze's report.html in a browser: on a phone, at a desk, and in the dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from admin_fairseq.analysis import report
from admin_fairseq.analysis.figures import Page, pyplot, write

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_scrolls_sideways_but_figures_and_tables(browser, tmp_path: Path, width: int):
    figure, _ = pyplot().subplots(1, 3, figsize=(9, 3))
    table = ("a wide one", [[f"column {number}" for number in range(20)]] * 3)
    shares = {"encoder": {"share": [0.3] * 36}}
    models = [{"method": "postln 18-18", "when": "at initialisation", "stacks": shares}]
    write(str(tmp_path), "dependency", {"models": models}, [], Page("x", ["words"], [("", figure, "y")], [table]))
    facts = {"Command": f"admin-fairseq {'x' * 300} --seed 1", "Data": "/" + "y" * 300}
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark")
    page.goto(Path(report.bind(str(tmp_path), None, facts)).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.get_by_text("postln 18\N{NON-BREAKING HYPHEN}18 shows signs").is_visible()
    image = page.locator("img")
    assert image.bounding_box()["width"] >= 500  # letters of a figure stay large enough to be read
    assert image.evaluate("each => getComputedStyle(each).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(255, 255, 255)"
    head = page.get_by_role("rowheader", name="Command")
    assert head.bounding_box()["height"] < 800 and head.bounding_box()["width"] > 60  # its letters side by side
