"""Admin for fairseq: Transformers too deep for anyone else's recipe.

``fairseq-train DATA --user-dir admin_fairseq --arch transformer_admin_72 ...`` imports this package, which
registers the architectures (:mod:`admin_fairseq.architectures`) and has the profiling pre-pass run in fairseq's
trainer (:mod:`admin_fairseq.hooks`). The paper's equation is in :mod:`admin_fairseq.norm`.
"""

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "AdminError",
    "AdminLanguageModel",
    "AdminModel",
    "AdminTransformer",
    "OmegaLayerNorm",
    "Profile",
    "Rule",
    "Sample",
    "profile",
    "read_profile",
    "register_method",
    "register_start",
    "sub_layers",
]


def _is_own_command() -> bool:
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # Python before 3.10 does not say which module is run
        words = getattr(sys, "orig_argv", [])
        return ("-m", "admin_fairseq") in zip(words, words[1:])
    return os.path.basename(program) == "admin-fairseq"


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("admin_fairseq.plugin"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not _is_own_command():  # which answers --help before it imports fairseq for seconds
    from admin_fairseq.plugin import (
        AdminError,
        AdminLanguageModel,
        AdminModel,
        AdminTransformer,
        OmegaLayerNorm,
        Profile,
        Rule,
        Sample,
        profile,
        read_profile,
        register_method,
        register_start,
        sub_layers,
    )
