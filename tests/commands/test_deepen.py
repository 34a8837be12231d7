"""admin-fairseq deepen: a deeper model that starts where the trained one is."""

from functools import partial

import pytest
import torch
from helpers import NO_LOADER, checkpoint, run, train

from admin_fairseq import AdminError, sub_layers
from admin_fairseq.checkpoints.deepen import deepen
from admin_fairseq.checkpoints.files import load
from admin_fairseq.omega import observed


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """An Admin model of 3 and 2 layers whose norms and omegas are no longer special."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(data, folder, "--no-epoch-checkpoints", updates=6).code == 0
    state = load(str(folder / "checkpoint_last.pt"))
    torch.manual_seed(2)
    for name, weight in state["model"].items():
        if "layer_norm" in name:
            weight += torch.randn_like(weight) * 0.2
    torch.save(state, folder / "checkpoint_last.pt")
    return folder / "checkpoint_last.pt"


def outputs(state, build, batch, *options):
    model, _, _ = build("transformer_admin", *options)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        return model, model.eval()(**batch()["net_input"])[0]


LAYERS = ("--encoder-layers", "5", "--decoder-layers", "4")


def test_copies_that_change_nothing(trained, data, build, batch):
    """With a vanishing c the deeper model is the old one, at every position."""
    state = load(str(trained))
    deeper, changes = deepen(state, str(data), {"encoder": 5, "decoder": 4}, change=1e-9)
    _, expected = outputs(state, build, batch)
    model, actual = outputs(deeper, build, batch, *LAYERS)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert max(change.share for change in changes.values()) < 1e-6
    assert len(sub_layers(model.encoder)) == 2 * 5
    assert len(sub_layers(model.decoder)) == 3 * 4


def test_the_change_is_bounded(trained, data):
    """Both stacks' outputs change by about c of their variance; the decoder's by the encoder's change too."""
    state = load(str(trained))
    for change in (0.03, 0.3):
        _, changes = deepen(state, str(data), {"encoder": 6, "decoder": 6}, change)
        assert change / 4 < changes["encoder"].share < change * 4
        assert change / 4 < changes["decoder"].share < change * 8


def test_omega_is_set_by_the_variance_of_the_branch(trained, data, build, batch):
    """On the data that was measured, each new branch has c / n of what its sub-layer's shortcut has."""
    state = load(str(trained))
    deeper, _ = deepen(state, str(data), {"encoder": 4, "decoder": 2}, change=0.2)
    model, task, _ = build("transformer_admin", "--encoder-layers", "4")
    model.load_state_dict(deeper["model"])
    new = ("layers.1.self_attn_layer_norm", "layers.1.final_layer_norm")  # 0 0 1 2: the copy of layer 0
    old = state["model"]["encoder.layers.1.self_attn_layer_norm.omega"]
    assert torch.equal(deeper["model"]["encoder.layers.2.self_attn_layer_norm.omega"], old)
    shares = {}

    def observe(name, norm, x, f):
        keep = batch["net_input"]["src_tokens"].ne(model.encoder.padding_idx).t()
        shares[name] = (f[keep].var() / (norm.omega * x)[keep].var()).item()

    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[i] for i in range(200)])
    observers = {norm: partial(observe, name, norm) for name, norm in sub_layers(model.encoder).items()}
    with torch.no_grad(), observed(observers):
        model.eval()(**batch["net_input"])
    assert [shares[name] for name in new] == pytest.approx([0.2 / 2] * 2, rel=0.02)


def test_deepens_trains_and_translates(trained, data, tmp_path):
    out = tmp_path / "deeper.pt"
    result = run("admin-fairseq", "deepen", trained, out, data, *LAYERS)
    assert result.code == 0, result.output
    assert "encoder 3 to 5 layers" in result.output
    options = ("--finetune-from-model", out, *LAYERS, "--no-epoch-checkpoints", "--disable-validation")
    result = train(data, tmp_path / "run", *options, updates=2)
    assert result.code == 0, result.output
    assert result.lines("omega from the checkpoint")
    start, end = load(str(out))["model"], checkpoint(tmp_path / "run/checkpoint_last.pt")["model"]
    for stack, first, count in (("encoder", "self_attn", 10), ("decoder", "self_attn", 12)):
        names = [name for name in start if name.startswith(stack) and name.endswith(".omega")]
        assert len(names) == count
        moved = {name for name in names if not torch.equal(start[name], end[name])}
        assert moved == set(names) - {f"{stack}.layers.0.{first}_layer_norm.omega"}
    result = run(
        *("fairseq-generate", data, "--path", out, "--cpu", "--beam", "2", "-s", "de", "-t", "en"),
        *("--max-len-b", "5", "--required-batch-size-multiple", "1", *NO_LOADER),
    )
    assert len(result.lines("H-")) == 30, result.output


@pytest.mark.parametrize(
    ("layers", "change", "message"),
    [
        ({"encoder": 2}, 0.1, "it has 3 encoder layers, more than 2"),
        ({"encoder": 0}, 0.1, "it has 3 encoder layers, more than 0"),
        ({"encoder": 3, "decoder": 2}, 0.1, "as many layers already"),
        ({"encoder": 4}, 0, "between 0 and 1"),
    ],
)
def test_refusals(trained, data, layers, change, message):
    with pytest.raises(AdminError, match=message):
        deepen(load(str(trained)), str(data), layers, change)
