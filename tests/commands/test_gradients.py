"""``admin-fairseq analyze gradients`` and ``omega``, in this process."""

import csv
import json

import pytest
import torch
from helpers import TINY, TRAIN, checkpoint, profile_in, train_here

from admin_fairseq import AdminError, sub_layers
from admin_fairseq.analysis import gradients
from admin_fairseq.analysis.omega import branch_shares
from admin_fairseq.analysis.subject import configure, parse, started
from admin_fairseq.cli import main
from admin_fairseq.profiling import Sample

DROP = ("--optimizer", "--lr", "--lr-scheduler", "--warmup-updates")
OPTIONS = [word for at, word in enumerate(TRAIN) if word not in DROP and (at == 0 or TRAIN[at - 1] not in DROP)]


@pytest.mark.parametrize("arch", ["transformer_postln", "transformer_admin"])
def test_gradients_are_those_of_the_norms_outputs(build, batch, arch):
    model, task, cfg = build(arch, "--dropout", "0")
    criterion, sample = task.build_criterion(cfg.criterion), batch()
    expected = []

    def forward_hook(module, inputs, output):
        output.register_hook(lambda gradient: expected.append((module, gradient.norm().item())))

    norms = [module for name, module in model.named_modules() if name.endswith("_layer_norm")]
    for norm in norms:
        norm.register_forward_hook(forward_hook)
    with gradients._output_gradients(model) as found:
        criterion(model, sample)[0].backward()
    largest = max(norm for _, norm in expected)
    expected = {module: norm / largest for module, norm in expected}
    assert len(expected) == 6 + 6
    in_order = [expected[norm] for norm in norms]
    assert found["encoder"]["gradient"] + found["decoder"]["gradient"] == pytest.approx(in_order, rel=1e-5)
    assert found["decoder"]["sub_layers"][:4] == ["0 self_attn", "0 encoder_attn", "0 ffn", "1 self_attn"]
    assert not any("residual_connection" in vars(layer) for layer in model.modules())


def test_pre_ln_gradients_are_those_of_the_sums(build, batch):
    model, task, cfg = build("transformer_preln", "--dropout", "0")
    layers = model.decoder.layers
    seen = {}

    def forward_hook(layer, _, output):
        output[0].register_hook(lambda gradient: seen.update({layer: gradient.norm().item()}))

    for layer in layers:
        layer.register_forward_hook(forward_hook)
    with gradients._output_gradients(model) as found:
        task.build_criterion(cfg.criterion)(model, batch())[0].backward()
    ratio = found["decoder"]["gradient"][2] / found["decoder"]["gradient"][5]
    assert ratio == pytest.approx(seen[layers[0]] / seen[layers[1]], rel=1e-5)


def test_factors():
    outputs = {"decoder": {"sub_layers": ["0 self_attn", "0 encoder_attn", "0 ffn", "1 self_attn", "1 encoder_attn"]}}
    outputs["decoder"]["gradient"] = [0.1, 0.2, 0.2, 0.25, 1.0]
    found = gradients.factors(outputs)
    expected = {"decoder encoder_attn": (0.5 * 0.25) ** 0.5, "decoder ffn": 1, "decoder self_attn": 0.8}
    assert found == pytest.approx(expected)


def test_relative_updates_of_sgd_are_the_gradients(data):
    """The weights move by lr times the gradient, whose norm is left in .grad."""
    rest = [str(data), *TINY, *OPTIONS, "--optimizer", "sgd", "--lr", "0.5", "--lr-scheduler", "fixed"]
    trainer, _ = started(configure(parse("transformer_postln", rest)))
    trainer.begin_epoch(1)
    model = trainer.get_model()
    weight = model.decoder.layers[1].encoder_attn.v_proj.weight
    before = weight.detach().norm()
    with gradients._weight_changes(model) as found:
        trainer.train_step([next(gradients._batches(trainer))])
    (one,) = [m for m in found if m["name"] == "decoder.layers.1.encoder_attn.v_proj.weight"]
    assert one["kind"] == "decoder encoder_attn"
    assert one["update"] == pytest.approx((0.5 * weight.grad.norm() / before).item(), rel=1e-4)
    assert max(m["gradient"] for m in found) == 1
    assert {m["kind"] for m in found if "fc1" in m["name"]} == {"encoder ffn", "decoder ffn"}


def test_command(data, tmp_path, capsys, bars):
    options = [*TINY, *OPTIONS, "--adam-betas", "(0.9, 0.98)", "--updates", "1", "2", "--arch"]
    main(["analyze", "gradients", str(data), "--out", str(tmp_path), *options, "transformer_admin"])
    names = {"gradients.json", "gradients.csv", *(f"gradients{x}.svg" for x in ("", "_training", "_updates"))}
    assert {path.name for path in tmp_path.iterdir()} == names
    records = json.loads((tmp_path / "gradients.json").read_text())["records"]
    assert [(r["optimizer"], r["update"]) for r in records] == [(o, u) for o in ("adam", "sgd") for u in (1, 2)]
    assert records[0]["outputs"] == records[2]["outputs"]  # the same start whatever the optimizer
    assert records[1]["outputs"] != records[3]["outputs"]
    rows = list(csv.DictReader((tmp_path / "gradients.csv").open()))
    assert len(rows) == 4 * (12 + 3 * 6 + 2 * 10)
    assert "decoder encoder_attn" in capsys.readouterr().out
    assert [(bar.n, bar.total) for bar in bars] == [(4, 4)]  # two optimizers' two updates


def test_a_checkpoint_starts_anew_without_its_warmup_dropped_layers_and_checkpointing(data, tmp_path, capsys):
    """Adam's first update is the learning rate in every weight whose gradient is not 0."""
    flags = "--checkpoint-activations --encoder-layerdrop 0.9"
    train_here("transformer_postln", data, tmp_path / "run", f"{flags} --lr-scheduler fixed --warmup-updates 100")
    path, out = str(tmp_path / "run"), tmp_path / "out"  # a folder: its checkpoint_last.pt
    arguments = ["analyze", "gradients", str(data), "--path", path, "--out", str(out), "--updates", "1"]
    for init in ("fairseq", "authors"):
        main([*arguments, "--optimizers", "adam", "--cpu", "--init-weights", init])
        before, after = json.loads((out / "gradients.json").read_text())["records"]
        assert (before["when"], after["when"]) == ("at initialisation", "after training")
        updates = {m["name"]: m["update"] for m in before["matrices"]}
        first, second = ("encoder.layers.1.fc1.weight", "encoder.layers.1.fc2.weight")
        variances = {"fairseq": (1 / 96, 1 / 192), "authors": (2 / 96, 2 / 96)}[init]  # of 32 x 64 and 64 x 32
        assert updates[second] == pytest.approx(1e-4 / variances[1] ** 0.5, rel=0.05)
        assert updates[first] == pytest.approx(1e-4 / variances[0] ** 0.5, rel=0.15)  # ReLU leaves some at 0
    svg = (out / "gradients_updates.svg").read_text()
    assert "after training" in capsys.readouterr().out and "update 1" in svg
    start_options = [str(data), *TINY, *OPTIONS, *flags.split()]
    model = started(configure(parse("transformer_admin", start_options)))[0].get_model()
    assert model.encoder.layers.p == 0


def test_bad_options(data, tmp_path):
    with pytest.raises(AdminError, match="--updates must be at least 1, not 0"):
        main(["analyze", "gradients", str(data), "--out", str(tmp_path), "--updates", "0"])
    assert gradients.without_adam(["D", "--adam-betas", "(0.9, 0.98)", "--adam-eps=1", "--lr", "1"]) == [
        "D",
        "--lr",
        "1",
    ]


def test_share_of_the_branch(build, batch):
    """With a branch that is known: f = 3 x, omega 2, so 9 in 4 + 9."""
    model, _, _ = build("transformer_admin")
    for norm in sub_layers(model.decoder).values():
        norm.omega.data.fill_(2.0)
        norm.forward = lambda pair, stock=norm.forward: stock((3 * pair[1], pair[1]))
    shares = branch_shares(model, Sample(batch()["net_input"]))
    assert shares["decoder"] == pytest.approx([9 / 13] * 6)
    assert len(shares["encoder"]) == 6
    assert not any("add" in vars(norm) for norm in sub_layers(model.decoder).values())


def test_omega_through_a_run(data, tmp_path, capsys):
    train_here("transformer_admin", data, tmp_path / "run", "--save-interval-updates 1")
    main(["analyze", "omega", "--out", str(tmp_path / "a"), "--path", str(tmp_path / "run")])
    records = json.loads((tmp_path / "a/omega.json").read_text())["records"]
    assert [record["update"] for record in records] == [0, 1, 2]
    profile = profile_in(tmp_path / "run")
    assert records[0]["encoder"]["mean"] == profile["encoder"]
    weights = checkpoint(tmp_path / "run/checkpoint_last.pt")["model"]
    last = weights["decoder.layers.1.final_layer_norm.omega"]
    assert records[2]["decoder"]["mean"][-1] == pytest.approx(last.mean().item())
    assert records[2]["decoder"]["std"][-1] == pytest.approx(last.std(unbiased=False).item())
    assert "share" in records[0]["encoder"]
    assert "share" not in records[1]["encoder"]

    main(["analyze", "omega", str(data), "--cpu", "--out", str(tmp_path / "b"), "--path", str(tmp_path / "run")])
    shares = [r["encoder"]["share"] for r in json.loads((tmp_path / "b/omega.json").read_text())["records"]]
    # the profile's from the rule, with dropout; the first checkpoint's measured on the same batch, without
    assert shares[1] == pytest.approx(shares[0], abs=0.05)
    assert "update 2" in capsys.readouterr().out


def test_omega_of_files_that_are_named_and_of_other_stacks(tmp_path):
    """No file that is named is left out, and a model without an encoder leaves that of others alone."""
    omegas = {f"{name}.layers.0.final_layer_norm.omega": torch.ones(2) for name in ("decoder", "encoder")}
    decoder_only = {key: value for key, value in omegas.items() if key.startswith("decoder")}
    history = [{"num_updates": 7}]
    files = {"a_lm/checkpoint_last.pt": decoder_only, "run/folded.pt": omegas, "run/average.pt": omegas}
    for name, weights in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"model": weights, "optimizer_history": history}, tmp_path / name)
    for order in (list(files), list(files)[::-1]):
        paths = [str(tmp_path / name) for name in order]
        main(["analyze", "omega", "--cpu", "--out", str(tmp_path / "out"), "--path", *paths])
        records = json.loads((tmp_path / "out/omega.json").read_text())["records"]
        labels = [f"{tmp_path}/a_lm, update 7", *(f"{tmp_path}/run, {n}.pt, update 7" for n in ("average", "folded"))]
        assert [record["label"] for record in records] == labels
        assert ["encoder" in record for record in records] == [False, True, True]


def test_gradients_that_are_all_zero(data, tmp_path):
    """ReZero's, before its first update."""
    options = [*TINY, *OPTIONS, "--updates", "1", "--optimizers", "sgd", "--arch", "transformer_rezero"]
    main(["analyze", "gradients", str(data), "--out", str(tmp_path), *options])
    json.loads((tmp_path / "gradients.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_omega_needs_omega(data, tmp_path):
    options = ["--out", str(tmp_path), *TINY, *OPTIONS, "--arch", "transformer_postln"]
    with pytest.raises(AdminError, match="none of these models has an omega"):
        main(["analyze", "omega", str(data), *options])


def test_init_weights_reach_omega(data, tmp_path):
    omegas = []
    for init in ("fairseq", "authors"):
        main(["analyze", "omega", str(data), "--out", str(tmp_path), "--init-weights", init, *TINY, *OPTIONS])
        omegas.append(json.loads((tmp_path / "omega.json").read_text())["records"][0]["encoder"]["mean"])
    assert omegas[1][-1] > 1.1 * omegas[0][-1]  # wider feed-forward branches
