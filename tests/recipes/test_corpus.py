"""examples/common/corpus.py and score.py."""

from __future__ import annotations

import bz2
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile

import corpus
import grammar
import pytest
import score
from helpers import ROOT


def test_clean_keeps_what_mosess_rule_keeps():
    """clean-corpus-n.perl, written out for one pair."""

    def moses(e: str, f: str, longest: int, ratio: float) -> bool:
        le, lf = len(e.split()), len(f.split())
        if le == 0 or lf == 0 or le > longest or lf > longest:
            return False
        if le / lf > ratio or lf / le > ratio:
            return False
        return all(len(word) <= 1000 for word in e.split() + f.split())

    dice = random.Random(1)
    cases = [("", "a"), (" ", "a"), ("a", "b" * 1001), ("a", "b" * 1000), ("a b c", "a b"), ("a b c d", "a b")]
    cases += [tuple(" ".join("w" * dice.randint(0, 12)) for _ in range(2)) for _ in range(500)]
    outcomes = [corpus.is_clean(e, f, 10, 1.5) for e, f in cases]
    assert outcomes == [moses(e, f, 10, 1.5) for e, f in cases]
    assert 100 < sum(outcomes) < 400


def test_a_line_separator_within_a_line_does_not_shift_the_sides(tmp_path):
    (tmp_path / "t.de").write_bytes("eins\u2028zwei\x0bdrei\rvier\r\nfünf\n".encode())
    assert list(corpus.read(tmp_path / "t.de")) == ["eins\u2028zwei\x0bdrei\rvier", "fünf"]


def test_sides_of_different_length_are_refused(tmp_path):
    for first, second in ((3, 2), (2, 3)):
        paths = [tmp_path / f"t.{number}" for number in (1, 2)]
        for path, count in zip(paths, (first, second)):
            path.write_text("a\n" * count)
        with pytest.raises(corpus.InputError, match="do not belong together"):
            list(corpus.pairs(paths))


def test_tokenising_on_several_cores_keeps_the_order(tmp_path):
    text = [f"Number {n}, it's the well-known no. {n}." for n in range(3 * corpus.CHUNK // 2)]
    settings = ("en", True, False, True, True)
    tokenize = corpus.make_tokenizer(*settings)
    assert tokenize(text[7]) == "number 7 , it &apos;s the well @-@ known no . 7 ."
    parts = corpus.on_all_cores(corpus.map_lines, text, 2, corpus.make_tokenizer, *settings)
    assert [line for part in parts for line in part] == [tokenize(line) + "\n" for line in text]


def test_what_sacremoses_lacks_of_mosess_scripts():
    plain, normalized = corpus.make_tokenizer("en"), corpus.make_tokenizer("en", normalize=True)
    assert plain("He bought bread etc.") == "He bought bread etc ."  # a line's last word keeps no full stop
    assert plain("He bought bread etc. and ...") == "He bought bread etc. and ..."
    assert plain("Joe\u2019s") == "Joe \u2019 s"
    assert corpus.make_tokenizer("en", apostrophes=True)("Joe\u2019s") == "Joe &apos;s"
    assert normalized("accord\u00adance") == "accord ance"  # a control character becomes a space
    assert corpus.make_tokenizer("fr", normalize=True)("l\u2019\u00eele") == "l &quot; \u00eele"


def test_bpe_is_subword_nmts(tmp_path):
    """Counted and applied on several cores: the same merges and the same text."""
    text = [f"{pair[0]}  {pair[1]}\u00a0x " for pair in grammar.corpus(corpus.CHUNK * 2, seed=4)]
    (tmp_path / "text").write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    program = os.path.join(os.path.dirname(sys.executable), "subword-nmt")

    def subword_nmt(*arguments):
        subprocess.run([program, *arguments], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)

    def ours(*arguments):
        script = ROOT / "examples" / "common" / "corpus.py"
        subprocess.run([sys.executable, script, *arguments, "--workers", "2"], cwd=tmp_path, check=True)

    subword_nmt("learn-bpe", "--symbols", "200", "--input", "text", "--output", "codes")
    ours("count", "text", "--output", "words")
    subword_nmt("learn-bpe", "--symbols", "200", "--dict-input", "--input", "words", "--output", "our-codes")
    assert (tmp_path / "our-codes").read_text() == (tmp_path / "codes").read_text()
    subword_nmt("apply-bpe", "--codes", "codes", "--input", "text", "--output", "pieces")
    ours("bpe", "codes", "text", "our-pieces")
    assert (tmp_path / "our-pieces").read_text() == (tmp_path / "pieces").read_text()


def test_no_half_written_file(tmp_path):
    with pytest.raises(ZeroDivisionError), corpus.writing(tmp_path / "out") as (out,):
        out.write("half\n")
        1 / 0  # noqa: B018
    assert not (tmp_path / "out").exists()


@pytest.fixture
def outputs():
    """Hypotheses and references: each a list of tokenised and a list of plain sentences."""
    plain = [f"{pair[1][0].upper()}{pair[1][1:-2]}." for pair in grammar.corpus(60, seed=4)]
    worse = [line.replace("the", "a", 1).replace(" and ", " or ") for line in plain]
    worse[::5] = plain[1::5]
    tokenized = [[line.replace(".", " .").replace("-", " @-@ ") for line in lines] for lines in (worse, plain)]
    return tokenized[0], tokenized[1], worse, plain


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_scores_are_those_of_sacrebleus_command_line_and_of_fairseq(outputs, tmp_path):
    files = [write(tmp_path / str(number), lines) for number, lines in enumerate(outputs)]
    for lowercase in (False, True):
        scores = score.score(*outputs, lowercase=lowercase)
        case = ["--lowercase", "--chrf-lowercase"] if lowercase else []
        command = [sys.executable, "-m", "sacrebleu", files[3], "-i", files[2], "-m", "bleu", "chrf", "-w", "2", *case]
        found = json.loads(subprocess.check_output(command))
        assert [scores["detokenised sacreBLEU"]["score"], scores["chrF"]["score"]] == [row["score"] for row in found]
        assert [scores["detokenised sacreBLEU"]["signature"], scores["chrF"]["signature"]] == [
            row["signature"] for row in found
        ]
    fairseq_score = [
        os.path.join(os.path.dirname(sys.executable), "fairseq-score"),
        "--sys",
        files[0],
        "--ref",
        files[1],
    ]
    bleu4 = re.search(r"BLEU4 = ([\d.]+)", subprocess.check_output(fairseq_score, text=True))[1]
    assert f"{scores['tokenised BLEU, as in the paper']['score']:.2f}" == bleu4
    assert 20 < float(bleu4) < 90
    assert "smooth:none" in scores["tokenised BLEU, as in the paper"]["signature"]


@pytest.mark.slow
def test_published_scores(tmp_path):
    """Systems of WMT'17 as packed in sacrebleu's source distribution, and the scores that its README gives them."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "sacrebleu", "sacrebleu==2.6.0"]
    if subprocess.run([*command, "-d", tmp_path], capture_output=True).returncode:
        pytest.skip("cannot download sacrebleu's source distribution")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as tar:
        packed = tar.extractfile("sacrebleu-2.6.0/test/wmt17_en_de_systems.pkl.bz2").read()

    class OnlyText(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"{module}.{name}")

    systems = dict(OnlyText(io.BytesIO(bz2.decompress(packed))).load())
    (reference,) = systems.pop("reference")[:1] if isinstance(systems["reference"][0], list) else [systems["reference"]]
    published = {"LIUM-NMT": (26.6, 55.9), "online-A": (20.8, 52.0), "online-B": (26.7, 56.3), "online-F": (15.5, 49.3)}
    for name, sentences in systems.items():
        for system, (bleu, chrf) in published.items():
            if system in name:
                scores = score.score(sentences, reference, sentences, reference)
                assert scores["detokenised sacreBLEU"]["score"] == pytest.approx(bleu, abs=0.051)
                assert scores["chrF"]["score"] == pytest.approx(chrf, abs=0.051)


def test_missing_translations_are_noticed():
    log = "H-1\t-0.1\tb\nH-0\t-0.2\ta\n"
    assert score.hypotheses(log, 2) == ["a", "b"]
    with pytest.raises(SystemExit, match="2 translations; the test set has 3"):
        score.hypotheses(log, 3)


def test_compounds():
    assert score.split_compounds("a well @-@ known half-way - house") == (
        "a well ##AT##-##AT## known half ##AT##-##AT## way - house"
    )
