"""The pre-pass inside fairseq's Trainer, in this process."""

import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.trainer import Trainer

from admin_fairseq import AdminError, hooks, start, sub_layers


@pytest.fixture
def trainer(build, tmp_path):
    """trainer() -> (Trainer before its optimizer is built, its train iterator), dropout on."""

    def trainer():
        model, task, cfg = build("transformer_admin", "--save-dir", str(tmp_path), "--dropout", "0.3")
        result = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
        iterator = result.get_train_iterator(epoch=1)
        dataset = task.dataset("train")
        collate = iterator.collate_fn

        def noisy_collate(samples):  # as data sets that add noise on the fly
            np.random.rand()
            random.random()
            return collate(samples)

        iterator.collate_fn = noisy_collate
        assert dataset is iterator.dataset
        return result, iterator

    return trainer


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_pre_pass_leaves_random_state_and_iterator_as_found(trainer):
    trainer, iterator = trainer()
    states, iterator_state = random_states(), dict(vars(iterator))
    trainer.optimizer  # noqa: B018  (builds it)
    assert trainer.get_model().omega_source == "profiling"
    assert random_states() == states
    assert vars(iterator) == iterator_state


def test_with_several_workers_the_model_is_wrapped_before_it_is_profiled(trainer, monkeypatch):
    """Only the wrapper moves the model to its GPU then."""
    order = []
    wrapped = property(lambda self: order.append("wrapped") or self.get_model())
    monkeypatch.setattr(Trainer, "model", wrapped)
    monkeypatch.setattr(start, "profile", lambda *args, **kwargs: order.append("profiled") or 1 / 0)
    one, _ = trainer()
    with pytest.raises(ZeroDivisionError):
        one.optimizer  # noqa: B018
    assert order[0] == "wrapped"
    assert order[-1] == "profiled"


def test_omega_depends_on_the_seed_option_not_on_the_random_state(trainer):
    omegas = []
    for disturb in (0, 1):
        one, _ = trainer()
        torch.manual_seed(disturb)
        one.optimizer  # noqa: B018
        omegas.append([norm.omega[0].item() for norm in sub_layers(one.get_model()).values()])
    assert omegas[0] == omegas[1]


def test_installs_once_and_over_the_wrapper_of_another_plugin(monkeypatch):
    ours = Trainer._build_optimizer
    hooks.install()
    assert Trainer._build_optimizer is ours
    foreign = functools.wraps(ours.__wrapped__)(lambda trainer: None)
    monkeypatch.setattr(Trainer, "_build_optimizer", foreign)
    hooks.install()
    assert Trainer._build_optimizer.__wrapped__ is foreign


def test_fully_sharded_training_is_refused(trainer, monkeypatch):
    """fairseq hands over a model whose layers have been split, in a wrapper."""
    one, _ = trainer()
    wrapped = SimpleNamespace(module=one.get_model())
    monkeypatch.setattr(Trainer, "get_model", lambda self: wrapped)
    with pytest.raises(AdminError, match="fully_sharded"):
        one.optimizer  # noqa: B018
