"""The methods that Admin is compared with, on the same layers, stacks and models.

x is a sub-layer's input, f its residual branch after dropout, LN the sub-layer's LayerNorm, N and M the number of
encoder and decoder layers. Post-LN is LN(x + f); each method below changes that rule or how weights start, and
@register_method makes architectures of it. Those with a LayerNorm in front of the branches are in
:mod:`admin_fairseq.norms_in_front`, those with two streams in :mod:`admin_fairseq.two_streams`; docs/methods.md has all
in one table, and docs/extending.md says how to add one, here or in a folder of your own. Post-LN and Pre-LN themselves
are fairseq's own layers, and the closed forms, fixed and scalar omega are options of Admin
(:mod:`admin_fairseq.model`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from admin_fairseq.architectures import normalize_before, register_family, register_method, register_models
from admin_fairseq.errors import AdminError
from admin_fairseq.family import FamilyModel
from admin_fairseq.rules import Rule
from admin_fairseq.weights import SCALED, from_xavier, projections

for _method, _is_pre_ln in (("postln", False), ("preln", True)):
    register_models(_method, FamilyModel, __name__)
    register_family(_method, **normalize_before(_is_pre_ln))


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
        self.drop_norms()


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
        from_xavier(self, beta)

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


@register_method("tfixup")
class TFixup(Rule):
    """x + f, without LayerNorm, from weights so small that Adam needs neither LayerNorm nor warmup.

    Values and outputs of every attention and both maps of the feed-forward network start from Xavier's uniform
    distribution times 0.67 N^(-1/4) in the encoder and (9 M)^(-1/4) in the decoder, biases at 0, queries and keys as
    fairseq's. Token embeddings, drawn from N(0, 1/d) as fairseq does, start times (9 N)^(-1/4), the decoder's own with
    M. The paper has encoder-decoders only: here a language model, which attends to no encoder, starts as an encoder.

    Source: Huang et al. 2020, "Improving Transformer Optimization Through Better Initialization", section 3.2, by their
    code (layer6ai-labs/T-Fixup, transformer_layer.py and transformer.py) and Papers with Code's description, which
    agree; the paper itself could not be read here.
    """

    start_depends_on_depth = True

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        self.drop_norms()
        is_decoder = stack == "decoder" and "encoder" in layers
        scale = (9 * layers[stack]) ** (-1 / 4) if is_decoder else 0.67 * layers[stack] ** (-1 / 4)
        for name, module in projections(self):
            if name in SCALED:
                nn.init.xavier_uniform_(module.weight, gain=scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @staticmethod
    def set_up_stacks(stacks: dict[str, nn.Module]) -> None:
        depths: dict[nn.Module, int] = {}
        for stack in stacks.values():
            for module in stack.embed_tokens.modules():  # one, or those of --adaptive-input
                if isinstance(module, nn.Embedding):  # shared: the encoder's depth
                    depths.setdefault(module, len(list(stack.layers.children())))
        with torch.no_grad():
            for embedding, depth in depths.items():
                embedding.weight.mul_((9 * depth) ** (-1 / 4))


@register_method("dsinit")
class DSInit(Rule):
    """Post-LN whose weight matrices in layer l of a stack start scaled by l^(-1/2).

    With ``--init-weights authors`` that is the paper's U(-b, b) with b = l^(-1/2) (6 / (inputs + outputs))^(1/2), its
    alpha 1, but for queries, keys and values, which fairseq draws with another 2^(-1/2).

    Source: Zhang et al. 2019, "Improving Deep Transformer with Depth-Scaled Initialization and Merged Attention",
    of which only the abstract could be read here; the equation is that of two summaries and of Marian's
    --transformer-depth-scaling, which agree. (The authors' code, bzhangGo/zero, gives l^(-1/2) to TensorFlow as a scale
    of the variance, which is l^(-1/4) here.) The paper's other half, merged attention, is left out.
    """

    def set_up(self, stack: str, layers: dict[str, int]) -> None:
        with torch.no_grad():
            for _, module in projections(self):
                module.weight.mul_(self.number**-0.5)


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
            for _, module in projections(self):
                module.weight.mul_(layers[stack] ** -0.5)
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
