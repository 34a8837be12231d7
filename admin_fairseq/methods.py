"""The methods that Admin is compared with, on the same layers, stacks and models.

x is a sub-layer's input, f its residual branch after dropout, LN the sub-layer's LayerNorm, N and M the number of
encoder and decoder layers. Post-LN is LN(x + f); each method below changes that rule or how weights start, and
@register_method makes architectures of it. docs/extending.md says how to add one, here or in a folder of your own.
Post-LN and Pre-LN themselves are fairseq's own layers, and the closed forms, fixed and scalar omega are options of
Admin (:mod:`admin_fairseq.model`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from admin_fairseq.architectures import register_family, register_method, register_models
from admin_fairseq.errors import AdminError
from admin_fairseq.family import FamilyModel
from admin_fairseq.rules import Rule

for _method, _is_pre_ln in (("postln", False), ("preln", True)):
    _normalize_before: dict[str, Any] = {"encoder_normalize_before": _is_pre_ln, "decoder_normalize_before": _is_pre_ln}
    register_models(_method, FamilyModel, __name__)
    register_family(_method, **_normalize_before)


@register_method("rezero_postln")
class ReZeroPostLN(Rule):
    """LN(x + a f), with one trainable scalar a a layer that starts at 0.

    Source: Transformer-Clinic's ``rezero_postln`` (LiyuanLucasLiu/Transformer-Clinic, transformer_layer.py).
    """

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        self.rezero_weight = nn.Parameter(torch.zeros(1))

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.rezero_weight * x


@register_method("rezero")
class ReZero(ReZeroPostLN):
    """x + a f, with one trainable scalar a a layer that starts at 0, and no LayerNorm.

    Source: Bachlechner et al. 2020, "ReZero is All You Need", equation 1 and section 5 (one scalar a layer).
    """

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        super().set_up(stack, layers)
        for name in self.norm_names():
            setattr(self, name, nn.Identity())


@register_method("deepnorm")
class DeepNorm(Rule):
    """LN(alpha x + f), weights drawn from Xavier's normal distribution with gain beta.

    alpha and beta by :func:`deepnorm_constants`. Gain beta is that of the value and output projections of every
    attention and of both linear maps of the feed-forward network; query and key projections have gain 1. Biases start
    at 0.

    Source: Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", figure 2 and section 4.
    (microsoft/torchscale scales its default weights instead, the encoder's with 1.15 in the place of beta's 0.87.)
    """

    depth_matters = True  # alpha
    start_depends_on_depth = True

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        self.alpha, beta = deepnorm_constants(layers.get("encoder", 0), layers["decoder"])[stack]
        for name, module in self.named_modules():
            projection = name.split(".")[-1]
            if projection in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"):
                nn.init.xavier_normal_(module.weight, gain=1.0 if projection in ("q_proj", "k_proj") else beta)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual * self.alpha + x


def deepnorm_constants(encoder_layers: int, decoder_layers: int) -> dict[str, tuple[float, float]]:
    """(alpha, beta) by stack, of a model with N encoder and M decoder layers; N is 0 for a decoder-only model.

    Encoder: 0.81 (N^4 M)^(1/16) and 0.87 (N^4 M)^(-1/16). Decoder: (3 M)^(1/4) and (12 M)^(-1/4).
    Decoder-only: (2 M)^(1/4) and (8 M)^(-1/4). Source: Wang et al. 2022, figure 2.
    """
    if encoder_layers == 0:
        return {"decoder": ((2 * decoder_layers) ** (1 / 4), (8 * decoder_layers) ** (-1 / 4))}
    both = encoder_layers**4 * decoder_layers
    return {
        "encoder": (0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)),
        "decoder": ((3 * decoder_layers) ** (1 / 4), (12 * decoder_layers) ** (-1 / 4)),
    }


@register_method("looklinear")
class LookLinear(Rule):
    """Post-LN whose feed-forward networks start as linear maps: half of the hidden units mirror the other half.

    With hidden units W x + b and -(W x + b) read by V and -V, relu(z) - relu(-z) = z makes the network V (W x + b);
    gelu does so too.
    Source: Balduzzi et al. 2017, "The Shattered Gradients Problem", section 5; Transformer-Clinic's ``looklinear``.

    Raises:
        AdminError: the feed-forward network's width is odd, or its activation g has not g(z) - g(-z) = z.
    """

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        half, odd = divmod(self.fc1.out_features, 2)
        if odd:
            raise AdminError(f"LookLinear mirrors half of the feed-forward network: its width, {2 * half + 1}, is odd")
        z = torch.linspace(-3, 3, 7)
        if not torch.allclose(self.activation_fn(z) - self.activation_fn(-z), z, atol=1e-4):
            raise AdminError("LookLinear starts linear with --activation-fn relu or gelu only")
        with torch.no_grad():
            self.fc1.weight[half:] = -self.fc1.weight[:half]
            self.fc1.bias[half:] = -self.fc1.bias[:half]
            self.fc2.weight[:, half:] = -self.fc2.weight[:, :half]


@register_method("b2t")
class BottomToTop(Rule):
    """Post-LN, with the layer's input added once more before the layer's last LayerNorm.

    LN(y + x + f(x)) for the feed-forward network f of a layer with input y. The layer's weight matrices start scaled
    by L^(-1/2) in a stack of L layers.
    Source: Takase et al. 2023, "B2T Connection: Serving Stability and Performance in Deep Transformers", section 4;
    the scale is that of their code (takase/b2t_connection, transformer_layer.py).
    """

    start_depends_on_depth = True
    crosses_sub_layers = True

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("weight") and "layer_norm" not in name:
                    weight.mul_(layers[stack] ** -0.5)
        self.final_layer_norm = BottomToTopNorm(self.embed_dim)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.final_layer_norm.bottom = x
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.final_layer_norm.bottom = None


class BottomToTopNorm(nn.LayerNorm):
    """LayerNorm of its input plus ``bottom``, the input of the layer; all (time, batch, d)."""

    bottom: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.bottom)


@register_method("residual")
class ResiDual(Rule):
    """Post-LN beside a Pre-LN shortcut: x <- LN(x + f(x)) and s <- s + f(x), and the stack ends in x + LN(s).

    Both start at the stack's input. Source: Xie et al. 2023, "ResiDual: Transformer with Dual Residual Connections",
    section 2 and figure 1. (The LN of s has fairseq's eps, 1e-5; that of the authors' code, microsoft/ResiDual, 1e-7.)
    Between layers the two travel side by side, as one tensor (time, batch, 2 d), so that
    fairseq's stacks, activation checkpointing and incremental decoding serve as they are.
    """

    crosses_sub_layers = True

    @staticmethod
    def set_up_stack(stack: nn.Module) -> None:
        stack.layer_norm = ResiDualNorm(stack.layers[0].embed_dim)

    branch_sum: Tensor  # s, while a layer runs

    def residual_connection(self, x: Tensor, residual: Tensor) -> Tensor:
        self.branch_sum = self.branch_sum + x
        return residual + x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x, self.branch_sum = _split(x, self.embed_dim)
        try:
            result = super().forward(x, *args, **kwargs)
            x, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
            both = torch.cat([x, self.branch_sum], dim=-1)
        finally:
            self.branch_sum = None
        return both if rest is None else (both, *rest)


class ResiDualNorm(nn.LayerNorm):
    """The end of a stack: x + LN(s) of the two streams; (time, batch, 2 d) to (time, batch, d)."""

    def forward(self, both: Tensor) -> Tensor:
        x, branch_sum = _split(both, self.normalized_shape[0])
        return x + F.layer_norm(branch_sum, self.normalized_shape, self.weight, self.bias, self.eps)


def _split(both: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x and s; in front of the first layer they are the same."""
    return both.split(dim, dim=-1) if both.shape[-1] == 2 * dim else (both, both)
