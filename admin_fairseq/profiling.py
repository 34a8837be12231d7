"""The profiling pre-pass: from the variances of the residual branches to the first value of each omega.

Per stack, in forward order: omega_1 = 1, and each next omega by :func:`admin_fairseq.omega.next_omega` from the two
variances of the sub-layer before it. omega_i is applied at once, so deeper sub-layers are measured in the network that
will be trained. Padding positions are left out of every variance, which the authors' code does not do.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from functools import partial
from typing import Any, Callable, Dict, Iterator, NamedTuple, Sequence

import torch
from fairseq.modules import LayerDropModuleList
from torch import Tensor, nn
from tqdm import tqdm

from admin_fairseq.errors import AdminError
from admin_fairseq.model import AdminModel
from admin_fairseq.norm import OmegaLayerNorm
from admin_fairseq.omega import next_omega, observed, set_omega, sub_layers
from admin_fairseq.profile_file import STACKS, Profile
from admin_fairseq.turns import Turns


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
        self.turns = Turns([partial(self._forward, sample) for sample in samples])
        self.found = Profile(encoder=[], decoder=[], batches=len(samples), margin=model.margin)
        for variances in (self.found.branch_variance, self.found.shortcut_variance):
            variances.update({name: [] for name in STACKS})
        self._next_omega = dict.fromkeys(STACKS, 1.0)
        self._pooled: Tensor | None = None

    def run(self) -> Profile:
        observers = {
            norm: partial(self._observe, stack, name, norm)
            for stack, module in self.model.stacks().items()
            for name, norm in sub_layers(module).items()
        }
        with observed(observers):
            self.turns.run()
        return self.found

    def _forward(self, sample: Sample) -> None:
        torch.manual_seed(sample.seed)
        device = sample.net_input["src_tokens"].device
        # a thread starts with gradients on, autocast off and the first GPU (which -1 leaves as it is)
        with torch.no_grad(), torch.autocast("cuda", enabled=self.autocast), torch.cuda.device(device.index or -1):
            self.model(**sample.net_input, features_only=True)

    def _observe(self, stack: str, name: str, norm: OmegaLayerNorm, x: Tensor, f: Tensor) -> None:
        """x and f are (time, batch, d): the shortcut and the residual branch after dropout."""
        omega = self._next_omega[stack]
        set_omega([norm], [omega])

        sample = self.samples[self.turns.now]
        padding = self.model.stacks()[stack].padding_idx
        keep = sample.tokens(stack).ne(padding).t() & sample.counted  # (time, batch)
        moments = torch.stack([_moments((x * norm.omega)[keep]), _moments(f[keep])])
        self._pooled = moments if self._pooled is None else self._pooled + moments
        self.bar.update()

        if self.turns.now == len(self.samples) - 1:
            pooled, self._pooled = self.reduce(self._pooled), None
            shortcut, branch = _variance(pooled[0]), _variance(pooled[1])
            self._next_omega[stack] = next_omega(shortcut, branch, self.found.margin)
            if not math.isfinite(self._next_omega[stack]):
                raise AdminError(
                    f"profiling {stack}.{name}: Var[omega * x] = {shortcut}, Var[f] = {branch} on the first training"
                    " batch; check the data and --fp16, or start from --admin-init logn"
                )
            getattr(self.found, stack).append(omega)
            self.found.shortcut_variance[stack].append(shortcut)
            self.found.branch_variance[stack].append(branch)
            self.found.tokens[stack] = int(pooled[0, 0]) // x.shape[-1]
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
        hooks = module._forward_hooks.values()
        owners = [module, *(inspect.getclosurevars(hook).nonlocals.get("self") for hook in hooks)]
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
        found = _PrePass(model, [Sample(*sample) for sample in samples], reduce, bar).run()
    model.omega_source = "profiling"
    return found
