"""The pre-pass inside fairseq's Trainer, in this process."""

import functools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, hub_utils, models, options
from fairseq.logging import progress_bar
from fairseq.sequence_generator import EnsembleModelWithAlignment
from fairseq.trainer import Trainer

from admin_fairseq import AdminError, hooks, start, sub_layers
from admin_fairseq.checkpoints import unpickling
from admin_fairseq.errors import NotFiniteError
from admin_fairseq.model import AdminModel

PATCHED = [
    (Trainer, "_build_optimizer", "_start_omega_then_build_optimizer"),
    (Trainer, "train_step", "_train_step_and_watch"),
    (Trainer, "begin_epoch", "_log_omega_then_begin_epoch"),
    (EnsembleModelWithAlignment, "__init__", "_wrap_models_and_align"),
    (progress_bar.BaseProgressBar, "_format_stats", "_format_without_omega"),
    (progress_bar.JsonProgressBar, "_format_stats", "_format_without_omega"),
    (checkpoint_utils, "load_checkpoint_to_cpu", "_load_as_data"),
    (checkpoint_utils, "save_checkpoint", "_save_or_say_why"),
    (options, "parse_args_and_arch", "_parse_with_hints"),
    (models, "build_model", "_build_known_model"),
    (hub_utils, "from_pretrained", "_load_from_folder"),
]


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
    for owner, name, _ in PATCHED:  # as they were, afterwards
        monkeypatch.setattr(owner, name, getattr(owner, name))
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


@pytest.mark.parametrize(("version", "lists"), [("2.5.1", False), ("2.6", True), ("2.10.0+cpu", True)])
def test_what_is_installed(monkeypatch, version, lists):
    originals, called = {}, []
    for owner, name, function in PATCHED:
        originals[owner, name] = functools.wraps(getattr(owner, name).__wrapped__)(lambda *_: None)
        monkeypatch.setattr(owner, name, originals[owner, name])
        monkeypatch.setattr(hooks, function, lambda *args, function=function, **options: (function, args, options))
    monkeypatch.setattr(hooks, "guard_fairseq", lambda: called.append("guard_fairseq"))
    monkeypatch.setattr(hooks.old_numpy, "install", lambda: called.append("old_numpy"))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    monkeypatch.setattr(torch.serialization, "add_safe_globals", called.append, raising=False)
    hooks.install()
    for owner, name, function in PATCHED:
        wrapper = getattr(owner, name)
        assert wrapper.__wrapped__ is originals[owner, name]
        assert wrapper.__name__ == name
        assert wrapper(1, 2, a=3) == (function, (originals[owner, name], 1, 2), {"a": 3})
    listed = {**unpickling.SAFE_GLOBALS, **unpickling.SENT_GLOBALS}
    assert called[:2] == ["guard_fairseq", "old_numpy"]
    assert called[2:] == ([[(kind, name) for name, kind in listed.items()]] if lists else [])


def test_loading_as_data_gives_torchs_loading_back(tmp_path):
    ours, torch_load, seen = hooks._load_as_data, torch.serialization.load, []

    def load(path, *args, **options):
        seen.append((path, args, options, torch.load is not torch_load))
        if isinstance(path, Exception):
            raise path

    assert ours(load, "a", {}, load_on_all_ranks=True) is None
    assert seen == [("a", ({},), {"load_on_all_ranks": True}, True)]
    assert torch.load is torch_load

    def fail(path):
        raise KeyError("a\nb" + "c" * 300)

    with pytest.raises(AdminError) as error:
        ours(fail, "x.pt")
    what = "'a\\nb" + "c" * 195
    assert str(error.value) == f"x.pt is not a checkpoint that this fairseq reads (KeyError: {what})"
    assert torch.load is torch_load


def test_a_refused_checkpoint_does_not_recommend_itself(tmp_path):
    torch.save({"no": "model"}, tmp_path / "checkpoint_last.pt")  # whole, but none of fairseq's
    with pytest.raises(AdminError, match=r"checkpoint_last\.pt is not a fairseq checkpoint \('model'\)$"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))


@pytest.mark.parametrize("form", [lambda args: args, lambda args: (args, ["--more"])])
def test_hints_are_given_before_and_checked_after_parsing(monkeypatch, form):
    order, args, parser = [], SimpleNamespace(), object()
    monkeypatch.setattr(hooks.hints, "give", lambda given: order.append(("give", given)))
    monkeypatch.setattr(hooks.hints, "check", lambda parsed: order.append(("check", parsed)))

    def parse(*given, **arguments):
        order.append((given, arguments))
        return form(args)

    assert hooks._parse_with_hints(parse, parser, ["--cpu"], parse_known=True) == form(args)
    assert order == [("give", parser), ((parser, ["--cpu"]), {"parse_known": True}), ("check", args)]


@pytest.mark.parametrize(
    ("hook", "check", "arguments", "checked"),
    [
        (
            "_build_known_model",
            "check_model",
            (("cfg", "task", "more"), {"from_checkpoint": True}),
            (("cfg", "task"), {}),
        ),
        ("_load_from_folder", "check_folders", (("folder",), {"a": 1}), (("folder",), {"a": 1})),
    ],
)
def test_what_is_built_or_loaded_is_checked_first(monkeypatch, hook, check, arguments, checked):
    order = []
    monkeypatch.setattr(hooks.hints, check, lambda *args, **options: order.append((args, options)))

    def function(*args, **options):
        order.append((args, options))
        return "built"

    assert getattr(hooks, hook)(function, *arguments[0], **arguments[1]) == "built"
    assert order == [checked, arguments]


def test_an_update_returns_what_fairseqs_does_and_is_watched(monkeypatch):
    watched = []
    monkeypatch.setattr(hooks, "watch_omega", watched.append)
    step = hooks._train_step_and_watch(
        lambda *args, **options: (args, options), "trainer", ["sample"], 1, raise_oom=True
    )
    assert step == (("trainer", ["sample"], 1), {"raise_oom": True})
    assert watched == ["trainer"]


def test_only_numbers_are_explained(monkeypatch):
    """Also where fairseq's search for the layer fails at something else."""
    monkeypatch.setattr(hooks, "explain_numbers", lambda *args: NotFiniteError(args))
    number = FloatingPointError("NaN")

    def raising(error, context=None):
        def step(trainer, samples):
            error.__context__ = context
            raise error

        return step

    between = RuntimeError()
    between.__context__ = number
    for step in (raising(number), raising(ValueError(), number), raising(ValueError(), between)):
        with pytest.raises(NotFiniteError) as error:
            hooks._train_step_and_watch(step, "trainer", "samples")
        assert error.value.args == (("trainer", "samples", number),)
    for own in (NotFiniteError("own"), ValueError("a bug")):
        with pytest.raises(type(own)) as error:
            hooks._train_step_and_watch(raising(own), "trainer", "samples")
        assert error.value is own


def of_admin():
    """What of a trainer its hooks look at."""
    model = AdminModel.__new__(AdminModel)
    model.admin_fast = "on"
    checkpoint = SimpleNamespace(no_save=False, save_dir="out")
    cfg = SimpleNamespace(checkpoint=checkpoint, common=SimpleNamespace(bf16=False))
    return SimpleNamespace(
        cfg=cfg, model=model, get_model=lambda: model, data_parallel_world_size=1, is_data_parallel_master=True
    )


def test_what_building_the_optimizer_does(monkeypatch):
    one, order = of_admin(), []
    monkeypatch.setattr(hooks, "Finalize", lambda *args, **options: None)
    monkeypatch.setattr(hooks.hints, "check_start", lambda *sections: order.append(("checked", *sections)))
    monkeypatch.setattr(hooks, "start_omega", lambda given: order.append(("started", given)))
    monkeypatch.setattr(hooks.fast, "apply_to_trainer", lambda *given: order.append(("fast", *given)))
    monkeypatch.setattr(hooks.save_dir, "claim", lambda folder: order.append(("claimed", folder)))
    monkeypatch.setattr(hooks, "warn_where_bf16_is_slow", lambda common: order.append(("warned", common)))
    hooks._start_omega_then_build_optimizer(lambda given: order.append(("built", given)), one)
    assert order == [
        ("checked", one.cfg.checkpoint, one.cfg.common),
        ("claimed", "out"),
        ("warned", one.cfg.common),
        ("started", one),
        ("built", one),
        ("fast", one, "on"),
    ]


def test_the_save_dir_is_claimed_once_until_the_trainer_goes(monkeypatch):
    order = []
    one = SimpleNamespace(cfg=SimpleNamespace(checkpoint=SimpleNamespace(no_save=True, save_dir="out")))
    monkeypatch.setattr(hooks, "from_first_worker", lambda trainer, work: order.append(trainer) or work())
    monkeypatch.setattr(hooks.save_dir, "claim", lambda folder: f"release {folder}")
    monkeypatch.setattr(hooks, "Finalize", lambda *args, **options: order.append((*args, options)))
    hooks._claim_save_dir(one)
    assert order == []
    one.cfg.checkpoint.no_save = False
    for _ in range(2):
        hooks._claim_save_dir(one)
    assert order == [one, (one, "release out", {"exitpriority": 0})]


def test_omega_is_logged_before_an_epoch_of_an_admin_model(monkeypatch):
    one, order = of_admin(), []
    monkeypatch.setattr(hooks, "log_omega", lambda given: order.append(("logged", given)))
    begin = lambda *given: order.append(given)  # noqa: E731
    hooks._log_omega_then_begin_epoch(begin, one, 3)
    assert order == [("logged", one), (one, 3)]
    one.get_model = lambda: torch.nn.Linear(1, 1)
    hooks._log_omega_then_begin_epoch(begin, one, 4)
    assert order[2:] == [(one, 4)]


def test_alignments_are_there_for_whoever_asks_for_them(build):
    model, _, _ = build("transformer_admin")
    assert not model.decoder.aligns
    other = torch.nn.Linear(1, 1)
    assert [*EnsembleModelWithAlignment([model, other]).models] == [model, other]
    assert model.decoder.aligns is True
    assert not hasattr(other, "decoder")


def test_progress_bars_leave_omega_out(capsys):
    stats = {"loss": 2.0, "omega_mean/decoder.layers.0.ffn": 1.0}
    assert progress_bar.BaseProgressBar([])._format_stats(stats) == {"loss": "2"}
    assert hooks._format_without_omega(lambda *given: given, "bar", stats, 3) == ("bar", {"loss": 2.0}, 3)
    bar = progress_bar.JsonProgressBar([])
    assert dict(bar._format_stats(stats, epoch=3, update=0.5)) == {
        "epoch": 3,
        "update": 0.5,
        "loss": "2",
    }
