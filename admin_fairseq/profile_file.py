"""What the pre-pass found, as a file: our ``admin_profile.json``, and the authors' ``profile.ratio.init``."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from admin_fairseq.errors import AdminError
from admin_fairseq.files import json_text, writing
from admin_fairseq.model import AdminModel
from admin_fairseq.omega import set_omega, sub_layers

logger = logging.getLogger(__name__)

VERSION = 1  # of the profile file
STACKS = ("encoder", "decoder")


def sub_layer_name(norm: str) -> str:
    """ "self_attn", "encoder_attn" or "ffn", of fairseq's name for its LayerNorm; what is before it stays."""
    return re.sub("final$", "ffn", norm[: -len("_layer_norm")])


@dataclass
class Profile:
    """omega's first values and what they were measured on.

    ``encoder`` and ``decoder`` hold one omega a sub-layer in forward order: 2 an encoder layer, 3 a decoder
    layer, 2 a language model's layer (and no encoder). ``branch_variance`` holds Var[dropout(f_i)] in the same
    order and ``shortcut_variance`` Var[omega_i * x_{i-1}], ``tokens`` the number of positions measured in each stack
    (padding left out, all batches and workers together). ``margin`` is the K that the omegas were made with
    (:func:`admin_fairseq.omega.next_omega`); the authors' is 1.
    """

    encoder: list[float]
    decoder: list[float]
    branch_variance: dict[str, list[float]] = field(default_factory=dict)
    shortcut_variance: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    margin: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: AdminModel) -> None:
        """Fill the model's omegas.

        Raises:
            AdminError: the profile is of a model of another depth.
        """
        for name in STACKS:
            expected = len(sub_layers(model.stacks()[name])) if name in model.stacks() else 0
            if len(getattr(self, name)) != expected:
                raise AdminError(
                    f"the profile has {len(getattr(self, name))} {name} sub-layers, the model {expected}"
                    " (2 an encoder layer, 3 a decoder layer, 2 a language model's layer); profile this model, or set"
                    " --encoder-layers and --decoder-layers to the profile's depth"
                )
        for name, stack in model.stacks().items():
            if getattr(self, name)[:1] not in ([], [1.0]):
                logger.warning(
                    f"the profile's first {name} omega, {getattr(self, name)[0]}, is not used: it is fixed at 1"
                )
            set_omega(sub_layers(stack).values(), [1.0, *getattr(self, name)[1:]])
        model.omega_source = "a profile"

    def with_margin(self, margin: float) -> Profile:
        """The same branches under another margin K': omega_i^2 + (K' - K) sum_{j<i} Var[f_j].

        Where Var[f] is not recorded, as in the authors' file, its sum is taken to be (omega_i^2 - 1) / K. A pre-pass
        with K' would find nearly the same: what a branch puts out depends little on the omegas before it.

        Raises:
            AdminError: an omega would not be positive.
        """
        changed = dataclasses.replace(self, margin=margin)
        for name in STACKS:
            omegas, variances = getattr(self, name), self.branch_variance.get(name)
            sums = [0.0, *itertools.accumulate(variances)] if variances else [(o**2 - 1) / self.margin for o in omegas]
            squares = [omega**2 + (margin - self.margin) * total for omega, total in zip(omegas, sums)]
            if not all(square > 0 for square in squares[1:]):
                raise AdminError(
                    f"--admin-margin {margin:g}: this profile's {name} omegas, below 1 and without Var[f], cannot be"
                    " taken to another margin; drop the option, or profile anew"
                )
            setattr(changed, name, [*omegas[:1], *map(math.sqrt, squares[1:])])
        return changed

    def shares(self, stack: str) -> list[float]:
        """Of each sub-layer's sum, the share of its branch: Var[f_i] / (Var[omega_i * x_{i-1}] + Var[f_i]).

        Empty where the variances were not recorded.
        """
        variances = zip(self.branch_variance.get(stack, []), self.shortcut_variance.get(stack, []))
        return [branch / max(shortcut + branch, 1e-300) for branch, shortcut in variances]

    def write(self, path: str) -> None:
        """Write JSON; the file appears whole or not at all.

        Raises:
            AdminError: it cannot be written.
        """
        with writing(path, f"the profile {path}") as out:
            out.write(json_text({"version": VERSION, **asdict(self)}).encode())


def read_profile(path: str, encoder_sub_layers: int | None = None, decoder_sub_layers: int | None = None) -> Profile:
    """Read our ``admin_profile.json`` or the authors' ``profile.ratio.init``.

    The authors write one omega a line, encoder first, with (Transformer-Clinic) or without (deepnmt) the
    sub-layer's number before it. The decoder begins where the numbers restart, or at the second omega 1;
    only where neither is there does ``encoder_sub_layers`` tell. In half precision their profiling measures the
    two first layers once more (their omega is still 1) and writes those five lines again at the end. The authors
    never read them, nor are they read here, where the numbers restart or ``decoder_sub_layers`` tells.

    Raises:
        AdminError: the file is missing or malformed, or an omega is not finite and positive.
    """
    try:
        with open(path, encoding="utf-8-sig") as lines:
            text = lines.read()
    except (OSError, UnicodeDecodeError) as error:
        raise AdminError(f"cannot read the profile {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        if text.lstrip().startswith("{"):
            content = json.loads(text)
            if content.get("version", VERSION) != VERSION:
                raise ValueError(f"version {content['version']!r:.20}; this admin_fairseq reads version {VERSION}")
            for name in STACKS:
                numbers = content[name]
                if not isinstance(numbers, list) or not {type(number) for number in numbers} <= {int, float}:
                    raise TypeError(f"{name} is not a list of numbers")
            encoder, decoder = ([float(omega) for omega in content[name]] for name in STACKS)
            profile = Profile(encoder, decoder, margin=float(content.get("margin", 1.0)))
            if not 0 < profile.margin < math.inf:
                raise ValueError(f"margin {profile.margin} is not positive")
            if isinstance(content.get("settings"), dict):
                profile.settings = content["settings"]
            for kind in ("branch_variance", "shortcut_variance"):
                for name, variances in content.get(kind, {}).items():
                    if len(variances) == len(content[name]):
                        getattr(profile, kind)[name] = [_variance(variance) for variance in variances]
        else:
            profile = _parse_authors_profile(text, encoder_sub_layers, decoder_sub_layers)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AdminError(
            f"the profile {path} is malformed ({type(error).__name__}: {str(error)[:100]});"
            ' expected an admin_profile.json with lists "encoder" and "decoder", or a profile.ratio.init'
        ) from error
    for name in STACKS:
        for number, omega in enumerate(getattr(profile, name), start=1):
            stored = torch.tensor(omega, dtype=torch.float32).item()
            if not (math.isfinite(stored) and stored > 0):
                raise AdminError(
                    f"the profile {path} holds omega {omega} for {name} sub-layer {number}; omega must be finite"
                    " and positive"
                )
    return profile


def _variance(number: Any) -> float:
    if not (isinstance(number, (int, float)) and 0 <= number < math.inf):
        raise ValueError(f"a variance is {number}")
    return float(number)


def _parse_authors_profile(text: str, encoder_sub_layers: int | None, decoder_sub_layers: int | None) -> Profile:
    rows = [[float(part) for part in line.split()] for line in text.splitlines() if line.strip()]
    if not rows or {len(row) for row in rows} not in ({1}, {2}):
        raise ValueError("expected one omega a line, or a number and an omega")
    omegas = [row[-1] for row in rows]
    ones = [index for index, row in enumerate(rows) if row[0] == 1.0]
    is_numbered = len(rows[0]) == 2
    split = ones[1] if len(ones) == 2 or (is_numbered and len(ones) > 2) else encoder_sub_layers
    if is_numbered and len(ones) > 2:
        end = ones[2]
    else:
        end = len(rows) if split is None or decoder_sub_layers is None else split + decoder_sub_layers
    if not (0 < len(rows) - end <= 5 and omegas[end] != 1.0):  # the first layers once more: two lines and three
        end = len(rows)
    if is_numbered:
        starts = [index for index in ones if index < end]
        expected = [n for first, last in zip(starts, [*starts[1:], end]) for n in range(1, last - first + 1)]
        if len(starts) > 2 or [row[0] for row in rows[:end]] != expected:
            raise ValueError("its numbers do not run from 1 for the encoder and from 1 again for the decoder")
    if split is None:
        raise ValueError("cannot tell where the decoder begins")
    return Profile(encoder=omegas[:split], decoder=omegas[split:end])
