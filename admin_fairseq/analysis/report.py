"""One HTML file with everything that the analyses left in a folder: words, figures and tables, and nothing to fetch.

At its head stand what these models show (verdict.py) and how they were measured.
"""

from __future__ import annotations

import argparse
import base64
import glob
import html
import importlib
import json
import os
import platform
import re
import shlex
import sys
import time
from typing import Any

import fairseq
import torch
from fairseq.data import data_utils

from admin_fairseq import __version__
from admin_fairseq.analysis.figures import make_folder
from admin_fairseq.analysis.subject import DEFAULT_ARCHS, checkpoint_in, has_data, merged, method_name, parse
from admin_fairseq.analysis.verdict import verdict
from admin_fairseq.checkpoints import files
from admin_fairseq.errors import DATA_HINT, AdminError
from admin_fairseq.files import writing

ORDER = ("dependency", "amplification", "gradients", "omega")
# What is wider than a phone scrolls in a box of its own. Figures are drawn on white, also in the dark.
STYLE = """
:root { color-scheme: light dark; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif; overflow-wrap: anywhere; }
p, ul { max-width: 45rem; }
.verdict { border-left: 4px solid #0072b2; padding-left: 1rem; }
.wide { overflow-x: auto; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; min-width: 36rem; background: #fff; }
figcaption { opacity: 0.8; font-size: 0.9rem; padding: 0.3rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
.wide table { white-space: nowrap; }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid #8888; vertical-align: top; }
th { overflow-wrap: normal; }
code span { display: inline-block; max-width: 100%; }
@media print { figure, table { break-inside: avoid; } img { min-width: 0; } }
"""
PAPER = {(6, 6, 512), (18, 18, 512)}  # encoder layers, decoder layers and width of the models in the paper's figures
PUBLISHED = "Published figures"
OTHER_SIZE = "of models of another size, 6-6 and 18-18 layers of width 512: compare shapes, not values"


def main(args: argparse.Namespace) -> None:
    """``admin-fairseq analyze report``: run each analysis into DIR, then bind what they wrote.

    An analysis that refuses these models, or fails, has its reason on the page.

    Raises:
        AdminError: DATA is missing, or all of them refuse.
    """
    if not has_data(args.rest):
        raise AdminError(f"give DATA, as the first argument ({DATA_HINT})")
    facts = run_facts(args)
    print(f"{', '.join(ORDER)} of {facts['Models']}", file=sys.stderr)
    if not args.path:
        print("on a CPU this may take hours at width 512; --path measures trained checkpoints", file=sys.stderr)
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
    print(f"{bind(args.out, refused, facts)}: open it in a browser")
    if failure is not None:
        raise failure


def run_facts(args: argparse.Namespace) -> dict[str, str]:
    """How it was measured, as a reader who has only the page must know to do it again.

    Raises:
        AdminError: an argument cannot be used.
    """
    if args.path:
        settings = {path: files.settings(files.load(checkpoint_in(path))) for path in args.path}
        options = {path: merged(each, args.rest) for path, each in settings.items()}
        models = [f"{path}: {_size(each)}" for path, each in options.items()]
    else:
        options = {arch: parse(arch, args.rest) for arch in args.arch or DEFAULT_ARCHS}
        models = [f"{method_name(arch)}: {_size(each)}" for arch, each in options.items()]
    cfg = next(iter(options.values()))
    on_gpu = torch.cuda.is_available() and not cfg.cpu
    sizes = {_triple(each) for each in options.values()}
    return {
        "Command": shlex.join(["admin-fairseq", *sys.argv[1:]]),
        "Models": "; ".join(models),
        "Data": f"{args.rest[0]}{_data(args.rest[0])}",
        "Seed": str(cfg.seed),
        "Date": time.strftime("%d %B %Y, %H:%M UTC", time.gmtime()),
        "Versions": f"admin_fairseq {__version__}, fairseq {fairseq.__version__}, torch {torch.__version__}, Python"
        f" {platform.python_version()}; {torch.cuda.get_device_name() if on_gpu else 'CPU'}",
        PUBLISHED: "of models of this size" if sizes <= PAPER else OTHER_SIZE,
    }


def _triple(options: argparse.Namespace) -> tuple[Any, ...]:
    names = ("encoder_layers", "decoder_layers", "decoder_embed_dim")
    return tuple(getattr(options, name, None) for name in names)


def _size(options: argparse.Namespace) -> str:
    """For example "18-18 layers, width 64, feed-forward 128, heads 4"; of a language model the decoder's alone."""
    encoder, decoder, width = _triple(options)
    layers = str(decoder) if encoder is None else f"{encoder}-{decoder}"
    names = {"decoder_ffn_embed_dim": "feed-forward", "decoder_attention_heads": "heads"}
    rest = [f"{text} {getattr(options, name)}" for name, text in names.items() if hasattr(options, name)]
    return ", ".join([f"{layers} layers", f"width {width}", *rest])


def _data(folder: str) -> str:
    """Training sentences and vocabularies of a data-bin."""
    folder = folder.split(os.pathsep)[0]
    trains = [path[: -len(".idx")] for path in sorted(glob.glob(os.path.join(glob.escape(folder), "train*.idx")))]
    parts = [f"{len(data_utils.load_indexed_dataset(trains[0])):,} training sentences"] if trains else []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "dict*.txt"))):
        with open(path, "rb") as file:
            parts.append(f"{sum(1 for _ in file):,} words in {os.path.basename(path)}")
    return ": " + ", ".join(parts) if parts else ""


def bind(folder: str, refused: dict[str, str] | None = None, facts: dict[str, str] | None = None) -> str:
    """Write ``report.html`` from the analyses' JSON files and figures in a folder, and return its path.

    Args:
        refused: by analysis, why this run has no results of it; an earlier run's are left out.
        facts: how it was measured, for the head.

    Raises:
        AdminError: there is none, or the file cannot be written.
    """
    make_folder(folder)
    refused, facts = refused or {}, facts or {}
    pages: dict[str, dict[str, Any]] = {}
    data: dict[str, dict[str, Any]] = {}
    for name in (*ORDER, "spread"):  # the last by admin-fairseq profile
        path = os.path.join(folder, f"{name}.json")
        if name in refused:
            pages[name] = {"title": name, "text": [f"Not measured: {refused[name]}"], "figures": [], "tables": []}
        elif os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                data[name] = json.load(file)
            pages[name] = data[name]["page"]
    if "spread" in pages:
        pages["spread"]["text"].insert(0, "Measured by admin-fairseq profile, in a run of its own.")
    if not pages:
        raise AdminError(f"{folder} holds no results to report")
    links = "".join(f'<li><a href="#{name}">{html.escape(page["title"])}</a></li>' for name, page in pages.items())
    sections = "".join(_section(folder, name, page, facts.get(PUBLISHED, "")) for name, page in pages.items())
    said = "".join(f"<p>{_unbroken(html.escape(text))}</p>" for text in verdict(data))
    rows = [f'<tr><th scope="row">{name}</th><td>{_fact(name, fact)}</td></tr>' for name, fact in facts.items()]
    head = (
        f"<figure><figcaption>How it was measured</figcaption><table>{''.join(rows)}</table></figure>" if rows else ""
    )
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Why training is hard</title>'
        f'<style>{STYLE}</style></head>\n<body><h1>Why training is hard</h1><div class="verdict">{said}</div>{head}'
        "<p>Measured by admin-fairseq analyze, after Liu et al. 2020, Understanding the Difficulty of Training"
        " Transformers. The numbers behind each figure are in the CSV and JSON files beside this one.</p>"
        f"<ul>{links}</ul>{sections}</body></html>\n"
    )
    path = os.path.join(folder, "report.html")
    with writing(path) as out:
        out.write(text.encode())
    return path


def _unbroken(text: str) -> str:
    """With depths such as 18-18 on one line."""
    return re.sub(r"(\d)-(?=\d)", r"\1&#8209;", text)


def _fact(name: str, text: str) -> str:
    if name != "Command":
        return html.escape(text)
    words = text.split(" ")  # broken between them, not at their hyphens
    return f"<code>{' '.join(f'<span>{html.escape(word)}</span>' for word in words)}</code>"


def _section(folder: str, name: str, page: dict[str, Any], published: str) -> str:
    """``published``: of which size the models of published figures are, for the tables that have some."""
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in page["text"])
    figures = "".join(_figure(folder, figure["file"], figure["caption"]) for figure in page["figures"])
    tables = ""
    for table in page["tables"]:
        mark = f" ({published})" if published and "published" in table["caption"] else ""
        tables += _table(table["caption"] + mark, table["rows"])
    return f'\n<h2 id="{name}">{html.escape(page["title"])}</h2>{paragraphs}{figures}{tables}'


def _figure(folder: str, file: str, caption: str) -> str:
    with open(os.path.join(folder, file), "rb") as drawn:
        content = base64.b64encode(drawn.read()).decode()
    kind = "svg+xml" if file.endswith(".svg") else "png"
    caption = html.escape(caption)
    return (
        f'\n<figure><div class="wide" tabindex="0"><img alt="{caption}" src="data:image/{kind};base64,{content}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(caption: str, rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = [
        "".join(f'<th scope="col">{cell}</th>' for cell in head),
        *("".join(f"<td>{cell}</td>" for cell in row) for row in body),
    ]
    table = f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"
    caption = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f'\n<figure>{caption}<div class="wide" tabindex="0">{table}</div></figure>'
