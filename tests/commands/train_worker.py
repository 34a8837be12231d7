"""fairseq-train for tests with several workers on a machine without GPUs.

Removes the obstacles that only a CPU has (fairseq selects a worker's GPU, names it to PyTorch's DDP, and spawns as many
workers as there are GPUs), and writes every worker's omegas, as they are before its first update, to $OMEGAS/<rank>.pt.
"""

import os

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main
from torch.nn.parallel import DistributedDataParallel


class CpuDistributedDataParallel(DistributedDataParallel):
    def __init__(self, *args, device_ids=None, output_device=None, **kwargs):
        super().__init__(*args, **kwargs)


train_step = Trainer.train_step
distributed_main = distributed_utils.distributed_main


def recording_train_step(trainer, *args, **kwargs):
    path = os.path.join(os.environ["OMEGAS"], f"{trainer.data_parallel_rank}.pt")
    if not os.path.exists(path):
        state = trainer.get_model().state_dict()
        torch.save({name: weight for name, weight in state.items() if name.endswith(".omega")}, path)
    return train_step(trainer, *args, **kwargs)


def distributed_main_that_leaves(*args):
    """fairseq leaves gloo's threads running when a worker ends; on a busy machine that can abort it."""
    distributed_main(*args)
    torch.distributed.destroy_process_group()


# at the top level: spawned workers import this file too
distributed_fairseq_model.DistributedDataParallel = CpuDistributedDataParallel
if not torch.cuda.is_available():
    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = lambda device: None
Trainer.train_step = recording_train_step
distributed_utils.distributed_main = distributed_main_that_leaves

if __name__ == "__main__":
    cli_main()
