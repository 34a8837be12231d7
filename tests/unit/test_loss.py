"""Label-smoothed cross-entropy in blocks, and compiled, against fairseq's own."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.optim.adam import Adam
from fairseq.trainer import Trainer

from admin_fairseq.fast import adam, apply_to_trainer, loss

PADDING = 1


@pytest.fixture
def criteria(monkeypatch):
    """criteria(**settings) -> fairseq's criterion, and the same in blocks of two rows."""
    monkeypatch.setattr(loss, "BLOCK", 2 * 97)

    def criteria(label_smoothing=0.1, **settings):
        task = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PADDING))
        stock = LabelSmoothedCrossEntropyCriterion(task, False, label_smoothing, **settings)
        ours = copy.copy(stock)
        loss.speed_up(ours)
        return stock, ours

    return criteria


class Model(torch.nn.Module):
    """Answers with the given logits, (sentences, tokens, vocabulary)."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(5, 7, 97, generator=random) + 2
        self.logits = torch.nn.Parameter(logits.to(dtype))
        target = torch.randint(2, 97, (5, 7), generator=random)
        target[1, 4:] = target[4, 1:] = PADDING
        self.sample = {"net_input": {}, "target": target, "ntokens": int(target.ne(PADDING).sum())}
        self.decoder = SimpleNamespace()

    def forward(self):
        return self.logits, {}

    def get_normalized_probs(self, net_output, log_probs):
        return torch.log_softmax(net_output[0], -1, dtype=torch.float32)

    def get_targets(self, sample, net_output):
        return sample["target"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "reduce"),
    [
        ({}, True),
        ({"label_smoothing": 0.0}, True),
        ({"ignore_prefix_size": 2}, True),
        ({"report_accuracy": True}, True),
        ({}, False),
    ],
)
def test_loss_and_gradient_are_fairseqs_to_the_bit(criteria, settings, reduce, dtype):
    found = []
    for criterion in criteria(**settings):
        model = Model(dtype)
        value, size, log = criterion(model, model.sample, reduce=reduce)
        (2.5 * value.sum()).backward()  # a factor, as of fp16's loss scale
        found.append([value, size, *log.values(), model.logits.grad])
    for stock, ours in zip(*found):
        assert torch.equal(torch.as_tensor(stock), torch.as_tensor(ours))


def test_the_definition_in_float64(criteria):
    """(1 - eps - eps_i) * -log p(target) + eps_i * sum of all -log p, with eps_i = eps / (V - 1)."""
    model, epsilon = Model(torch.float64), 0.1
    value, _, _ = criteria(label_smoothing=epsilon)[1](model, model.sample)
    (gradient,) = torch.autograd.grad(value, model.logits)
    target, rest = model.sample["target"], epsilon / 96
    minus_log_p = -torch.log_softmax(model.logits, -1)
    nll = minus_log_p.gather(-1, target[..., None])[..., 0]
    kept = target.ne(PADDING)
    expected = ((1 - epsilon - rest) * nll + rest * minus_log_p.sum(-1))[kept].sum()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.logits)[0], rtol=1e-4, atol=1e-6)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Compiled, if that can be, and the whole matrix at once."""
    loss._compiled.cache_clear()
    eager = loss.choose
    monkeypatch.setattr(loss, "BLOCK", 2**40)
    monkeypatch.setattr(
        loss, "choose", lambda x: loss._compiled(x.device, x.dtype, x.size(-1)) if len(x) > 1 else eager(x)
    )
    yield
    loss._compiled.cache_clear()


def some_tokens(dtype, tokens, criterion):
    """The loss, its log and the gradient at so many tokens of each sentence."""
    model = Model(dtype)
    model.logits = torch.nn.Parameter(model.logits[:, :tokens].detach().clone())
    model.sample["target"] = model.sample["target"][:, :tokens]
    value, _, log = criterion(model, model.sample)
    for _ in range(2):
        (2.5 * value).backward(retain_graph=True)
    return [value, log["nll_loss"], model.logits.grad]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_compiled_as_on_a_gpu(criteria, as_on_a_gpu):
    """To rounding, for any number of tokens, of which none compiles anything again."""
    counters = pytest.importorskip("torch._dynamo.utils").counters
    counters.clear()
    for dtype, tokens in ((torch.float32, 7), (torch.float32, 6), (torch.float32, 1), (torch.bfloat16, 7)):
        found = [some_tokens(dtype, tokens, criterion) for criterion in criteria(ignore_prefix_size=1)]
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(*found, rtol=bound, atol=bound)
        assert counters["frames"]["ok"] == (2 if dtype == torch.float32 else 4)
    criterion = criteria()[1]
    with torch.no_grad():
        model = Model(torch.bfloat16)
        assert criterion(model, model.sample)[0] > 0
    assert counters["frames"]["ok"] == 4


@pytest.mark.parametrize("what", ["torch.compile", "what it compiled"])
def test_where_the_loss_cannot_be_compiled(criteria, as_on_a_gpu, monkeypatch, caplog, what):
    def fails(*given):
        raise RuntimeError("no compiler\nmore of it")

    monkeypatch.setattr(torch, "compile", fails if what == "torch.compile" else lambda function: fails)
    for _ in range(2):
        stock, ours = (some_tokens(torch.float32, 7, criterion) for criterion in criteria())
        assert all(map(torch.equal, stock, ours))
    assert caplog.messages == ["the loss cannot be compiled here (no compiler): it takes more memory and time"]


def test_out_of_memory_is_no_reason_not_to_compile(criteria, as_on_a_gpu, monkeypatch):
    """fairseq leaves such a batch out; the next one tries again."""

    def fails(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    _, ours = criteria()
    monkeypatch.setattr(torch, "compile", lambda function: fails)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        some_tokens(torch.float32, 7, ours)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert some_tokens(torch.float32, 7, ours)[0] > 0


def test_adaptive_softmax_is_left_to_fairseq(criteria):
    model = Model()
    model.decoder.adaptive_softmax = object()
    model.get_normalized_probs = lambda *args, **kwargs: torch.zeros(5, 7, 97)  # of other shape than the logits
    model.logits = torch.nn.Parameter(torch.zeros(5, 7, 4))
    assert criteria()[1](model, model.sample)[0] == 0


@pytest.mark.parametrize(
    ("flags", "is_faster"),
    [([], True), (["--admin-fast", "all"], True), (["--admin-fast", "off"], False)],
)
def test_the_switch(build, tmp_path, flags, is_faster):
    """The class keeps its name, without which fairseq does not resume."""
    model, task, cfg = build("transformer_admin", "--save-dir", str(tmp_path), "--admin-init", "unit", *flags)
    criterion = task.build_criterion(cfg.criterion)
    trainer = Trainer(cfg, task, model, criterion)
    is_fused = is_faster and torch.__version__ >= "2.4"  # before, torch has no such kernel for CPUs
    assert type(trainer.optimizer.optimizer) is (adam.FusedAdam if is_fused else Adam)
    assert ("compute_loss" in vars(criterion)) == is_faster
    assert type(criterion) is LabelSmoothedCrossEntropyCriterion


def test_measured_leaves_unmeasured_devices_alone(criteria, monkeypatch):
    """A trainer on a GPU, where neither was measured."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "some GPU")
    criterion, _ = criteria()
    trainer = SimpleNamespace(
        get_criterion=lambda: criterion,
        device=torch.device("cuda"),
        cfg=SimpleNamespace(common=SimpleNamespace(bf16=True)),
        cuda=True,
    )
    apply_to_trainer(trainer, "measured")  # has no optimizer to fuse
    assert "compute_loss" not in vars(criterion)
