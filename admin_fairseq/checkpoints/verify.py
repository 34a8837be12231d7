"""Two checkpoints' models side by side on real sentences: the largest difference of logits, and their translations."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any, Iterator, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from fairseq import tasks, utils
from fairseq.dataclass.configs import GenerationConfig
from torch import nn

from admin_fairseq.checkpoints.checks import Weights
from admin_fairseq.checkpoints.files import State, building, settings
from admin_fairseq.checkpoints.fold import fold
from admin_fairseq.errors import AdminError

# float64 shows that the two are the same function, float32 how well the file's rounded weights compute it
LARGEST_ABSOLUTE = 1e-9
# half-precision weights are rounded once more, each by up to half an eps, and logits sum over many of them
LARGEST_RELATIVE = {torch.float32: 1e-4, torch.float16: 64 * 2**-10, torch.bfloat16: 64 * 2**-7}


class Comparison(NamedTuple):
    """What was found, a line each, and what of it is wrong."""

    lines: list
    failures: list


def compare(state: State, folded: State, data: str, sentences: int = 200, untie: bool = False) -> Comparison:
    """An Admin checkpoint beside its fold on the first sentences of DATA's test split, or valid without one.

    The lines give the largest absolute and relative difference of logits, in float64 (of the fold computed in float64)
    and in float32 (of the file's weights), and how many translations by beam search (beam 5, float32) are the same.
    Relative is to the largest logit of the batch. Language models have no translations. A failure is a difference
    larger than rounding explains, or a translation that differs.

    Raises:
        AdminError: there is no sentence, or a model computes no numbers.
    """
    task, dataset = load_data(settings(state), data, "test", "valid")
    exact = fold({**state, "model": _to(state["model"], torch.float64)}, untie)
    weights = next(weight for weight in folded["model"].values() if weight.is_floating_point())
    lines, failures = [], []
    for dtype, other in ((torch.float64, exact), (torch.float32, folded)):
        pair = [load_model(part, task, dtype) for part in (state, other)]
        batches = first_batches(dataset, task, pair[0], sentences, size=20)
        # fairseq takes the softmax of attention in float32, whatever the model's dtype
        softmax = _softmax if dtype == torch.float64 else utils.softmax
        absolute = relative = 0.0
        with mock.patch.object(utils, "softmax", softmax), torch.no_grad():
            for batch in batches:
                one, two = (model(**batch["net_input"])[0] for model in pair)
                difference = (one - two).abs().max().item()
                if not math.isfinite(difference):
                    raise AdminError(
                        f"the models' logits on DATA are not finite in {str(dtype)[6:]}: nothing to compare"
                    )
                absolute, relative = max(absolute, difference), max(relative, difference / one.abs().max().item())
        lines.append(f"{str(dtype)[6:]}: largest difference of logits {absolute:.1e} absolute, {relative:.1e} relative")
        limit = LARGEST_ABSOLUTE if dtype == torch.float64 else LARGEST_RELATIVE[weights.dtype]
        found = absolute if dtype == torch.float64 else relative
        if not found <= limit:
            failures.append(f"logits differ by {found:.1e} in {str(dtype)[6:]}, more than {limit:.1e}")
    if hasattr(pair[0], "encoder"):
        one, two = (_translations(model, task, batches) for model in pair)
        same = sum(a == b for a, b in zip(one, two))
        lines.append(f"beam search: {same} of {len(one)} translations are the same")
        if same < len(one):
            failures.append(f"{len(one) - same} of {len(one)} translations differ")
    return Comparison(lines, failures)


def load_data(args: Namespace, data: str, *splits: str) -> tuple[Any, Any]:
    """The task of these settings on a data-bin, and the first of its splits that is there."""
    args.data = data
    with building("task"):
        task = tasks.setup_task(args)
    for split in splits:
        try:
            task.load_dataset(split)
            return task, task.dataset(split)
        except FileNotFoundError:
            if split == splits[-1]:
                raise
    raise AssertionError("no split was named")


def first_batches(dataset: Any, task: Any, model: nn.Module, sentences: int, size: int) -> list[dict[str, Any]]:
    """The first sentences of those that are no longer than the model's positions, ``size`` in a batch.

    Raises:
        AdminError: there is none.
    """
    limit = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    chosen, _ = dataset.filter_indices_by_size(np.arange(len(dataset)), limit)
    chosen = chosen[: max(sentences, 0)]
    if not len(chosen):
        raise AdminError("there is no sentence to compare")
    return [dataset.collater([dataset[i] for i in chosen[at : at + size]]) for at in range(0, len(chosen), size)]


def load_model(state: State, task: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The checkpoint's model, to evaluate.

    Raises:
        AdminError: its weights do not fit, as when the data has another dictionary.
    """
    with building("model"):
        model = task.build_model(settings(state)).to(dtype)
    try:
        model.load_state_dict(_to(state["model"], dtype))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise AdminError(
            f"the weights do not fit a model for DATA; is it the one of the training? ({reason})"
        ) from error
    for module in model.modules():
        module.can_use_fastpath = False  # fairseq 0.12.2's own encoder fails there with torch 1.13 and newer
    return model.eval()


def _to(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: weight.to(dtype) if weight.is_floating_point() else weight for name, weight in weights.items()}


def _softmax(x: torch.Tensor, dim: int, onnx_trace: bool = False) -> torch.Tensor:
    return F.softmax(x, dim=dim)


def _translations(model: nn.Module, task: Any, batches: list[dict[str, Any]]) -> list[list[int]]:
    generator = task.build_generator([model], GenerationConfig(beam=5))
    found: Iterator[Any] = (best for batch in batches for best in task.inference_step(generator, [model], batch))
    return [best[0]["tokens"].tolist() for best in found]
