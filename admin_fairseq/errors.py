"""Bad input ends in one clear line on stderr and a non-zero exit, not in a traceback."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from types import FrameType, TracebackType
from typing import Iterable

DATA_HINT = "DATA is the folder that fairseq-preprocess wrote (its --destdir), with dict.<lang>.txt, train and valid"

EMPTY = (
    "the data set is empty: the --gen-subset or --valid-subset in DATA holds nothing, or nothing that fits"
    " --max-tokens and the maximum positions; a language model reads line by line with --sample-break-mode eos"
)
SIZES = re.compile(
    r"size mismatch for \w+\.(?:embed_tokens|output_projection)\.weight: copying a param with shape"
    r" torch\.Size\(\[(\d+), (\d+)\]\) from checkpoint, the shape in current model is torch\.Size\(\[(\d+), (\d+)\]\)"
)


class AdminError(Exception):
    """The user's input cannot be used; the message says what is wrong and what to do."""


class NotFiniteError(AdminError, FloatingPointError):
    """Numbers of a training are no longer finite; also the error by which fairseq says so."""


def explain(error: BaseException) -> str | None:
    """One line for an error that the user's input caused, None for any other (a bug keeps its traceback)."""
    link: BaseException | None = error
    while link is not None:  # fairseq raises errors of its own while it handles ours
        if isinstance(link, AdminError) or str(link).startswith("admin_fairseq needs"):
            return str(link)
        # fairseq spawns one process a GPU; the parent sees the child's traceback as text
        spawned = re.search(r"AdminError: (.+)", str(link))
        if spawned:
            return spawned.group(1)
        link = link.__cause__ or link.__context__
    return _explain_fairseq(error)


def _explain_fairseq(error: BaseException) -> str | None:
    """What fairseq itself raises when DATA, a folder or a checkpoint is not what it should be."""
    text, frames = str(error), traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and text and "fairseq_cli" in frames[-1].filename:
        return text  # of one option that needs another
    if isinstance(error, ZeroDivisionError) and frames[-1].filename.endswith(
        os.path.join("fairseq_cli", "generate.py")
    ):
        return EMPTY  # fairseq 0.12.2 divides by the time that no sentence took
    if isinstance(error, KeyError) and "fairseq_cli" in frames[-1].filename and "valid" in frames[-1].name:
        return f"--best-checkpoint-metric {error.args[0]}: validation measures no such thing; bleu needs --eval-bleu"
    files = [frame.filename for frame in frames if f"{os.sep}fairseq{os.sep}" in frame.filename]
    files = [file for file in files if os.path.basename(file) != "file_io.py"]  # its wrapper of open()
    if not files:
        return None
    if isinstance(error, OSError) and os.path.basename(error.filename or "") == "dict.txt":
        return (
            f"{error.strerror}: {error.filename}; a language model needs the dict.txt of its own data in DATA, and one"
            " for --lm-path must be of the target language's words"
        )
    if isinstance(error, OSError):
        reading_data = os.path.basename(os.path.dirname(files[-1])) in ("data", "tasks")
        what = f"{error.strerror}: {error.filename}" if error.filename else text
        return f"{what} ({DATA_HINT})" if reading_data else what
    if text.startswith("Could not infer language pair"):
        return (
            "no translation data found; give --source-lang and --target-lang, for a language model --task"
            f" language_modeling, or check DATA ({DATA_HINT})"
        )
    if text.startswith("Size of sample #"):  # and ends in the option that leaves such sentences out
        is_pair = "is invalid (=(" in text
        return text if is_pair else f"{text}; a language model reads line by line with --sample-break-mode eos"
    if text.startswith(("The dataset is empty", "cannot mmap an empty file")) or (
        isinstance(error, IndexError) and frames[-1].name == "batch_by_size"
    ):
        if any(os.path.basename(frame.filename) in ("generate.py", "eval_lm.py", "validate.py") for frame in frames):
            return EMPTY
        return (
            "a data set is empty: train or valid in DATA holds no pair at all, or none that fits --max-tokens and"
            " the maximum positions, or fewer pairs than --required-batch-size-multiple"
        )
    if text.startswith("--share-all-embeddings requires a joined dictionary"):
        return f"{text}: make DATA by fairseq-preprocess --joined-dictionary, or drop the flag"
    if text.startswith("--"):
        return text.split(": {")[0]  # and then the whole configuration
    if text == "embed_dim must be divisible by num_heads":
        return (
            "the width must be a multiple of the heads: --encoder-embed-dim of --encoder-attention-heads,"
            " --decoder-embed-dim of --decoder-attention-heads"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.doc} ({text}); for example --eval-bleu-args '{{\"beam\": 5}}', in single quotes"
    if "exceeds max_tokens limit of" in text or text.startswith("Sentences lengths should not exceed max_tokens"):
        return f"{text.rstrip('!')}: raise --max-tokens, or --max-tokens-valid where only valid is too long for it"
    if "size mismatch" in text + str(error.__context__):
        sizes = SIZES.search(text) or SIZES.search(str(error.__context__))
        if sizes and sizes[1] != sizes[3] and sizes[2] == sizes[4]:
            return (
                f"the checkpoint's dictionary has {sizes[1]} words and that in DATA {sizes[3]}: make DATA with the"
                " dictionaries of the data that it was trained on, fairseq-preprocess --srcdict OLD/dict.<source>.txt"
                " --tgtdict OLD/dict.<target>.txt"
            )
    is_searching = os.path.basename(files[-1]) == "sequence_generator.py"
    if is_searching and text.startswith("The size of tensor a"):  # where probabilities are added up
        return "the language model of --lm-path must have the dictionary of the target language, word for word"
    if is_searching and isinstance(error, AssertionError):
        return (
            "the search cannot go on from the words that are given; with a language model add --sample-break-mode"
            " eos, and --prefix-size N to continue the first N words of each line"
        )
    if text.startswith("loaded state dict contains a parameter group") or "optimizer_history" in text:
        return (
            "the checkpoint's optimizer state does not fit this model; to start from its weights alone add"
            " --reset-optimizer, or give it to --finetune-from-model"
        )
    if text.endswith("requires a FairseqMultiModel architecture"):
        return f"{text}, which Admin has not; train one model for all pairs with --task translation_multi_simple_epoch"
    if text.endswith("has no attribute 'supported_targets'"):
        return "--task language_modeling needs a decoder-only model, such as --arch transformer_lm_admin"
    if text == "'TranslationFromPretrainedBARTTask' object has no attribute 'args'":
        return (
            "--task translation_from_pretrained_bart fails in this fairseq, with every architecture; train with"
            " --task translation, or translation_multi_simple_epoch for language tokens"
        )
    if text.startswith("Cannot load model parameters from checkpoint"):
        reason = " ".join(str(error.__context__).split())
        return f"{text} ({reason[:300]})"
    return None


def _names(folder: str, frames: Iterable[tuple[FrameType, int]]) -> bool:
    files = (os.path.abspath(frame.f_code.co_filename) for frame, _ in frames)
    return any(os.path.basename(os.path.dirname(file)) == folder for file in files)


def is_running(folder: str) -> bool:
    """Whether a function of a file in a folder of this name is running, as fairseq_cli's are in fairseq's commands."""
    return _names(folder, traceback.walk_stack(sys._getframe()))


def install_excepthook(folder: str) -> None:
    """Print :func:`explain`'s line instead of a traceback when such an error ends a command of ``folder``'s files.

    Other code, which may run in the same process, keeps its tracebacks.
    """
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = explain(error) if _names(folder, traceback.walk_tb(trace)) else None
        if line is None:
            previous(kind, error, trace)
        else:
            print(f"admin_fairseq: error: {line}", file=sys.stderr)
            sys.unraisablehook = lambda _: None  # destructors of half-built objects would print tracebacks below it

    sys.excepthook = excepthook
