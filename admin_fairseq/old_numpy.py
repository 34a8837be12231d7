"""numpy with three names that it has dropped and fairseq's data sets still use.

Without them ``--sample-break-mode eos``, which sampling and scoring with a language model need, and
``--num-batch-buckets`` fail, with stock models too. numpy itself stays as it is: these modules of fairseq see this
class under the name ``np``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from fairseq.data import data_utils, language_pair_dataset, token_block_dataset


class OldNumpy:
    int = int  # until numpy 1.23
    compat = SimpleNamespace(long=int)  # until 1.26

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def percentile(*args: Any, interpolation: Any = "linear", **options: Any) -> Any:
        """Its option is ``method`` since numpy 1.22, and nothing else since 2.4."""
        return np.percentile(*args, method=interpolation, **options)


def install() -> None:
    for module in (data_utils, language_pair_dataset, token_block_dataset):
        module.np = OldNumpy()
