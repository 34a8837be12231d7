"""Parsers of commands: a ``--help`` that ends with an example, and names that are most like a misspelt one."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, Iterable, NoReturn


class _Help(argparse.HelpFormatter):
    """Keeps the lines of an example as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


def ending_with(*examples: str) -> dict[str, Any]:
    """What makes an ``ArgumentParser`` end its help with these command lines."""
    return {"formatter_class": _Help, "epilog": "\n    ".join(["example:", *examples])}


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The names that are most like one that there is not."""
    return ", ".join(difflib.get_close_matches(name, [*known], count, cutoff=0))


def unknown_choice(message: str) -> str | None:
    """One line instead of argparse's "invalid choice", which lists every choice there is; None for other messages."""
    choice = re.match(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message, re.DOTALL)
    if choice is None:
        return None
    return f"{choice[1].split('/')[0]} {choice[2]}: no such choice; the nearest: " + nearest(
        choice[2], re.findall(r"[\w.+-]+", choice[3])
    )


class Parser(argparse.ArgumentParser):
    """Names the nearest sub-commands to a misspelt one."""

    def error(self, message: str) -> NoReturn:
        super().error(unknown_choice(message) or message)
