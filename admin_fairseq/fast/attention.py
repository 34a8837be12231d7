"""fairseq's attention by PyTorch's fused kernels, and alignments only for those who ask for them.

Only how values are computed changes, to rounding; parameters and checkpoints stay. Everything that
:class:`FastAttention` does not serve goes to fairseq's own ``forward``, which it inherits.
"""

from __future__ import annotations

import logging
from typing import Any, Callable

import torch
import torch.nn.functional as F
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from admin_fairseq.fast import dropout
from admin_fairseq.fast.beams import RepeatsOutput, repeats
from admin_fairseq.fast.decoding import SEARCH, StepAttention, reason_against
from admin_fairseq.fast.measured import wanted
from admin_fairseq.rules import mixed

logger = logging.getLogger(__name__)


class MaskProperty:
    """A yes-or-no question about a mask. The answer waits for the device, so it is asked once a batch, not a layer.

    What activation checkpointing passes on is another tensor of the same memory and version.
    """

    def __init__(self, question: Callable[[Tensor], Tensor]) -> None:
        self.question = question
        self.mask: Tensor | None = None
        self.mark: tuple[Any, ...] | None = None
        self.answer = False

    def __call__(self, mask: Tensor) -> bool:
        if mask.is_inference():  # such tensors do not say whether they were changed
            return bool(self.question(mask))
        mark = (mask.data_ptr(), mask.shape, mask.stride(), mask._version)
        if self.mark != mark:
            # the mask is kept, so that no other gets its memory
            self.mask, self.mark, self.answer = mask, mark, bool(self.question(mask))
        return self.answer


def has_padding(mask: Tensor) -> Tensor:
    """Of a padding mask (batch, time)."""
    return mask.any()


def is_right_padded(mask: Tensor) -> Tensor:
    """Whether no token follows a pad, in a padding mask (batch, time)."""
    return ~(mask[:, :-1] & ~mask[:, 1:]).any()


class FastAttention(StepAttention):
    """fairseq's attention by ``scaled_dot_product_attention``: no weights are kept, and no mask a head.

    It serves full sequences, in training and evaluation, and by :class:`StepAttention` steps of incremental decoding.
    fairseq's own ``forward`` serves the rest: wanted attention weights, pruned heads, quantised or hooked projections,
    xFormers, ``add_bias_kv`` and ``add_zero_attn``, masks other than the decoder's own causal one, and, on a CPU,
    attention dropout (which has no fused kernel there). On a GPU attention dropout has the same distribution, but not
    the same random numbers.

    Under the causal mask, pads after the last token need no mask: no token sees them. Only what is computed at the
    pads themselves differs from fairseq's, and it reaches neither a token nor the loss. That is used in training; in
    evaluation values at pads are fairseq's, too.
    """

    # set by speed_up
    mode: str  # --admin-fast
    offloads: bool  # activations, to the CPU
    decoder: tuple[TransformerDecoderBase, ...]  # whose causal mask this attention may get; in a tuple, no sub-module
    of_padding: MaskProperty  # what is to know of its padding masks, shared by the layers of a stack

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in fairseq: (time, batch, d) to (time, batch, d) and attention weights, here None."""
        x = None
        if key is not None and key is value and not (need_weights or before_softmax or need_head_weights):
            if incremental_state is None:
                x = self._at_once(query, key, key_padding_mask, attn_mask)
            elif attn_mask is None:
                x = self.step(query, key, key_padding_mask, static_kv, incremental_state)
        if x is not None:
            return x, None
        if incremental_state is not None:
            self.leave_to_fairseq(incremental_state)
            if static_kv and key is value:
                key, key_padding_mask = self.shared(key, key_padding_mask, incremental_state)
                value = key
        return super().forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            incremental_state=incremental_state,
            need_weights=need_weights,
            static_kv=static_kv,
            attn_mask=attn_mask,
            before_softmax=before_softmax,
            need_head_weights=need_head_weights,
        )

    def _at_once(self, query: Tensor, key: Tensor, padding: Tensor | None, attn_mask: Tensor | None) -> Tensor | None:
        """Of full sequences, (time, batch, d); None: not served."""
        masks = self._masks(padding, attn_mask) if self._is_served(query) else None
        if masks is None:
            return None
        mask, is_causal = masks
        p = dropout.probability(self.dropout_module)
        q, k, v = (self._by_head(x.transpose(0, 1)) for x in self._project(query, key))
        if p and not query.is_cuda:
            x = dropout.DroppedAttention.apply(q, k, v, _hidden(mask, is_causal, len(query)), p)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal)
        return self.out_proj(x.permute(2, 0, 1, 3).reshape(query.shape))

    def _is_served(self, query: Tensor) -> bool:
        # offloaded masks come back as copies: what is computed again would not be served, and draw other dropout
        return (
            wanted("attention", query.device, self.mode)
            and not (self.offloads and query.is_cuda)
            and self.is_usual()
            and (query.is_cuda or self._dropout_is_served(query.device))
        )

    def _dropout_is_served(self, device: torch.device) -> bool:
        p = dropout.probability(self.dropout_module)
        return p == 0 or (p < 1 and dropout.serves(device, self.mode))

    def _masks(self, padding: Tensor | None, attn_mask: Tensor | None) -> tuple[Tensor | None, bool] | None:
        """A mask of the keys that may be seen, (batch, 1, 1, time), and whether to be causal; None: not served."""
        if attn_mask is not None:
            # a view from the start of the decoder's own mask
            known = self.decoder and attn_mask.data_ptr() == self.decoder[0]._future_mask.data_ptr()
            served = known and (padding is None or (self.training and self.of_padding(padding)))
            return (None, True) if served else None
        if padding is None or (self.encoder_decoder_attention and not self.of_padding(padding)):
            return None, False
        return ~padding.bool()[:, None, None, :], False

    def _project(self, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        if not wanted("one projection", query.device, self.mode):
            return self.q_proj(query), self.k_proj(key), self.v_proj(key)
        if key is query:
            return _linear(query, self.q_proj, self.k_proj, self.v_proj)
        return self.q_proj(query), *_linear(key, self.k_proj, self.v_proj)


def _hidden(mask: Tensor | None, is_causal: bool, time: int) -> Tensor | None:
    """The keys that may not be seen, True; None where all may."""
    if is_causal:
        return torch.ones(time, time, dtype=torch.bool).triu_(1)
    return None if mask is None else ~mask


def _linear(x: Tensor, *projections: nn.Linear) -> tuple[Tensor, ...]:
    """Several projections of x as one matrix product."""
    weight, bias = (torch.cat([getattr(projection, name) for projection in projections]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).chunk(len(projections), dim=-1)


class AlignsOnDemand(nn.Module):
    """A decoder that computes its last layer's attention weights for those who ask; mixed in before fairseq's class.

    fairseq's own computes them for every batch and at every step of decoding. Who asks: a call with
    ``alignment_layer``, ``alignment_heads`` or ``full_context_alignment``; in training a task that loads alignments;
    in evaluation everybody until ``prepare_for_inference_`` says that no alignment is printed, and after that
    fairseq's generator with alignments.
    """

    aligns = False  # is asked in any case

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any,
        incremental_state: Any = None,
        full_context_alignment: bool = False,
        alignment_layer: int | None = None,
        alignment_heads: int | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if incremental_state is not None:
            output = (encoder_out or {}).get("encoder_out")
            incremental_state[SEARCH] = {"size": repeats(output[0]) if output else 1}
        is_asked = full_context_alignment or alignment_layer is not None or alignment_heads is not None
        # not next(iter(layers)): LayerDrop's list draws random numbers
        by_default = self.aligns or (not self.training and self.layers[-1].need_attn)
        is_skipped = not is_asked and not by_default
        if is_skipped:
            alignment_layer = -1  # no layer has this number
        features, extra = super().extract_features(
            prev_output_tokens,
            encoder_out,
            incremental_state,
            full_context_alignment,
            alignment_layer,
            alignment_heads,
        )
        if is_skipped:
            extra["attn"] = None  # [None] is too much for fairseq's scorer, where another model of an ensemble has some
        return features, extra


def speed_up(stacks: dict[str, nn.Module], mode: str) -> None:
    """Give the stacks of a model these attentions, encoder and decoder, in place; ``mode`` is --admin-fast."""
    reasons = set()
    is_missing = not hasattr(F, "scaled_dot_product_attention")  # before torch 2.0
    for name, stack in stacks.items():
        right_padded, padded = MaskProperty(is_right_padded), MaskProperty(has_padding)
        for module in stack.modules():
            if type(module) is not MultiheadAttention:
                continue
            reason = f"torch {torch.__version__}" if is_missing else reason_against(module)
            if reason is not None:
                reasons.add(reason)
                continue
            module.__class__ = FastAttention
            module.mode = mode
            module.offloads = getattr(getattr(stack, "cfg", None), "offload_activations", False)
            module.decoder = (stack,) if name == "decoder" else ()
            module.of_padding = padded if module.encoder_decoder_attention else right_padded
    if reasons:
        logger.info(f"Admin: fairseq's own attention is used, because of {', '.join(sorted(reasons))}")
    if "encoder" in stacks:
        encoder = stacks["encoder"]
        encoder.__class__ = mixed(RepeatsOutput, type(encoder))
        encoder.mode = mode
    decoder = stacks["decoder"]
    decoder.__class__ = mixed(AlignsOnDemand, type(decoder))
