"""What the hypotheses of a beam share: the encoder's output, and the past of those they continue.

fairseq's generator repeats the encoder's output for the hypotheses of a beam. Every layer of the decoder then computes
keys and values of each copy, keeps them and attends to them, and every step copies the output in the new order of the
hypotheses, which changes nothing. fairseq's attention can share keys in a beam, but by ``set_beam_size``,
which holds for whatever comes next, training included. Here the repeated output says so itself.

Keys and values of the tokens so far are followed by a table (:class:`Beams`) instead of copied.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from admin_fairseq.fast.measured import wanted

CROWDED = 1.5  # times as many slots as are seen: they are worth a copy of those


def repeats(output: Tensor) -> int:
    """How many rows in a row of an encoder's output (time, rows, d) are the same; 1 if that is not known."""
    beam, version = getattr(output, "repeats", (1, None))
    return beam if beam > 1 and not output.is_inference() and output._version == version else 1


def sentence_of_each_beam(sentences: Tensor, beam: int) -> Tensor | None:
    """The sentence of each beam, given that of each hypothesis; None where a beam holds two."""
    if len(sentences) % beam:
        return None
    beams = sentences.view(-1, beam)
    return beams[:, 0] if torch.equal(beams, beams[:, :1].expand_as(beams)) else None


def by_sentence(order: Tensor, beam: int) -> tuple[Tensor | None, bool]:
    """An order of hypotheses as one of sentences, and whether it is 0, 1, 2, ...

    None where it separates hypotheses of one beam. Every layer asks; the answer stays with the tensor.
    """
    mark = None if order.is_inference() else (beam, order._version)  # such tensors do not say whether they changed
    known, answer = getattr(order, "by_sentence", (None, (None, False)))
    if mark is None or known != mark:
        sentences = sentence_of_each_beam(order // beam, beam)
        stays = sentences is not None and torch.equal(sentences, torch.arange(len(sentences)).to(sentences))
        order.by_sentence = mark, (answer := (sentences, stays))
    return answer


class RepeatsOutput(nn.Module):
    """An encoder that marks its repeated output, and does not copy it to get the same; mixed in before fairseq's."""

    mode: str  # --admin-fast

    def reorder_encoder_out(self, encoder_out: dict[str, Any], new_order: Tensor) -> dict[str, Any]:
        """As in fairseq: what belongs to row ``new_order[i]`` comes to row i."""
        output = next(iter(encoder_out["encoder_out"]), None)
        if output is None or torch.is_inference_mode_enabled() or not wanted("beams", output.device, self.mode):
            return super().reorder_encoder_out(encoder_out, new_order)
        rows, beam = output.shape[1], repeats(output)
        if beam == 1:
            beam = len(new_order) // rows
            sentences = sentence_of_each_beam(new_order, beam) if beam > 1 else None
        else:
            sentences, stays = by_sentence(new_order, beam)
            if stays and len(new_order) == rows:
                return encoder_out
        result = super().reorder_encoder_out(encoder_out, new_order)
        if sentences is not None:
            result["encoder_out"][0].repeats = beam, result["encoder_out"][0]._version
        return result


class Beams:
    """Which keys each hypothesis of a beam search sees, where every hypothesis of a step gets a slot for its own.

    fairseq copies the keys of all hypotheses to where they are continued, at every step. Here keys stay, and only this
    table follows. It never changes: what comes after a step is another, computed once for all layers, which each ask.

    Attributes:
        size: hypotheses of a sentence
        seen: (sentences, size, slots), True for a hypothesis' ancestors and itself; the last ``size`` slots are this
            step's
        kept: of the slots before them, where they were at the step before: sentences and slots, (sentences, 1) and
            (sentences, slots - size); None: where they are now
    """

    def __init__(self, size: int, seen: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> None:
        own = torch.eye(size, dtype=torch.bool, device=seen.device).expand(len(seen), size, size)
        self.size = size
        self.seen = torch.cat([seen, own], 2)
        self.kept = kept
        self.masks: dict[torch.dtype, Tensor | None] = {}
        self.next: tuple[Tensor | None, int, Beams | None] = None, -1, None  # an order, its version, what comes after

    @classmethod
    def first(cls, size: int, rows: int, device: torch.device) -> Beams:
        """At the first step, of ``rows`` hypotheses."""
        return cls(size, torch.empty(rows // size, size, 0, dtype=torch.bool, device=device))

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """To be added to attention's scores, (sentences, 1, size, slots); None: everything is seen."""
        if dtype not in self.masks:
            hidden = None if self.size == 1 else ~self.seen[:, None]
            self.masks[dtype] = None if hidden is None else hidden.to(dtype).masked_fill_(hidden, -math.inf)
        return self.masks[dtype]

    def after(self, order: Tensor | None) -> Beams | None:
        """At the next step, where hypothesis i continues ``order[i]``, or i.

        None if the order separates the hypotheses of a sentence.
        """
        if order is not None and order.is_inference():  # such tensors do not say whether they changed
            return self._after(order)
        version = 0 if order is None else order._version
        if self.next[0] is not order or self.next[1] != version:
            self.next = order, version, Beams(self.size, self.seen) if order is None else self._after(order)
        return self.next[2]

    def _after(self, order: Tensor) -> Beams | None:
        sentences, stays = by_sentence(order, self.size)
        if sentences is None:
            return None
        parents = (order % self.size).view(-1, self.size, 1)
        seen = self.seen[sentences].gather(1, parents.expand(-1, -1, self.seen.shape[2]))
        is_seen = seen.any(1)  # slots without descendants are of no use
        most = int(is_seen.sum(1).max())
        if stays and len(sentences) == len(self.seen) and seen.shape[2] < CROWDED * most:
            return Beams(self.size, seen)
        slots = is_seen.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
        seen = seen.gather(2, slots[:, None].expand(-1, self.size, -1))
        return Beams(self.size, seen, (sentences[:, None], slots))
