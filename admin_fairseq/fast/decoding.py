"""Attention at a step of incremental decoding: keys and values stay where they were written.

fairseq copies all keys and values of a search twice a step: in the new order of the hypotheses, and once more with
those of the last token behind them. Here each layer writes what is new, and :class:`admin_fairseq.fast.beams.Beams`
says who sees what.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from admin_fairseq.fast import dropout
from admin_fairseq.fast.beams import Beams, by_sentence, repeats
from admin_fairseq.fast.measured import wanted

SEARCH = "admin.search"  # in an incremental state: the size of its beams, and those of the first step
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
ROOM = 8  # steps for which there is room at first


class Past:
    """A layer's keys and values of all hypotheses, in slots: (sentences, room, d) each."""

    def __init__(self, beams: Beams, like: Tensor) -> None:
        self.beams = beams
        self.slots = 0
        sentences, size, _ = beams.seen.shape
        self.keys, self.values = (like.new_empty(sentences, ROOM * size, like.shape[-1]) for _ in range(2))

    @property
    def is_written(self) -> bool:
        """Whether this step's keys and values are here."""
        return self.slots == self.beams.seen.shape[2]

    def follow(self, beams: Beams) -> None:
        """Come to the step of these beams, which are those after the present ones."""
        self.beams = beams
        if beams.kept is not None:
            sentences, slots = beams.kept
            self.slots = slots.shape[1]
            self.keys, self.values = (self._with_room(rows[sentences, slots]) for rows in (self.keys, self.values))

    def write(self, keys: Tensor, values: Tensor) -> None:
        """The keys and values (1, hypotheses, d) of this step."""
        sentences, size, slots = self.beams.seen.shape
        if slots > self.keys.shape[1]:
            self.keys, self.values = (self._with_room(rows[:, : self.slots]) for rows in (self.keys, self.values))
        for rows, new in ((self.keys, keys), (self.values, values)):
            rows[:, self.slots : slots] = new.view(sentences, size, -1)
        self.slots = slots

    def _with_room(self, rows: Tensor) -> Tensor:
        sentences, slots, d = rows.shape
        result = rows.new_empty(sentences, max(2 * slots, ROOM * self.beams.size), d)
        result[:, :slots] = rows
        return result

    def of_each(self) -> list[Tensor]:
        """Keys and values as fairseq has them, a copy for each hypothesis: (hypotheses, steps, d)."""
        sentences, size, _ = self.beams.seen.shape
        seen = self.beams.seen[:, :, : self.slots].flatten(0, 1)
        slots = seen.nonzero()[:, 1].view(len(seen), -1)
        sentence = torch.arange(sentences, device=seen.device).repeat_interleave(size)[:, None]
        return [rows[sentence, slots] for rows in (self.keys, self.values)]


def reason_against(attention: MultiheadAttention) -> str | None:
    """Why this attention is always fairseq's own, if it is."""
    if attention.use_xformers:
        return "xFormers"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "extra keys"
    for name in PROJECTIONS:
        projection = getattr(attention, name)
        if type(projection) is not nn.Linear or projection._forward_pre_hooks or projection._forward_hooks:
            return "quantised or hooked projections"
    return None


class StepAttention(MultiheadAttention):
    """fairseq's attention, at steps of decoding over the slots of a beam, or over one row of keys a sentence.

    What is saved turns into fairseq's own state where its ``forward`` takes over: after padding among the tokens, for
    weights, or when an order of hypotheses separates those of a sentence.
    """

    # set by speed_up
    mode: str  # --admin-fast
    of_padding: Callable[[Tensor], bool]  # whether a padding mask hides something

    def is_usual(self) -> bool:
        """Whether there is nothing about this attention that only fairseq's own ``forward`` knows."""
        is_plain = not (self.skip_embed_dim_check or self.onnx_trace or self.beam_size > 1)
        return is_plain and reason_against(self) is None

    def step(
        self, query: Tensor, key: Tensor, padding: Tensor | None, is_static: bool, incremental_state: dict[str, Any]
    ) -> Tensor | None:
        """Attention of one token, (1, hypotheses, d), to keys as fairseq passes them; None: not served."""
        is_served = (
            len(query) == 1
            and not torch.is_grad_enabled()  # rows are written in place
            and wanted("beams", query.device, self.mode)
            and dropout.probability(self.dropout_module) == 0
            and self.is_usual()
        )
        if is_served and is_static:
            return self._to_output(query, key, padding, incremental_state)
        if is_served and key is query and padding is None:
            return self._to_past(query, incremental_state)
        return None

    def _to_past(self, query: Tensor, incremental_state: dict[str, Any]) -> Tensor | None:
        """Attention of a token to those before it and itself, (1, hypotheses, d); None: not served."""
        state = self._get_input_buffer(incremental_state)
        past: Past | None = state.get("past")
        if past is None:
            search = incremental_state.get(SEARCH)
            if state or search is None:
                return None
            if "beams" not in search:
                search["beams"] = Beams.first(search["size"], query.shape[1], query.device)
            past = Past(search["beams"], query)
            self._set_input_buffer(incremental_state, {"past": past})
        elif past.is_written:  # nobody gave an order
            unmoved = past.beams.after(None)
            assert unmoved is not None
            past.follow(unmoved)
        past.write(self.k_proj(query), self.v_proj(query))
        keys, values = (self._by_head(rows[:, : past.slots]) for rows in (past.keys, past.values))
        return self._attend(query, keys, values, past.beams.mask(query.dtype))

    def _to_output(
        self, query: Tensor, key: Tensor, padding: Tensor | None, incremental_state: dict[str, Any]
    ) -> Tensor:
        """Attention of a token to the encoder's output (time, hypotheses, d), which is looked at once."""
        state = self._get_input_buffer(incremental_state)
        if "prev_key" not in state:
            key, padding = self.shared(key, padding, incremental_state)
            rows = key.transpose(0, 1)
            keys, values = (self._by_head(projection(rows)) for projection in (self.k_proj, self.v_proj))
            state = {"prev_key": keys.contiguous(), "prev_value": values.contiguous()}
            state["prev_key_padding_mask"] = padding if padding is not None and self.of_padding(padding) else None
            self._set_input_buffer(incremental_state, state)
        padding = state["prev_key_padding_mask"]
        mask = None if padding is None else ~padding.bool()[:, None, None]
        return self._attend(query, state["prev_key"], state["prev_value"], mask)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Of (1, hypotheses, d) to keys and values (sentences, heads, slots, d / heads)."""
        q = self._by_head(self.q_proj(query).view(len(keys), -1, self.embed_dim))
        x = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).reshape(query.shape))

    def _by_head(self, x: Tensor) -> Tensor:
        """(sentences, slots, d) to (sentences, heads, slots, d / heads)."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def shared(self, key: Tensor, padding: Tensor | None, state: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Of keys (time, rows, d) to be saved in ``state``, and of their padding (rows, time), one row a sentence."""
        if "prev_key" in self._get_input_buffer(state):
            return key, None  # it is saved with the keys
        beam = repeats(key)
        if beam > 1 and padding is not None and not torch.equal(padding, padding[::beam].repeat_interleave(beam, 0)):
            beam = 1
        self.set_incremental_state(state, "beam", {"size": beam} if beam > 1 else {})
        return key[:, ::beam], None if padding is None else padding[::beam]

    def leave_to_fairseq(self, incremental_state: dict[str, Any]) -> None:
        """Make the saved state fairseq's."""
        past: Past | None = self._get_input_buffer(incremental_state).get("past")
        if past is not None:
            keys, values = (self._by_head(rows).contiguous() for rows in past.of_each())
            self._set_input_buffer(incremental_state, {"prev_key": keys, "prev_value": values})

    def reorder_incremental_state(self, incremental_state: dict[str, Any], new_order: Tensor) -> dict[str, Any]:
        """As in fairseq. Shared keys stay where all sentences do."""
        state = self._get_input_buffer(incremental_state)
        past: Past | None = state.get("past")
        if past is not None:
            beams = past.beams.after(new_order) if past.is_written else None
            if beams is not None:
                past.follow(beams)
                return incremental_state
            self.leave_to_fairseq(incremental_state)
        beam = (self.get_incremental_state(incremental_state, "beam") or {}).get("size")
        if beam is None:
            return super().reorder_incremental_state(incremental_state, new_order)
        sentences, stays = by_sentence(new_order, beam)
        if stays and sentences is not None and len(sentences) == len(state["prev_key"]):
            return incremental_state
        if sentences is None:  # from here on each hypothesis has its own
            self.set_incremental_state(incremental_state, "beam", {"size": 1})
            sentences = new_order // beam
        state = {name: rows if rows is None else rows.index_select(0, sentences) for name, rows in state.items()}
        return self._set_input_buffer(incremental_state, state)
