"""The profiling pre-pass: from the variances of the residual branches to the first value of each omega.

Per stack, in forward order, starting from r = 1:

    omega_i = r;   r = sqrt(Var[omega_i * x_{i-1}] + Var[dropout(f_i)])

omega_i is applied at once, so deeper sub-layers are measured in the network that will be trained. Since
Var[x_{i-1}] is 1 behind a LayerNorm, omega_i is about sqrt(1 + sum_{j<i} Var[f_j]). The rule is the authors'
(Liu et al. 2020, section 4.3, and their code); padding positions are left out of every variance here.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import threading
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Callable, Dict, Iterator, NamedTuple, Sequence

import torch
from fairseq.modules import LayerDropModuleList
from torch import Tensor, nn
from tqdm import tqdm

from admin_fairseq.errors import AdminError
from admin_fairseq.files import json_text, writing
from admin_fairseq.model import AdminModel, set_omega, sub_layers
from admin_fairseq.norm import OmegaLayerNorm

logger = logging.getLogger(__name__)

VERSION = 1  # of the profile file
STACKS = ("encoder", "decoder")


class Sample(NamedTuple):
    """One batch for the pre-pass.

    ``net_input`` holds the model's keyword arguments, with ``src_tokens`` and for an encoder-decoder model
    ``prev_output_tokens``, both (batch, time), on the model's device. ``counted`` says whether the batch enters
    the statistics (fairseq's dummy batch does not). Its dropout masks are drawn from ``seed``.
    """

    net_input: Dict[str, Any]  # noqa: UP006  (Python 3.8 evaluates a NamedTuple's types)
    counted: bool = True
    seed: int = 1

    def tokens(self, stack: str) -> Tensor:
        """The stack's input tokens, (batch, time); a language model's decoder reads src_tokens."""
        decoder_only = "prev_output_tokens" not in self.net_input
        return self.net_input["src_tokens" if stack == "encoder" or decoder_only else "prev_output_tokens"]


@dataclass
class Profile:
    """omega's first values and what they were measured on.

    ``encoder`` and ``decoder`` hold one omega a sub-layer in forward order: 2 an encoder layer, 3 a decoder
    layer, 2 a language model's layer (and no encoder). ``branch_variance`` holds Var[dropout(f_i)] in the same
    order, ``tokens`` the number of positions measured in each stack (padding left out, all batches and workers
    together).
    """

    encoder: list[float]
    decoder: list[float]
    branch_variance: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    batches: int = 0
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

    def shares(self, stack: str) -> list[float]:
        """Of each sub-layer's sum, the share of its branch: Var[f_i] / (Var[omega_i * x_{i-1}] + Var[f_i]).

        The sum is omega_{i+1}^2, by the rule; the last sub-layer's input has variance 1. Empty where Var[f] is unknown.
        """
        omegas, branches = getattr(self, stack), self.branch_variance.get(stack, [])
        sums = [omega**2 for omega in omegas[1:]] + [omegas[-1] ** 2 + branches[-1]] if branches else []
        return [branch / total for branch, total in zip(branches, sums)]

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
                raise ValueError(f"version {content['version']}; this admin_fairseq reads version {VERSION}")
            for name in STACKS:
                numbers = content[name]
                if not isinstance(numbers, list) or not {type(number) for number in numbers} <= {int, float}:
                    raise TypeError(f"{name} is not a list of numbers")
            profile = Profile(**{name: [float(omega) for omega in content[name]] for name in STACKS})
            for name, variances in content.get("branch_variance", {}).items():
                if len(variances) == len(content[name]):
                    profile.branch_variance[name] = [float(variance) for variance in variances]
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


class _Turns:
    """Runs functions in threads of which only one runs at a time; :meth:`next` hands over to the next.

    So several batches go through the model in step, sub-layer by sub-layer, their statistics pooled as if
    they were one batch, in an order that is always the same (dropout draws from one random generator).
    """

    def __init__(self, functions: Sequence[Callable[[], None]]) -> None:
        self.functions = functions
        self.now = 0
        self._error: BaseException | None = None
        self._may_run = [threading.Semaphore(0) for _ in functions]

    def run(self) -> None:
        if len(self.functions) == 1:  # next() then gives the turn back to its caller
            return self.functions[0]()
        threads = [
            threading.Thread(target=self._thread, args=(number,), daemon=True) for number in range(len(self.functions))
        ]
        for thread in threads:
            thread.start()
        self._may_run[0].release()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def next(self) -> None:
        me = self.now
        self._hand_over()
        self._may_run[me].acquire()
        if self._error is not None:
            raise self._error

    def _thread(self, number: int) -> None:
        self._may_run[number].acquire()
        try:
            if self._error is None:
                self.functions[number]()
        except BaseException as error:  # run() raises it in the caller's thread
            self._error = error
        self._hand_over()

    def _hand_over(self) -> None:
        self.now = (self.now + 1) % len(self.functions)
        self._may_run[self.now].release()


def _moments(values: Tensor) -> Tensor:
    """[count, sum, sum of squares] of all elements, in float64; moments of parts add up."""
    values = values.double()
    return torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])


def _variance(moments: Tensor) -> float:
    """Population variance, as the authors' numpy.var; not a number where nothing was counted."""
    count, total, squares = moments.tolist()
    return squares / count - (total / count) ** 2 if count else math.nan


class _PrePass:
    """Observes every sub-layer of a model and sets its omega before it is applied."""

    def __init__(
        self, model: AdminModel, samples: Sequence[Sample], reduce: Callable[[Tensor], Tensor], bar: tqdm
    ) -> None:
        self.model, self.samples, self.reduce, self.bar = model, samples, reduce, bar
        self.autocast = torch.is_autocast_enabled()
        self.devices = sorted({s.net_input["src_tokens"].device.index for s in samples} - {None})  # GPUs
        self.turns = _Turns([partial(self._forward, sample) for sample in samples])
        self.omega: dict[str, list[float]] = {name: [] for name in STACKS}
        self.branch_variance: dict[str, list[float]] = {name: [] for name in STACKS}
        self.tokens: dict[str, int] = {}
        self._next_omega = dict.fromkeys(STACKS, 1.0)
        self._pooled: Tensor | None = None

    def run(self) -> None:
        norms = {
            norm: partial(self._observe, stack, name)
            for stack, module in self.model.stacks().items()
            for name, norm in sub_layers(module).items()
        }
        try:
            for norm, observer in norms.items():
                norm.observer = observer
            self.turns.run()
        finally:
            for norm in norms:
                norm.observer = None

    def _forward(self, sample: Sample) -> None:
        torch.manual_seed(sample.seed)
        device = sample.net_input["src_tokens"].device
        # a thread starts with gradients on, autocast off and the first GPU (which -1 leaves as it is)
        with torch.no_grad(), torch.autocast("cuda", enabled=self.autocast), torch.cuda.device(device.index or -1):
            self.model(**sample.net_input, features_only=True)

    def _observe(self, stack: str, name: str, norm: OmegaLayerNorm, x: Tensor, f: Tensor) -> None:
        """x and f are (time, batch, d): the shortcut and the residual branch after dropout."""
        omega = self._next_omega[stack]
        norm.omega.fill_(omega)

        sample = self.samples[self.turns.now]
        padding = self.model.stacks()[stack].padding_idx
        keep = sample.tokens(stack).ne(padding).t() & sample.counted  # (time, batch)
        moments = torch.stack([_moments((x * norm.omega)[keep]), _moments(f[keep])])
        self._pooled = moments if self._pooled is None else self._pooled + moments
        self.bar.update()

        if self.turns.now == len(self.samples) - 1:
            pooled, self._pooled = self.reduce(self._pooled), None
            shortcut, branch = _variance(pooled[0]), _variance(pooled[1])
            self._next_omega[stack] = math.sqrt(shortcut + branch) if shortcut + branch > 0 else math.nan
            if not math.isfinite(self._next_omega[stack]):
                raise AdminError(
                    f"profiling {stack}.{name}: Var[omega * x] = {shortcut}, Var[f] = {branch} on the first training"
                    " batch; check the data and --fp16, or start from --admin-init logn"
                )
            self.omega[stack].append(omega)
            self.branch_variance[stack].append(branch)
            self.tokens[stack] = int(pooled[0, 0]) // x.shape[-1]
        with torch.random.fork_rng(self.devices):  # the other batches draw in between
            self.turns.next()


@contextlib.contextmanager
def _as_measured(model: AdminModel) -> Iterator[None]:
    """Train mode, but no layer dropped and no quantisation noise; everything is put back."""
    was_training = model.training
    model.train()
    quantizers: list[Any] = []
    for module in model.modules():
        # LayerDrop would skip sub-layers; --quant-noise-pq overwrites the weights of the linear maps it is applied to
        if isinstance(module, (LayerDropModuleList, nn.Linear)):
            module.training = False
        # --quant-noise-scalar puts modules with such a counter in their place, and hooks on their outputs
        owners = [module] if hasattr(module, "update_step") else []
        owners += [inspect.getclosurevars(hook).nonlocals.get("self") for hook in module._forward_hooks.values()]
        quantizers += [owner for owner in owners if hasattr(owner, "update_step")]
    states = [{name: vars(owner)[name] for name in QUANTIZER_STATE if name in vars(owner)} for owner in quantizers]
    try:
        for owner in quantizers:
            owner.p = 0
        yield
    finally:
        model.train(was_training)
        for owner, state in zip(quantizers, states):
            for name in QUANTIZER_STATE:
                vars(owner).pop(name, None)
            vars(owner).update(state)


QUANTIZER_STATE = ("p", "counter", "scale", "zero_point")


def profile(
    model: AdminModel,
    samples: Sequence[Sample],
    reduce: Callable[[Tensor], Tensor] = lambda moments: moments,
    progress: bool = False,
) -> Profile:
    """Run the pre-pass: one forward pass a sample, in train mode and without gradients, and set every omega.

    All samples, and with ``reduce`` those of all workers, count as one batch: the same samples give the same
    omega however they are spread over workers. Everything but omega and torch's random generators is left as
    it was found.

    Args:
        samples: the batches, as :class:`Sample` or as tuples of its fields.
        reduce: sums a small float64 tensor over all workers.
        progress: show a bar on stderr once the pre-pass takes longer than three seconds.

    Raises:
        AdminError: a variance is not finite.
    """
    total = len(samples) * sum(len(sub_layers(stack)) for stack in model.stacks().values())
    with _as_measured(model), tqdm(
        total=total, desc="Admin pre-pass", unit="sub-layer", delay=3, disable=not progress
    ) as bar:
        pre_pass = _PrePass(model, [Sample(*sample) for sample in samples], reduce, bar)
        pre_pass.run()
    model.omega_source = "profiling"
    return Profile(
        **pre_pass.omega, branch_variance=pre_pass.branch_variance, tokens=pre_pass.tokens, batches=len(samples)
    )
