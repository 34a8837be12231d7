"""The optimizers of the authors' recipes: ``--optimizer radam`` and ``--optimizer novograd``, from kept libraries.

Their linear decay is fairseq's ``--lr-scheduler polynomial_decay`` with power 1, its default. And ``--optimizer adam``
with torch's fused kernel.
"""

# fairseq reads the types of the options at run time: no postponed annotations in this file
import ast
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import Adam, FairseqAdam
from omegaconf import II

from admin_fairseq.errors import AdminError

logger = logging.getLogger(__name__)

# The kinds of device on which FusedAdam was measured to help: on CPU it takes a third of the time of fairseq's loop.
# (It rounds otherwise; torch._foreach_* in the loop's order rounds alike, and takes up to twice its time.)
MEASURED = ("cpu",)


@dataclass
class AdamLikeConfig(FairseqDataclass):
    """fairseq's Adam options, under the same names."""

    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "decay rates of the two moments"})
    adam_eps: float = field(default=1e-8, metadata={"help": "added to the denominator"})
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    lr: List[float] = II("optimization.lr")  # noqa: RUF009


class AdamLike(FairseqOptimizer):
    @property
    def optimizer_config(self) -> Dict[str, Any]:
        """This run's settings, which override those in a checkpoint."""
        betas = self.cfg.adam_betas
        return {
            "lr": self.cfg.lr[0],
            "betas": tuple(ast.literal_eval(betas) if isinstance(betas, str) else betas),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }


@register_optimizer("radam", dataclass=AdamLikeConfig)
class RAdam(AdamLike):
    """Rectified Adam (Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond"): torch.optim.RAdam.

    Weight decay is decoupled, as in the authors' code. In the first five updates, before the rectification sets in,
    torch steps along the bare momentum where the authors' code does not move; behind a warmup from 1e-7 that is
    nothing. With half precision fairseq keeps fp32 masters (``--fp16``, ``--bf16``); it refuses
    ``--memory-efficient-fp16``, in which the moments would be kept in half precision.

    Raises:
        AdminError: weight decay with a torch older than 2.2, whose RAdam cannot decouple it.
    """

    supports_flat_params = True  # every element is updated by itself

    def __init__(self, cfg: AdamLikeConfig, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        decoupled = {"decoupled_weight_decay": True} if cfg.weight_decay else {}
        if decoupled and "decoupled_weight_decay" not in inspect.signature(torch.optim.RAdam).parameters:
            raise AdminError(f"--optimizer radam with --weight-decay needs torch 2.2 or newer, not {torch.__version__}")
        self._optimizer = torch.optim.RAdam(params, **self.optimizer_config, **decoupled)


@register_optimizer("novograd", dataclass=AdamLikeConfig)
class NovoGrad(AdamLike):
    """NovoGrad (Ginsburg et al. 2019, arXiv 1905.11286): pytorch_optimizer.NovoGrad.

    Its second moment is one number a parameter tensor, so with ``--fp16`` add ``--fp16-no-flatten-grads``.

    Raises:
        AdminError: the package pytorch-optimizer is not installed.
    """

    def __init__(self, cfg: AdamLikeConfig, params: Iterable[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        try:
            import pytorch_optimizer
        except ImportError as error:
            raise AdminError("--optimizer novograd needs a package: pip install pytorch-optimizer") from error
        self._optimizer = pytorch_optimizer.NovoGrad(params, **self.optimizer_config)


class FusedAdam(Adam):
    """fairseq's Adam in one kernel, torch's fused AdamW; equal to rounding, with the same state.

    fairseq adds eps to sqrt(v) before the bias correction, torch after it: with eps / sqrt(1 - beta2^t) both are the
    same. The kernel reads parameters and gradients as they lie in memory, in one dtype: an update that it cannot do is
    fairseq's own.
    """

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], torch.Tensor]] = None) -> Optional[torch.Tensor]:
        loss = None if closure is None else closure()
        if not all(_suits(group) for group in self.param_groups):
            super().step()
            return loss
        for group in self.param_groups:
            by_step: Dict[int, List[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    by_step.setdefault(self.state[p]["step"], []).append(p)
            for step, params in by_step.items():
                self._update(group, step, params)
        return loss

    def _update(self, group: Dict[str, Any], step: int, params: List[torch.nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        torch._fused_adamw_(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.full((), step + 1.0, device=params[0].device)] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"] / (1 - beta2 ** (step + 1)) ** 0.5,
            amsgrad=False,
            maximize=False,
        )
        for state in states:
            state["step"] += 1


def _suits(group: Dict[str, Any]) -> bool:
    params = [p for p in group["params"] if p.grad is not None]
    return (
        not group.get("amsgrad", False)  # apex writes none
        and {p.dtype for p in params} in (set(), {torch.float32}, {torch.float64})
        and not any(p.grad.is_sparse for p in params)
        and all(t.is_contiguous() for p in params for t in (p, p.grad))
    )


def fuse(optimizer: FairseqOptimizer) -> None:
    """Have an optimizer of fairseq's step by :class:`FusedAdam`: ``--optimizer adam`` without apex or --use-old-adam.

    ``--memory-efficient-fp16`` and ``--memory-efficient-bf16`` keep fairseq's loop, which casts one tensor at a time.
    Where this torch has no such kernel for the device, says so in the log and leaves the optimizer as it is.
    """
    optimizer = getattr(optimizer, "fp32_optimizer", optimizer)  # inside --fp16, --bf16 and --amp
    if type(optimizer) is not FairseqAdam or type(optimizer.optimizer) is not Adam or optimizer.cfg.use_old_adam:
        return
    device = optimizer.param_groups[0]["params"][0].device
    trial = torch.nn.Parameter(torch.zeros(1, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        FusedAdam([trial]).step()
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        logger.info(f"--admin-fast: fairseq's own Adam is used, torch has no fused one for {device.type} ({reason})")
        return
    optimizer.optimizer = FusedAdam(optimizer.param_groups, **optimizer.optimizer_config)
