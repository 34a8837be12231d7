"""Methods with a LayerNorm in front of every branch, as fairseq's Pre-LN layers have it, and often with one more.

x is a sub-layer's input, f its branch after dropout, LN_in the LayerNorm in front of the branch, and LN_out a second
one, behind it or behind the sum. A stack ends in one more LayerNorm, as in Pre-LN, unless a method says otherwise. N
and M are the number of encoder and decoder layers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from admin_fairseq.architectures import register_method
from admin_fairseq.rules import Rule, mixed
from admin_fairseq.weights import from_xavier


class TwoNorms(Rule):
    """Each sub-layer has a second LayerNorm; ``self.norm_out`` is that of the sub-layer that runs.

    ``residual_connection`` is not told which one that is. The LayerNorm in front of the branch, which is called in the
    same sub-layer just before, says so. A rule whose ``norm_out`` is of the sum computes that in ``add``, for analyses.
    """

    pre_ln = True

    running: str  # the name of the LayerNorm in front of the branch

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        for name in self.norm_names():
            setattr(self, f"{name}_out", nn.LayerNorm(self.embed_dim))
            getattr(self, name).register_forward_pre_hook(partial(_runs, self, name))

    @property
    def norm_out(self) -> nn.LayerNorm:
        return getattr(self, f"{self.running}_out")


def _runs(layer: TwoNorms, name: str, *_: Any) -> None:
    layer.running = name


@register_method("periln")
class PeriLN(TwoNorms):
    """x + LN_out(f(LN_in(x))), with gains that start at 1.

    Source: Kim et al. 2025, "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture"
    (arXiv 2502.02732), and before as Sandwich-LN in Ding et al. 2021, "CogView"; of both papers only the abstract could
    be read here, and the equation in several summaries that agree. The LayerNorm of the embeddings, which the paper
    makes optional, is fairseq's ``--layernorm-embedding``.
    """

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.norm_out(x)


@register_method("keel")
class Keel(TwoNorms):
    """LN_out(alpha x + f(LN_in(x))), alpha the number of sub-layers of the stack: 2 N, 3 M, or 2 M without encoder.

    Weights start as fairseq's, and no LayerNorm follows the last LN_out of a stack.

    Source: Chen and Wei 2026, "Post-LayerNorm Is Back: Stable, ExpressivE, and Deep" (arXiv 2601.19895), of which only
    the abstract could be read here; the equation is that of two implementations by others, which agree, and one of them
    says that alpha counts sub-layers. (Loose summaries of the abstract write a gate in alpha's place.)
    """

    depth_matters = True  # alpha
    start_depends_on_depth = True

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        super().set_up(stack, layers)
        self.alpha = layers[stack] * len(self.norm_names())

    @staticmethod
    def set_up_stacks(stacks: dict[str, nn.Module]) -> None:
        for stack in stacks.values():
            stack.layer_norm = None

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.alpha * residual + x

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm_out(self.add(x, residual))


@register_method("lnscaling")
class LayerNormScaling(Rule):
    """x + f(l^(-1/2) LN_in(x)) in layer l of a stack, counted from 1.

    Source: Sun et al. 2025, "The Curse of Depth in Large Language Models" (arXiv 2502.05795), of which only the
    abstract could be read here; the equation is that of summaries and of the authors' code
    (lmsdss/LayerNorm-Scaling, modeling_llama.py), which agree. The LayerNorm behind the stack is not scaled.
    """

    pre_ln = True
    depth_matters = True  # l

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        for name in self.norm_names():
            setattr(self, name, ScaledLayerNorm(self.embed_dim, self.number**-0.5))


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm times a number."""

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__(dim)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


@register_method("mixln")
class MixLN(Rule):
    """Post-LN in the first quarter of a stack's layers, rounded down, and Pre-LN in the others.

    With less than four layers that is Pre-LN.

    Source: Li et al. 2024, "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN"
    (arXiv 2412.13795), of which only the abstract could be read here; the share of 1/4 is that of summaries and of two
    repositories' settings (``num_hidden_layers // 4``), which agree.
    """

    pre_ln = True
    depth_matters = True  # which layers are Post-LN
    start_depends_on_depth = True

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        self.normalize_before = self.number > layers[stack] // 4


@register_method("subln")
class SubLN(Rule):
    """x + f(LN_in(x)), with a LayerNorm inside of f as well: in front of the last linear map.

    That is the output projection of self-attention and fc2; attention to the encoder has none. Weights are drawn as
    DeepNorm's, from Xavier's normal distribution, with gain gamma (:func:`subln_gain`) for values, output projections
    and the feed-forward network, and 1 for queries and keys and all of the attention to the encoder. Biases start at 0.

    Source: Wang et al. 2022, "Foundation Transformers" (Magneto, arXiv 2210.06423), figure 2 by an implementation of
    others, and the authors' code (microsoft/torchscale), which scales its default weights instead; of the paper itself
    only the abstract could be read here.
    """

    pre_ln = True
    start_depends_on_depth = True

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        from_xavier(self, subln_gain(layers.get("encoder", 0), layers["decoder"])[stack])
        if getattr(self, "encoder_attn", None) is not None:
            from_xavier(self.encoder_attn, 1.0)
        # what torch's attention in one call would take past the LayerNorm, fairseq's own computation does not
        self.self_attn._set_skip_embed_dim_check()
        for last in (self.self_attn.out_proj, self.fc2):
            last.__class__ = mixed(NormsInput, type(last))
            last.layer_norm = nn.LayerNorm(last.in_features)


class NormsInput(nn.Module):
    """A LayerNorm on the input; mixed in before a linear map's class."""

    layer_norm: nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layer_norm(x))


def subln_gain(encoder_layers: int, decoder_layers: int) -> dict[str, float]:
    """gamma by stack, of a model with N encoder and M decoder layers; N is 0 for a decoder-only model.

    Encoder: (log(3 M) log(2 N) / 3)^(1/2). Decoder: log(3 M)^(1/2). Decoder-only: log(2 M)^(1/2).
    """
    if encoder_layers == 0:
        return {"decoder": math.sqrt(math.log(2 * decoder_layers))}
    return {
        "encoder": math.sqrt(math.log(3 * decoder_layers) * math.log(2 * encoder_layers) / 3),
        "decoder": math.sqrt(math.log(3 * decoder_layers)),
    }
