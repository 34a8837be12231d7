"""omega in fairseq's own metrics, for TensorBoard, Weights & Biases, Aim and Azure ML.

Each sub-layer has a mean and a standard deviation over its dimensions, as
``omega_mean/decoder.layers.0.self_attn`` and ``omega_std/decoder.layers.0.ffn``. They are metrics that fairseq
derives when it reports, so other steps cost nothing, and that it does not write into checkpoints.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.trainer import Trainer

from admin_fairseq.model import AdminModel
from admin_fairseq.omega import sub_layers
from admin_fairseq.profile_file import sub_layer_name

PREFIXES = ("omega_mean/", "omega_std/")


def statistics(model: AdminModel) -> dict[str, float]:
    """Mean and population standard deviation of every omega, by the metric's name; one transfer to the host."""
    names, values = [], []
    for stack_name, stack in model.stacks().items():
        norms = sub_layers(stack)
        if norms:
            omegas = torch.stack([norm.omega.detach() for norm in norms.values()]).float()
            deviations, means = torch.std_mean(omegas, dim=1, unbiased=False)
            values += [means, deviations]
            names += [f"{prefix}{stack_name}.{sub_layer_name(name)}" for prefix in PREFIXES for name in norms]
    return dict(zip(names, torch.cat(values).tolist())) if values else {}


def log_omega(trainer: Trainer) -> None:
    """Add the metrics to those of training, if something that draws them listens to this worker."""
    common = trainer.cfg.common
    sinks = ("tensorboard_logdir", "wandb_project", "aim_repo", "azureml_logging")
    if not trainer.is_data_parallel_master or not any(getattr(common, sink, None) for sink in sinks):
        return
    model = trainer.get_model()

    @functools.lru_cache(maxsize=1)
    def at(update: int) -> dict[str, float]:
        return statistics(model)

    with metrics.aggregate("train"), metrics.aggregate("train_inner"):
        for name in at(trainer.get_num_updates()):
            metrics.log_derived(name, lambda _, name=name: at(trainer.get_num_updates())[name])


def without_omega(stats: dict[str, Any]) -> dict[str, Any]:
    """Without these metrics, of which there are hundreds: what the console and the log file show."""
    # at the end of an epoch JsonProgressBar puts train_ before each name
    return {name: stat for name, stat in stats.items() if not any(prefix in name for prefix in PREFIXES)}
