"""The shared look of all figures, for print and for colour-blind readers, and where results go."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Any, Sequence

from admin_fairseq.errors import AdminError
from admin_fairseq.files import as_csv, json_text, writing

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")  # Okabe-Ito, without yellow
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))  # lines that share a colour differ in dashes
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = {"color": "grey", "linewidth": 1, "linestyle": DASHES[1]}
LOOK = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "admin_fairseq",  # the same figure is the same file
}


def pyplot() -> Any:
    """matplotlib.pyplot in the shared look, for files only.

    Raises:
        AdminError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise AdminError("drawing needs matplotlib: pip install 'admin_fairseq[analyze]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(LOOK)
    return pyplot


def style(number: int) -> dict[str, Any]:
    """Colour and dashes of the line with this number, as arguments of ``plot``."""
    n = len(COLOURS)
    return {"color": COLOURS[number % n], "linestyle": DASHES[(number % n + number // n) % len(DASHES)]}


@dataclass
class Page:
    """An analysis as a reader sees it, in the report.

    ``text`` holds paragraphs: what was measured, in which unit, and what the figures say. ``figures`` holds
    (suffix of the file's name, matplotlib figure, caption), ``tables`` (caption, rows of cells, the first the heads).
    """

    title: str
    text: list[str] = field(default_factory=list)
    figures: list[tuple[str, Any, str]] = field(default_factory=list)
    tables: list[tuple[str, list[list[str]]]] = field(default_factory=list)


def write(
    out: str, name: str, data: dict[str, Any], rows: Sequence[dict[str, Any]], page: Page, kind: str = "svg"
) -> None:
    """Write ``<name>.json`` (``data``, and the page's words), ``<name>.csv`` (``rows``) and ``<name><suffix>.<kind>``.

    Each file appears whole or not at all, the JSON file last.

    Raises:
        AdminError: a file cannot be written.
    """
    make_folder(out)
    figures = []
    for suffix, figure, caption in page.figures:
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
        pyplot().close(figure)
        figures.append({"file": f"{name}{suffix}.{kind}", "caption": caption})
        _write(out, figures[-1]["file"], drawn.getvalue())
    _write(out, f"{name}.csv", as_csv(rows).encode())
    tables = [{"caption": caption, "rows": cells} for caption, cells in page.tables]
    words = {"title": page.title, "text": page.text, "figures": figures, "tables": tables}
    _write(out, f"{name}.json", json_text({**data, "page": words}).encode())
    print(f"{out}: {', '.join([f'{name}.json', f'{name}.csv', *(figure['file'] for figure in figures)])}")


def make_folder(out: str) -> None:
    """Raises:
    AdminError: it cannot be made.
    """
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise AdminError(f"cannot write to {out}: {error.strerror}") from error


def _write(out: str, name: str, content: bytes) -> None:
    with writing(os.path.join(out, name)) as file:
        file.write(content)
