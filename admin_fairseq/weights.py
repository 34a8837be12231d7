"""How weights start: as this fairseq draws them, or as the authors' did.

fairseq 0.8 and 0.9, which the paper and deepnmt used, draw both matrices of a feed-forward network from Xavier's
uniform distribution; fairseq 0.10 and newer leave torch's default, so that Var[f] of that branch is 5.8 times less at
512/2048. Everything else starts as it did then, but for biases.
"""

from __future__ import annotations

from typing import Callable

from torch import nn


def authors(model: nn.Module) -> None:
    """Draw fc1 and fc2 from Xavier's uniform distribution; their biases and those of queries, keys and values are 0.

    Source: Transformer-Clinic, fairseq/modules/transformer_layer.py (``Linear``) and multihead_attention.py
    (``reset_parameters``).
    """
    for name, module in model.named_modules():
        projection = name.rpartition(".")[2]
        if projection in ("fc1", "fc2"):
            nn.init.xavier_uniform_(module.weight)
        if projection in ("fc1", "fc2", "q_proj", "k_proj", "v_proj") and module.bias is not None:
            nn.init.zeros_(module.bias)


STARTS: dict[str, Callable[[nn.Module], None]] = {  # of a model that fairseq has just built; by --init-weights
    "fairseq": lambda model: None,
    "authors": authors,
}
