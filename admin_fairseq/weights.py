"""How weights start: as this fairseq draws them, or as the authors' did; and what starts of methods share.

fairseq 0.8 and 0.9, which the paper and deepnmt used, draw both matrices of a feed-forward network from Xavier's
uniform distribution; fairseq 0.10 and newer leave torch's default, so that Var[f] of that branch is 5.8 times less at
512/2048. Everything else starts as it did then, but for biases.
"""

from __future__ import annotations

from typing import Callable, Iterator

from torch import nn

SCALED = ("v_proj", "out_proj", "fc1", "fc2")  # what of a layer the depth-aware starts scale; not queries and keys


def projections(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps of a layer's attentions and feed-forward network, as "q_proj", ..., "fc2"."""
    for name, module in layer.named_modules():
        projection = name.rpartition(".")[2]
        if projection in ("q_proj", "k_proj", *SCALED):
            yield projection, module


def from_xavier(layer: nn.Module, gain: float) -> None:
    """Draw a layer's matrices from Xavier's normal distribution, with this gain what is SCALED; biases are 0."""
    for projection, module in projections(layer):
        nn.init.xavier_normal_(module.weight, gain=gain if projection in SCALED else 1.0)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
