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
    """Whether ``admin-fairseq`` or ``python -m admin_fairseq`` is what imports this package."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run_module_as_main":  # runpy's, which has imported no more than packages yet
            return frame.f_locals.get("mod_name") == "admin_fairseq"
        frame = frame.f_back
    program = getattr(sys, "argv", None) or [""]  # none where Python is embedded
    return os.path.basename(program[0]) == "admin-fairseq"


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
