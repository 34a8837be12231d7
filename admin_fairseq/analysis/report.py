"""One HTML file with everything that the analyses left in a folder: words, figures and tables, and nothing to fetch."""

from __future__ import annotations

import argparse
import base64
import html
import importlib
import json
import os
import sys
from typing import Any

from admin_fairseq.analysis.figures import make_folder
from admin_fairseq.analysis.subject import has_data
from admin_fairseq.errors import DATA_HINT, AdminError
from admin_fairseq.files import writing

ORDER = ("dependency", "amplification", "gradients", "omega")
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; color: #111; }
p { max-width: 45rem; }
img { max-width: 100%; }
figure { margin: 1.5rem 0; }
figcaption, caption { color: #444; font-size: 0.9rem; text-align: left; padding: 0.3rem 0; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid #ccc; vertical-align: top; }
@media print { figure, table { break-inside: avoid; } }
"""


def main(args: argparse.Namespace) -> None:
    """``admin-fairseq analyze report``: run each analysis into DIR, then bind what they wrote.

    An analysis that refuses these models, or fails, has its reason on the page.

    Raises:
        AdminError: DATA is missing, or all of them refuse.
    """
    if not has_data(args.rest):
        raise AdminError(f"give DATA, as the first argument ({DATA_HINT})")
    refused: dict[str, str] = {}
    failure: Exception | None = None
    for name in ORDER:
        try:
            importlib.import_module(f"admin_fairseq.analysis.{name}").main(args)
        except AdminError as error:
            refused[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
        except Exception as error:  # what the others measured shall not be lost
            refused[name], failure = f"it failed, {type(error).__name__}: {error}", error
    if len(refused) == len(ORDER) and failure is None:
        raise AdminError(refused[ORDER[0]])
    print(f"{bind(args.out, refused)}: open it in a browser")
    if failure is not None:
        raise failure


def bind(folder: str, refused: dict[str, str] | None = None) -> str:
    """Write ``report.html`` from the analyses' JSON files and figures in a folder, and return its path.

    Args:
        refused: by analysis, why this run has no results of it; an earlier run's are left out.

    Raises:
        AdminError: there is none, or the file cannot be written.
    """
    make_folder(folder)
    refused = refused or {}
    pages: dict[str, dict[str, Any]] = {}
    for name in (*ORDER, "spread"):  # the last by admin-fairseq profile
        path = os.path.join(folder, f"{name}.json")
        if name in refused:
            pages[name] = {"title": name, "text": [f"Not measured: {refused[name]}"], "figures": [], "tables": []}
        elif os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                pages[name] = json.load(file)["page"]
    if not pages:
        raise AdminError(f"{folder} holds no results to report")
    links = "".join(f'<li><a href="#{name}">{html.escape(page["title"])}</a></li>' for name, page in pages.items())
    sections = "".join(_section(folder, name, page) for name, page in pages.items())
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Why training is hard</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Why training is hard</h1><p>Measured by admin-fairseq analyze, after"
        " Liu et al. 2020, Understanding the Difficulty of Training Transformers. The numbers behind each figure are in"
        f" the CSV and JSON files beside this one.</p><ul>{links}</ul>{sections}</body></html>\n"
    )
    path = os.path.join(folder, "report.html")
    with writing(path) as out:
        out.write(text.encode())
    return path


def _section(folder: str, name: str, page: dict[str, Any]) -> str:
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in page["text"])
    figures = "".join(_figure(folder, figure["file"], figure["caption"]) for figure in page["figures"])
    tables = "".join(_table(table["caption"], table["rows"]) for table in page["tables"])
    return f'\n<h2 id="{name}">{html.escape(page["title"])}</h2>{paragraphs}{figures}{tables}'


def _figure(folder: str, file: str, caption: str) -> str:
    with open(os.path.join(folder, file), "rb") as drawn:
        content = base64.b64encode(drawn.read()).decode()
    kind = "svg+xml" if file.endswith(".svg") else "png"
    caption = html.escape(caption)
    return (
        f'\n<figure><img alt="{caption}" src="data:image/{kind};base64,{content}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(caption: str, rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = [
        "".join(f"<th>{cell}</th>" for cell in head),
        *("".join(f"<td>{cell}</td>" for cell in row) for row in body),
    ]
    return f"\n<table><caption>{html.escape(caption)}</caption><tr>{'</tr><tr>'.join(lines)}</tr></table>"
