"""The recipes at toy size: raw files in the layout that each downloads, and its scripts on them."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import grammar
from helpers import ROOT

RECIPES = ["multi30k_de_en", "iwslt14_de_en", "wmt14_en_de", "wmt14_en_fr"]
EXAMPLES = ROOT / "examples"
SHARED = ROOT.parent / "shared" / "data"
TOY = {
    "BPE": "300",
    "WORKERS": "2",
    "GPUS": "0",
    "DEPTH": "2-1",
    "EPOCHS": "2",
    "SAVE_UPDATES": "3",
    "BATCH": "1500",
    "MAX_TOKENS": "800",
    "WARMUP": "10",
    "BEAM": "2",
    "EXTRA": "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
    " --decoder-embed-dim 32 --decoder-output-dim 32 --num-workers 0 --required-batch-size-multiple 1 --log-interval 1",
}


def text(recipe: str, split: str, count: int) -> list[tuple[str, str]]:
    """Real sentence pairs where there are some, else the demo's."""
    source, target = recipe.split("_")[-2:]
    folder = SHARED / ("canlaw-enfr" if target == "fr" else "multi30k")
    if not folder.is_dir():
        return grammar.corpus(count, seed={"train": 1, "valid": 2, "test": 3}[split])
    sides = []
    for language in (source, target):
        with gzip.open(folder / f"{split}.{language}.gz", "rt", encoding="utf-8", newline="\n") as lines:
            sides.append([line.rstrip("\n") for _, line in zip(range(count), lines)])
    return list(zip(*sides))


def pack(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, content in files.items():
            data = content.encode()
            member = tarfile.TarInfo(name)
            data = gzip.compress(data) if name.endswith(".gz") else data
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sides(pattern: str, recipe: str, pairs: list, form=lambda lines: "".join(f"{line}\n" for line in lines)) -> dict:
    """{file name: content} of the two sides; {l} is the language and {role} src or ref."""
    languages = recipe.split("_")[-2:]
    return {
        pattern.format(l=language, role=role): form([pair[index] for pair in pairs])
        for index, (language, role) in enumerate(zip(languages, ("src", "ref")))
    }


def sgm(lines: list[str]) -> str:
    rows = "".join(f'<seg id="{number}"> {line} </seg>\n' for number, line in enumerate(lines, start=1))
    return f'<srcset setid="toy">\n<doc docid="1">\n{rows}</doc>\n</srcset>\n'


def lay_out(recipe: str, raw: Path) -> None:
    """The files that the recipe would download."""
    raw.mkdir()
    train, valid, test = (text(recipe, *split) for split in (("train", 700), ("valid", 40), ("test", 25)))
    if recipe == "multi30k_de_en":
        for name, pairs in (("train", train), ("val", valid), ("test_2016_flickr", test)):
            for file, content in sides(f"{name}.{{l}}.gz", recipe, pairs).items():
                (raw / file).write_bytes(gzip.compress(content.encode()))
    elif recipe == "iwslt14_de_en":

        def tags(lines: list[str]) -> str:
            head = "<url>http://x</url>\n<keywords>a, b</keywords>\n<talkid>1</talkid>\n<title>A title</title>\n"
            return head + "".join(f"{line}\n" for line in lines)

        files = sides("de-en/train.tags.de-en.{l}", recipe, train, tags)
        names = ("TED.tst2012", "TED.tst2011", "TED.tst2010", "TEDX.dev2012", "TED.dev2010")  # not in the test's order
        for number, name in enumerate(names):
            part = test[5 * number : 5 * number + 5]
            files.update(sides(f"de-en/IWSLT14.{name}.de-en.{{l}}.xml", recipe, part, sgm))
        pack(raw / "de-en.tgz", files)
    else:
        pair = {"de": "de-en", "fr": "fr-en"}[recipe[-2:]]
        pack(
            raw / "training-parallel-europarl-v7.tgz", sides(f"training/europarl-v7.{pair}.{{l}}", recipe, train[:300])
        )
        pack(raw / "training-parallel-commoncrawl.tgz", sides(f"commoncrawl.{pair}.{{l}}", recipe, train[300:400]))
        test_set = f"test-full/newstest2014-{pair.replace('-', '')}-{{role}}.{{l}}.sgm"
        pack(raw / "test-full.tgz", sides(test_set, recipe, test, sgm))
        if recipe == "wmt14_en_de":
            news = sides(f"training/news-commentary-v12.{pair}.{{l}}", recipe, train[400:])
            pack(raw / "training-parallel-nc-v12.tgz", news)
            pack(raw / "dev.tgz", sides("dev/newstest2013.{l}", recipe, valid))
        else:
            # every 1,333rd pair is for validation
            news = sides(f"training/news-commentary-v9.{pair}.{{l}}", recipe, (train[600:] * 30)[:2700])
            pack(raw / "training-parallel-nc-v9.tgz", news)
            pack(raw / "training-parallel-un.tgz", sides(f"un/undoc.2000.{pair}.{{l}}", recipe, train[400:500]))
            pack(raw / "training-giga-fren.tar", sides("giga-fren.release2.fixed.{l}.gz", recipe, train[500:600]))


def environment(folder: Path, **settings: str) -> dict[str, str]:
    programs = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    folders = {name: str(folder / name.lower()) for name in ("RAW", "DATA", "RUN")}
    return {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT), **TOY, **folders, **settings}


def script(recipe: str, *names: str, folder: Path, **settings: str) -> subprocess.CompletedProcess:
    command = " && ".join(f"{EXAMPLES}/{recipe}/{name}.sh" for name in names)
    return subprocess.run(
        ["bash", "-c", command],
        env=environment(folder, **settings),
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )


def lines(path: Path) -> list[str]:
    return path.read_bytes().decode().rstrip("\n").split("\n")
