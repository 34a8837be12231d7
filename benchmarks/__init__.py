"""Benchmarks, each run from the repository's root: ``python -m benchmarks.compare --help``, and so on.

  compare  methods side by side, each at its own best learning rate
  significance  whether a difference in BLEU is more than the choice of test sentences
  claims   which optimizers train a Transformer, and how much warmup it needs; runs of compare
  speed    step time, memory and generation beside stock fairseq; its worker measures the models of one depth
  kernel   the sub-layer's LayerNorm alone
  gpu.sh   both on a GPU, within ten minutes; ready.py says what it lacks
  deploy   fairseq-generate beside CTranslate2

They import from common, divergence, tables and figures, which import none of them; data reads a data-bin, logs what
fairseq logs, and runs trains and translates.
records/ holds results with the commands that gave them.
"""

import admin_fairseq  # noqa: F401  (before fairseq, whose modules set up everybody's logging)
from admin_fairseq.errors import install_excepthook

install_excepthook("benchmarks")
