"""Numbers that a training should not have, and a disk that is full while it saves, in fairseq's own Trainer."""

import errno
import logging
import time

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from admin_fairseq import AdminError, sub_layers, watch


@pytest.fixture
def training(build, tmp_path):
    """training() -> (Trainer whose optimizer is built, an update's samples)."""

    def training(arch="transformer_admin"):
        options = ["--save-dir", str(tmp_path), *(["--admin-init", "logn"] if "admin" in arch else [])]
        model, task, cfg = build(arch, *options)
        trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
        batches = trainer.get_train_iterator(epoch=1).next_epoch_itr(shuffle=False)
        trainer.lr_step(1)
        return trainer, [next(batches)]

    return training


def last(trainer, stack="decoder"):
    return list(sub_layers(trainer.get_model().stacks()[stack]).values())[-1]


BREAK = {
    "omega of decoder.layers.1.ffn": lambda trainer: last(trainer).omega.data[0].fill_(float("nan")),
    "the residual branch of encoder.layers.2.ffn": lambda trainer: (
        trainer.get_model().encoder.layers[2].fc2.weight.data.fill_(float("inf"))
    ),
    "the shortcut of encoder.layers.0.self_attn": lambda trainer: (
        trainer.get_model().encoder.embed_tokens.weight.data.fill_(float("nan"))
    ),
    "the weight decoder.output_projection.weight": lambda trainer: (
        trainer.get_model().decoder.output_projection.weight.data.fill_(float("nan"))
    ),
}


@pytest.mark.parametrize("where", BREAK)
def test_numbers_that_are_not_finite_are_named(training, tmp_path, where):
    trainer, samples = training()
    trainer.train_step(samples)
    (tmp_path / "checkpoint7.pt").touch()
    torch.save({}, tmp_path / "checkpoint6.pt")
    BREAK[where](trainer)
    with pytest.raises(AdminError) as error:
        trainer.train_step(samples)
    line = str(error.value)
    assert line.startswith(f"update 2: {where} is not finite (gradients are Nan/Inf); try a lower --lr,")
    assert line.endswith(f"by --restore-file {tmp_path}/checkpoint6.pt, the newest checkpoint there")


def test_other_models_name_a_weight(training):
    trainer, samples = training("transformer")
    trainer.get_model().decoder.layers[0].fc1.bias.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"update 1: the weight decoder\.layers\.0\.fc1\.bias is not finite"):
        trainer.train_step(samples)


def test_omega_at_zero_is_warned_of_once_and_a_broken_one_ends_training(training, caplog):
    trainer, samples = training()
    last(trainer).omega.data[3] = -0.5
    for _ in range(2):
        trainer.set_num_updates(0)
        trainer.train_step(samples)
    lines = [line for line in caplog.messages if "is down to" in line]
    assert len(lines) == 1
    assert lines[0].startswith("update 1: omega of decoder.layers.1.ffn is down to -0.5")
    trainer.set_num_updates(201)
    last(trainer).omega.data[3] = float("inf")
    with pytest.raises(AdminError, match=r"update 201: omega of decoder\.layers\.1\.ffn is not finite"):
        watch.watch_omega(trainer)
    trainer.set_num_updates(202)
    watch.watch_omega(trainer)  # not looked at


def test_the_first_update_of_a_process_is_looked_at(training, caplog):
    trainer, samples = training()
    trainer.set_num_updates(3)  # as from a checkpoint
    last(trainer).omega.data[3] = -0.5
    trainer.train_step(samples)
    assert [line for line in caplog.messages if line.startswith("update 4: omega of decoder.layers.1.ffn is down to")]


def test_a_full_disk_ends_in_one_line(training, tmp_path, monkeypatch, caplog):
    trainer, _ = training()
    torch.save({}, tmp_path / "checkpoint6.pt")

    def full(obj, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    iterator = trainer.get_train_iterator(epoch=1)
    iterator.next_epoch_itr(shuffle=False)
    with pytest.raises(AdminError) as error, caplog.at_level(logging.ERROR):
        checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, 1.0)
    assert str(error.value) == (
        f"cannot write a checkpoint to {tmp_path}: No space left on device; go on from {tmp_path}/checkpoint6.pt, the"
        " newest that is whole, by --restore-file"
    )
    assert not [record for record in caplog.records if "Traceback" in record.getMessage()]
    assert not list(tmp_path.glob("*.tmp"))


def test_half_a_checkpoint_names_a_whole_one(training, tmp_path):
    torch.save({"model": {}}, tmp_path / "checkpoint6.pt")
    whole = (tmp_path / "checkpoint6.pt").read_bytes()
    (tmp_path / "checkpoint_last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdminError, match=r"checkpoint_last\.pt is not a .*; \S+checkpoint6\.pt is whole"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
