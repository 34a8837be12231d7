"""Mutations of real checkpoints and profiles, each a short list of numbers that says where and what."""

from __future__ import annotations

import copy
import io
from argparse import Namespace
from typing import Any, Callable, List, Tuple

import torch
from hypothesis import strategies as st

Mutation = List[Tuple[int, int, int]]  # where, how, with what; each modulo what there is
NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [
    *(None, 0, -1, 3, 2**40, 1.5, NAN, INF, True, "", "text", "../x", "a b", b"bytes", [], {}, [1], {"a": 1}, {1: 2}),
    *("__import__('os').abort()", "[[1]]", "${oc.env:HOME}", "x" * 1000, (1, "a"), Namespace(), Namespace(a=1)),
    *(torch.tensor(NAN), torch.tensor(3), torch.ones(0), torch.ones(3), torch.ones(2, 3), torch.ones(2, 0, 3)),
    *(torch.ones(32).half(), torch.ones(32, dtype=torch.int64), torch.ones(32).bool(), torch.ones(32, 32) * INF),
    *(torch.ones(2, dtype=torch.complex64), torch.zeros(32), -torch.ones(32), torch.ones(32).double()),
    *("transformer", "transformer_admin", "transformer_lm", "translation", "language_modeling", "fconv", 10**9),
]
NAMES: list[Any] = [
    *("model", "args", "cfg", "extra_state", "ema", "arch", "task", "_name", "encoder", "quant_noise", 0, None, ""),
    *("encoder.layers.0.self_attn_layer_norm.omega", "decoder.layers.x.final_layer_norm.omega", "a_layer_norm.omega"),
    *("encoder.layers.00.fc1.weight", "encoder.layers.99999.fc1.weight", "decoder.layers.1.extra_layer_norm.omega"),
    *("encoder.embed_positions.weight", "decoder.version", "encoder.layers.0.self_attn.in_proj_weight"),
]
SHAPES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    *(torch.Tensor.half, torch.Tensor.double, torch.Tensor.bfloat16, torch.Tensor.long, torch.Tensor.bool),
    *(
        lambda x: x[None],
        lambda x: x.flatten(),
        lambda x: x.flatten()[:1],
        lambda x: x.flatten()[:0],
        lambda x: x * NAN,
    ),
    *(lambda x: x * INF, lambda x: x * 0, lambda x: -x, lambda x: x.t() if x.dim() == 2 else x, lambda x: x.sum()),
    *(lambda x: torch.cat([x, x]) if x.dim() else x, lambda x: x.flatten()[:1].expand(5).clone(), lambda x: x * 1e30),
]
mutations = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=3
)


def places(value: Any, found: list[tuple[Any, Any]] | None = None, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested dictionaries, lists and namespaces; those near the top once more each level."""
    found = [] if found is None else found
    items: Any = ()
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, each in items:
        found += [(value, key)] * max(1, 30 // 4**depth)  # a few keys at the top, hundreds of weights
        places(each, found, depth + 1)
    return found


def mutated(state: Any, mutation: Mutation) -> Any:
    """A copy with some places changed, removed, renamed or exchanged."""
    state = copy.deepcopy(state)
    for where, how, what in mutation:
        all_places = places(state)
        if not all_places:
            break
        container, key = all_places[where % len(all_places)]
        value, how = container[key], how % 8
        if how < 2 and isinstance(value, torch.Tensor):
            container[key] = SHAPES[what % len(SHAPES)](value)
        elif how < 4:
            container[key] = copy.deepcopy(ODD[what % len(ODD)])
        elif how == 4:
            del container[key]
        elif how == 5 and isinstance(container, dict):
            container[NAMES[what % len(NAMES)]] = container.pop(key)
        elif how == 6 and isinstance(container, dict) and isinstance(key, str):
            parts = key.split(".")
            parts[what % len(parts)] = ("", "0", "1", "7", "encoder", "x")[what % 6]
            container[".".join(parts)] = value
        else:
            other, name = all_places[what % len(all_places)]
            if name in other if isinstance(other, dict) else name < len(other):
                container[key] = copy.deepcopy(other[name])
    return state


def saved(state: Any) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def bent(content: bytes, mutation: Mutation) -> bytes:
    """Other bytes, more, or fewer."""
    data = bytearray(content)
    for where, how, what in mutation:
        # half of all places in the last part, where an archive has its table, or the first, where its pickle is
        at = where % max(len(data), 1)
        at = at if where % 2 else (len(data) - 1 - where % 2000 if where % 4 else where % 3000) % max(len(data), 1)
        if how % 4 == 0 and data:
            data[at] ^= 1 << what % 8
        elif how % 4 == 1 and data:
            data[at] = what % 256
        elif how % 4 == 2:
            data[at:at] = bytes(what % 256 for _ in range(what % 9))
        else:
            del data[at : at + 1 + what % 64]
    return bytes(data)


def with_words(text: str, mutation: Mutation) -> str:
    """A text file's words exchanged for odd ones."""
    words = [
        "nan",
        "inf",
        "-1",
        "0",
        "1e999",
        "-0.0",
        "[]",
        "{}",
        "null",
        "true",
        "x",
        "1.0 1.0",
        "",
        '"a"',
        "1e-30",
        "}",
    ]
    for where, how, what in mutation:
        parts = text.replace("\n", " \n ").split(" ")
        at = where % len(parts)
        if how % 3 == 0:
            parts[at] = words[what % len(words)]
        elif how % 3 == 1:
            del parts[at]
        else:
            parts.insert(at, parts[what % len(parts)])
        text = " ".join(parts).replace(" \n ", "\n")
    return text
