"""The optimizers of the authors' recipes: ``--optimizer radam`` and ``--optimizer novograd``, from kept libraries.

Their linear decay is fairseq's ``--lr-scheduler polynomial_decay`` with power 1, its default.
"""

# fairseq reads the types of the options at run time: no postponed annotations in this file
import ast
import inspect
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II

from admin_fairseq.errors import AdminError


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
