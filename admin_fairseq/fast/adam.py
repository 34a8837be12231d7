"""``--optimizer adam`` with torch's fused kernel.

On a CPU it takes a third of the time of fairseq's loop. It rounds otherwise; torch._foreach_* in the loop's order
rounds alike, and takes up to twice the kernel's time.
"""

from __future__ import annotations

import logging
from typing import Any, Callable

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.optim.adam import Adam, FairseqAdam

from admin_fairseq.errors import AdminError

logger = logging.getLogger(__name__)

MOMENTS = {"exp_avg", "exp_avg_sq"}


class FusedAdam(Adam):
    """fairseq's Adam in one kernel, torch's fused AdamW; equal to rounding, with the same state.

    fairseq adds eps to sqrt(v) before the bias correction, torch after it: with eps / sqrt(1 - beta2^t) both are the
    same. The kernel reads parameters and gradients as they lie in memory, in one dtype: an update that it cannot do is
    fairseq's own.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None if closure is None else closure()
        if not all(_suits(group) for group in self.param_groups):
            super().step()
            return loss
        for group in self.param_groups:
            by_step: dict[int, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    by_step.setdefault(self.state[p]["step"], []).append(p)
            for step, params in by_step.items():
                self._update(group, step, params)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A file's moments may lie in memory in ways that the kernel does not ask about: it would write beside them.

        Raises:
            AdminError: they are not of their parameters' shapes.
        """
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name in MOMENTS & state.keys():
                if getattr(state[name], "shape", None) != p.shape:
                    raise AdminError(
                        "its optimizer's state is of another model's weights; --reset-optimizer starts without it"
                    )
                state[name] = state[name].contiguous()

    def _update(self, group: dict[str, Any], step: int, params: list[torch.nn.Parameter]) -> None:
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


def _suits(group: dict[str, Any]) -> bool:
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
