"""Parsers of commands whose ``--help`` ends with an example."""

from __future__ import annotations

import argparse
from typing import Any


class _Help(argparse.HelpFormatter):
    """Keeps the lines of an example as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example:") else super()._fill_text(text, width, indent)


def ending_with(*examples: str) -> dict[str, Any]:
    """What makes an ``ArgumentParser`` end its help with these command lines."""
    return {"formatter_class": _Help, "epilog": "\n    ".join(["example:", *examples])}
