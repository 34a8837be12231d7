"""Several at once: eight pre-passes on one path, two models in one process."""

from __future__ import annotations

import os
import threading

import torch
from at_work import Command, commands

from admin_fairseq import profile


def test_eight_pre_passes_on_one_path(data, inputs, tmp_path):
    """All succeed, and the file is that of one of them, which are alike."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert Command(["profile", *commands(data, inputs, alone)["profile"]], tmp_path / "log").end() == 0
    running = [
        Command(["profile", *commands(data, inputs, out)["profile"]], tmp_path / f"log{number}") for number in range(8)
    ]
    for number, command in enumerate(running):
        assert command.end() == 0, (tmp_path / f"log{number}").read_text()
    assert os.listdir(out) == ["admin_profile.json"]
    assert (out / "admin_profile.json").read_bytes() == (alone / "admin_profile.json").read_bytes()


def test_two_models_in_one_process(build, batch):
    """Profiled, run forwards and backwards at the same time in two threads, each is as it is alone."""
    settings = {"transformer_admin": ("--dropout", "0"), "transformer_admin_6_6": ("--dropout", "0", "--seed", "5")}

    def work(model, outcome):
        for _ in range(3):
            found = profile(model, [(batch(8)["net_input"], True, 3), (batch(8, start=8)["net_input"], True, 4)])
            model.zero_grad()
            logits, _ = model.train()(**batch(8)["net_input"])
            logits.float().logsumexp(-1).sum().backward()
        outcome.append(found.encoder + found.decoder)
        outcome.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    def outcomes(together):
        models = [build(arch, *options)[0] for arch, options in settings.items()]
        found = [[] for _ in models]
        threads = [threading.Thread(target=work, args=pair) for pair in zip(models, found)]
        for thread in threads:
            thread.start()
            if not together:
                thread.join()
        for thread in threads:
            thread.join()
        return found

    alone, together = outcomes(False), outcomes(True)
    for (omega, gradients), (omega_too, gradients_too) in zip(alone, together):
        assert omega == omega_too
        assert gradients.keys() == gradients_too.keys()
        assert all(torch.equal(gradient, gradients_too[name]) for name, gradient in gradients.items())
