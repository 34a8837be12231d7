"""Keys and values of the encoder's output once a sentence, not once a hypothesis.

fairseq's generator repeats the encoder's output for the hypotheses of a beam. Every layer of the decoder then computes
keys and values of each copy, keeps them and attends to them, and every step copies the output in the new order of the
hypotheses, which changes nothing. fairseq's attention can share keys in a beam, but by ``set_beam_size``,
which holds for whatever comes next, training included. Here the repeated output says so itself.
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from admin_fairseq.fast.measured import wanted


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


class BeamAttention(MultiheadAttention):
    """fairseq's attention, with a saved state of one row a sentence where it attends to repeated output."""

    def shared(self, key: Tensor, padding: Tensor | None, state: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Of keys (time, rows, d) to be saved in ``state``, and of their padding (rows, time), one row a sentence."""
        if "prev_key" in self._get_input_buffer(state):
            return key, padding
        beam = repeats(key)
        if beam > 1 and padding is not None and not torch.equal(padding, padding[::beam].repeat_interleave(beam, 0)):
            beam = 1
        self.set_incremental_state(state, "beam", {"size": beam} if beam > 1 else {})
        return key[:, ::beam], None if padding is None else padding[::beam]

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> dict[str, Any]:
        """As in fairseq. Shared keys stay where all sentences do."""
        beam = (self.get_incremental_state(incremental_state, "beam") or {}).get("size")
        if beam is None:
            return super().reorder_incremental_state(incremental_state, new_order)
        state, (sentences, stays) = self._get_input_buffer(incremental_state), by_sentence(new_order, beam)
        if stays and sentences is not None and len(sentences) == len(state["prev_key"]):
            return incremental_state
        if sentences is None:  # from here on each hypothesis has its own
            self.set_incremental_state(incremental_state, "beam", {"size": 1})
            sentences = new_order // beam
        state = {name: rows if rows is None else rows.index_select(0, sentences) for name, rows in state.items()}
        return self._set_input_buffer(incremental_state, state)
