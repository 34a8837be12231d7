"""Raw parallel text to text in BPE: extract, tokenise, clean, split. Memory grows with the vocabulary only.

    python corpus.py COMMAND --help

What the Moses Perl scripts do in fairseq's and the authors' recipes, done with sacremoses and on all cores. Every
output appears whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import multiprocessing.connection
import os
import re
import sys
import tarfile
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, Any, Callable, Iterable, Iterator, Sequence

from tqdm import tqdm

CHUNK = 2000  # lines a worker gets at once
LONGEST = 1023  # tokens: fairseq's models have 1,024 positions, and the sentence's end takes one


class InputError(Exception):
    """The raw text is not what it should be; the message says what and where."""


def lines_of(stream: IO[bytes], name: str | Path = "") -> Iterator[str]:
    r"""Lines without their end; gunzipped where ``name`` says so.

    Only \n ends a line: a \r or U+2028 within must not shift one side against the other.
    """
    for line in gzip.open(stream) if str(name).endswith(".gz") else stream:  # noqa: SIM115  (the stream is closed)
        yield line.rstrip(b"\r\n").decode("utf-8", errors="replace")


def read(path: Path) -> Iterator[str]:
    """A text file's lines, with a progress bar over its bytes."""
    with path.open("rb") as stream, tqdm(
        total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, delay=3, mininterval=1
    ) as bar:
        for line in stream:
            bar.update(len(line))
            yield from lines_of([line])


@contextlib.contextmanager
def writing(*paths: Path) -> Iterator[list[IO[str]]]:
    """Text files to write, renamed to their names once all is well; where a name is a symbolic link, it stays one."""
    targets = [path.resolve() for path in paths]
    partial = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in targets]
    try:
        with contextlib.ExitStack() as stack:
            out = [stack.enter_context(path.open("w", encoding="utf-8", newline="\n")) for path in partial]
            yield out
            for file in out:
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in zip(partial, targets):
            if path.exists() and not path.is_file():
                raise InputError(f"{path} is not a file, and is not replaced by one")
            os.replace(temporary, path)
    finally:
        for temporary in partial:
            with contextlib.suppress(OSError):
                temporary.unlink()


def sides(prefix: Path, args: argparse.Namespace) -> list[Path]:
    """The two files of a split: PREFIX.<source> and PREFIX.<target>."""
    return [prefix.with_name(f"{prefix.name}.{language}") for language in (args.source, args.target)]


def pairs(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Line pairs of two files; they must be of the same length."""
    source, target = map(read, paths)
    for number, line in enumerate(source, start=1):
        other = next(target, None)
        if other is None:
            raise InputError(f"{paths[1]} ends at line {number - 1}, before {paths[0]}: the two do not belong together")
        yield line, other
    if next(target, None) is not None:
        raise InputError(f"{paths[0]} ends before {paths[1]}: the two do not belong together")


# ---- on all cores ------------------------------------------------------------------------------------------------


def on_all_cores(
    work: Callable[[list[str], Any], Any], lines: Iterable[str], workers: int, make: Callable[..., Any], *settings: Any
) -> Iterator[Any]:
    """work(some lines, tool) for all lines, in order; each process makes its tool once, by make(*settings).

    At most a few chunks a process are in memory at a time.
    """
    lines = iter(lines)
    chunks = iter(lambda: list(islice(lines, CHUNK)), [])
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(work, make, settings)) as pool:
        running: deque = deque()
        for chunk in chunks:
            running.append(pool.submit(_work, chunk))
            if len(running) > 3 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _start_worker(work: Callable, make: Callable, settings: tuple) -> None:
    global _work_on, _tool
    _work_on, _tool = work, make(*settings)
    # a worker whose parent was killed would wait for ever, and hold the recipe's lock
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (multiprocessing.connection.wait([parent]), os._exit(1)), daemon=True).start()


def _work(lines: list[str]) -> Any:
    return _work_on(lines, _tool)


def map_lines(lines: list[str], tool: Callable[[str], str]) -> list[str]:
    return [tool(line) + "\n" for line in lines]


# ---- tokenise ----------------------------------------------------------------------------------------------------


def make_tokenizer(
    language: str, normalize: bool = False, apostrophes: bool = False, dashes: bool = False, lowercase: bool = False
) -> Callable[[str], str]:
    """For one line: Moses' [normalize-punctuation, remove-non-printing-char,] tokenizer [-a] and [lowercase].

    sacremoses, with what makes it equal to the Perl scripts on German, English and French text (see
    examples/README.md for how often it differs otherwise).
    """
    import regex
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normalizer = MosesPunctNormalizer(lang=language, perl_parity=True)
    tokenizer = MosesTokenizer(lang=language)
    unprintable = regex.compile(r"\p{C}")
    separators = dict.fromkeys(range(0x1C, 0x20))  # white space to Python, nothing to Perl

    def tokenize(line: str) -> str:
        if apostrophes:
            line = line.replace("\u2019", "'")
        if normalize:
            line = unprintable.sub(" ", normalizer.normalize(line + "\n"))  # Perl's line still has its end
        line = tokenizer.tokenize(line.translate(separators), aggressive_dash_splits=dashes, return_str=True)
        last = line[line.rfind(" ") + 1 :]
        if last.endswith(".") and last.strip("."):  # a sentence's last word keeps no full stop, not even "etc."
            line = f"{line[:-1]} ."
        return line.lower() if lowercase else line

    return tokenize


def tokenize(args: argparse.Namespace) -> None:
    settings = (args.language, args.normalize, args.apostrophes, args.dashes, args.lowercase)
    with writing(args.output) as (out,):
        for lines in on_all_cores(map_lines, read(args.input), args.workers, make_tokenizer, *settings):
            out.writelines(lines)


# ---- BPE ---------------------------------------------------------------------------------------------------------


def count_words(lines: list[str], _: object) -> Counter[str]:
    return Counter(word for line in lines for word in line.strip("\r\n ").split(" ") if word)


def count(args: argparse.Namespace) -> None:
    """Words and their counts, as subword-nmt's learn-bpe counts them (ties in the order of first sight)."""
    words: Counter[str] = Counter()
    for path in args.input:
        for part in on_all_cores(count_words, read(path), args.workers, int):
            words.update(part)
    with writing(args.output) as (out,):
        out.writelines(f"{word} {number}\n" for word, number in words.items())


def make_bpe(codes: Path) -> Callable[[str], str]:
    from subword_nmt.apply_bpe import BPE

    with codes.open(encoding="utf-8") as lines:
        return BPE(lines).process_line


def bpe(args: argparse.Namespace) -> None:
    """Also says which lines are longer than fairseq's models take."""
    done, too_long = 0, []  # (tokens, line number)
    with writing(args.output) as (out,):
        for lines in on_all_cores(map_lines, read(args.input), args.workers, make_bpe, args.codes):
            out.writelines(lines)
            for number, line in enumerate(lines, start=done + 1):
                if line.count(" ") >= LONGEST:
                    too_long.append((len(line.split()), number))
            done += len(lines)
    too_long = [size for size in too_long if size[0] > LONGEST]
    if too_long:
        tokens, number = max(too_long)
        print(
            f"note: {args.output.name} has {len(too_long):,} of more than {LONGEST:,} tokens among {done:,} lines, the"
            f" longest with {tokens:,} in line {number:,}: {args.too_long}"
        )


# ---- clean and split ---------------------------------------------------------------------------------------------


def is_clean(source: str, target: str, longest: int, ratio: float) -> bool:
    """Moses' clean-corpus-n: 1 to ``longest`` tokens a side, neither more than ``ratio`` times the other, none huge."""
    words = [line.split() for line in (source, target)]
    shorter, longer = sorted(map(len, words))
    return (
        shorter >= 1 and longer <= longest and longer <= ratio * shorter and max(map(len, words[0] + words[1])) <= 1000
    )


def clean(args: argparse.Namespace) -> None:
    kept = seen = 0
    with writing(*sides(args.output, args)) as out:
        for pair in pairs(sides(args.input, args)):
            seen += 1
            if is_clean(*pair, args.max, args.ratio):
                kept += 1
                for file, line in zip(out, pair):
                    file.write(" ".join(line.split()) + "\n")
    print(f"kept {kept:,} of {seen:,} pairs (1 to {args.max} tokens, ratio at most {args.ratio:g})")


def split(args: argparse.Namespace) -> None:
    """Every N-th pair, counted from 1, to validation and the others to training."""
    with writing(*sides(args.train, args), *sides(args.valid, args)) as out:
        for number, pair in enumerate(pairs(sides(args.input, args)), start=1):
            files = out[:2] if number % args.every else out[2:]
            for file, line in zip(files, pair):
                file.write(line + "\n")


# ---- extract -----------------------------------------------------------------------------------------------------


BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error)


def unbroken(lines: Iterator[str], file: Path) -> Iterator[str]:
    try:
        yield from lines
    except BROKEN as error:
        raise InputError(f"{file} is broken ({error}); remove it and run again") from error


def members(archive: Path, names: Sequence[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """(name, lines) of files in a tar archive, in the archive's order: one pass, and nothing is unpacked."""
    missing = set(names)
    if not archive.is_file():
        raise InputError(f"{archive} is not there, nor are {' and '.join(names)} unpacked beside it")
    try:
        with tarfile.open(archive, mode="r|*") as tar:
            for member in tar:
                name = member.name[2:] if member.name.startswith("./") else member.name
                if name in missing:
                    missing.remove(name)
                    stream = tar.extractfile(member)
                    yield name, unbroken(lines_of(stream, name), archive)
                    if not missing:
                        return
    except BROKEN as error:
        raise InputError(f"{archive} is broken ({error}); remove it and run again") from error
    raise InputError(f"{archive} lacks {', '.join(sorted(missing))}: is it the archive of this recipe?")


def open_all(raw: Path, archive: str | None, names: Sequence[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """(name, lines) of files in RAW, plain or gzipped; those that are not there, from the archive in RAW."""
    packed = []
    for name in names:
        for path in (raw / name, raw / f"{name}.gz"):
            if path.is_file():
                with path.open("rb") as stream:
                    yield name, unbroken(lines_of(stream, path), path)
                break
        else:
            packed.append(name)
    if packed and archive is None:
        raise InputError(f"{raw} lacks {' and '.join(packed)}")
    if packed:
        yield from members(raw / archive, packed)


def segments(lines: Iterable[str]) -> Iterator[str]:
    """The text of an evaluation set's <seg> elements (SGML, XML), one a line."""
    for line in lines:
        if "<seg id" in line:
            text = re.sub(r'<seg id="[0-9]*">\s*', "", line)
            yield re.sub(r"\s*</seg>\s*", "", text)


def ted_training(lines: Iterable[str]) -> Iterator[str]:
    """The sentences, titles and descriptions of IWSLT's train.tags file."""
    for line in lines:
        if not re.search(r"<(url|talkid|keywords)>", line):
            yield re.sub(r"</?(title|description)>", "", line)


# Where each split of a recipe is: (archive, file, how to read it), concatenated in this order. A file may also lie
# unpacked in RAW, plain or .gz. {l} is its language, {role} is "src" or "ref". "own" is a corpus of the user's.
SOURCES = {
    "iwslt14_de_en": {
        "train": [("de-en.tgz", "de-en/train.tags.de-en.{l}", ted_training)],
        "test": [
            ("de-en.tgz", f"de-en/IWSLT14.{name}.de-en.{{l}}.xml", segments)
            for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
        ],
    },
    "wmt14_en_de": {
        "train": [
            ("training-parallel-europarl-v7.tgz", "training/europarl-v7.de-en.{l}", iter),
            ("training-parallel-commoncrawl.tgz", "commoncrawl.de-en.{l}", iter),
            ("training-parallel-nc-v12.tgz", "training/news-commentary-v12.de-en.{l}", iter),
        ],
        "valid": [("dev.tgz", "dev/newstest2013.{l}", iter)],
        "test": [("test-full.tgz", "test-full/newstest2014-deen-{role}.{l}.sgm", segments)],
    },
    "wmt14_en_fr": {
        "train": [
            ("training-parallel-europarl-v7.tgz", "training/europarl-v7.fr-en.{l}", iter),
            ("training-parallel-commoncrawl.tgz", "commoncrawl.fr-en.{l}", iter),
            ("training-parallel-un.tgz", "un/undoc.2000.fr-en.{l}", iter),
            ("training-parallel-nc-v9.tgz", "training/news-commentary-v9.fr-en.{l}", iter),
            ("training-giga-fren.tar", "giga-fren.release2.fixed.{l}.gz", iter),
        ],
        "test": [("test-full.tgz", "test-full/newstest2014-fren-{role}.{l}.sgm", segments)],
    },
    "multi30k_de_en": {
        "train": [(None, "train.{l}", iter)],
        "valid": [(None, "val.{l}", iter)],
        "test": [(None, "test_2016_flickr.{l}", iter)],
    },
    "own": {name: [(None, f"{name}.{{l}}", iter)] for name in ("train", "valid", "test")},
}


def extract(args: argparse.Namespace) -> None:
    """Write raw.{train,valid,test}.<language> of a recipe."""
    languages = (args.source, args.target)
    for split_name in ("train", "valid", "test"):
        entries = SOURCES[args.recipe].get(split_name)
        if entries is None:
            continue
        with writing(*(args.output / f"raw.{split_name}.{language}" for language in languages)) as out:
            for archive, pattern, reader in entries:
                names = {
                    pattern.format(l=language, role=role): index
                    for index, (language, role) in enumerate(zip(languages, ("src", "ref")))
                }
                counts = [0, 0]
                for name, lines in open_all(args.raw, archive, list(names)):
                    index = names[name]
                    for line in reader(lines):
                        out[index].write(line + "\n")
                        counts[index] += 1
                if counts[0] != counts[1] or not counts[0]:
                    raise InputError(
                        f"{' and '.join(names)} have {counts[0]:,} and {counts[1]:,} lines; they must be parallel"
                    )
                print(f"{split_name}: {counts[0]:,} pairs from {' and '.join(names)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(run.__name__, help=text)
        command.set_defaults(run=run)
        return command

    command = add(extract, "raw text of a recipe's archives, as RAW.{train,valid,test}.<language>")
    command.add_argument("recipe", choices=SOURCES)
    command.add_argument("source", help="source language")
    command.add_argument("target", help="target language")
    command.add_argument("raw", type=Path, help="folder of the downloaded files")
    command.add_argument("output", type=Path, help="folder for the text files")

    command = add(tokenize, "normalise, tokenise and lower-case a file, on several cores")
    command.add_argument("language")
    command.add_argument("input", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument("--normalize", action="store_true", help="punctuation, and remove control characters")
    command.add_argument("--apostrophes", action="store_true", help="typographic ones to ', as the recipes' test sets")
    command.add_argument("--dashes", action="store_true", help="split at dashes: @-@ (the Perl tokenizer's -a)")
    command.add_argument("--lowercase", action="store_true", help="after tokenising")
    command.add_argument("--workers", type=int, default=os.cpu_count())

    command = add(count, "words and their counts, for subword-nmt learn-bpe --dict-input")
    command.add_argument("input", type=Path, nargs="+")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--workers", type=int, default=os.cpu_count())

    command = add(bpe, "apply BPE to a file, on several cores")
    command.add_argument("codes", type=Path, help="what subword-nmt learn-bpe wrote")
    command.add_argument("input", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument(
        "--too-long", default="too many for fairseq", metavar="TEXT", help="what becomes of such lines"
    )
    command.add_argument("--workers", type=int, default=os.cpu_count())

    command = add(clean, "keep the pairs that Moses' clean-corpus-n keeps")
    command.add_argument("source", help="source language")
    command.add_argument("target", help="target language")
    command.add_argument("input", type=Path, help="prefix: the files are INPUT.<language>")
    command.add_argument("output", type=Path, help="prefix")
    command.add_argument("--max", type=int, required=True, help="longest sentence, in tokens")
    command.add_argument("--ratio", type=float, default=9.0, help="largest ratio of the two lengths")

    command = add(split, "every N-th pair to validation, the others to training")
    command.add_argument("source", help="source language")
    command.add_argument("target", help="target language")
    command.add_argument("input", type=Path, help="prefix")
    command.add_argument("train", type=Path, help="prefix")
    command.add_argument("valid", type=Path, help="prefix")
    command.add_argument("--every", type=int, required=True, metavar="N")

    args = parser.parse_args()
    try:
        args.run(args)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
