import pytest
import torch
from helpers import TINY, loss_and_gradients

from admin_fairseq import AdminError, profile, sub_layers

WIDTH_8 = [*TINY[:8], "--encoder-embed-dim", "8", "--encoder-ffn-embed-dim", "8"]


def test_command_line_depth_wins(build):
    model, _, _ = build("transformer_admin_72", "--encoder-layers", "5", "--decoder-layers", "4")
    assert len(model.encoder.layers) == 5
    assert len(model.decoder.layers) == 4


def test_depth_comes_from_the_architecture_otherwise(data):
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    argv = [str(data), "--arch", "transformer_admin_72", "--encoder-embed-dim", "8", "--encoder-ffn-embed-dim", "8"]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), argv))
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    assert len(sub_layers(model.encoder)) == 2 * 60
    assert len(sub_layers(model.decoder)) == 3 * 12


def test_sub_layers_come_in_forward_order(build, batch):
    model, _, _ = build("transformer_admin")
    seen = []
    for stack in (model.encoder, model.decoder):
        for name, norm in sub_layers(stack).items():
            norm.register_forward_hook(lambda *_, key=(stack, name): seen.append(key))
    model(**batch()["net_input"])
    assert seen == [(stack, name) for stack in (model.encoder, model.decoder) for name in sub_layers(stack)]


@pytest.mark.parametrize("shared", [True, False])
def test_unit_omega_is_the_stock_transformer(build, batch, shared):
    """Same seed: every shared weight bit for bit; loss and gradients too, dropout included."""
    options = ["--dropout", "0.2", "--attention-dropout", "0.1"] + ["--share-all-embeddings"] * shared
    stock = build("transformer", *options)
    admin = build("transformer_admin", "--admin-init", "unit", *options)
    weights = admin[0].state_dict()
    for name, weight in stock[0].named_parameters():
        if name in weights:  # fairseq 0.12.2 has copies that Admin drops
            assert torch.equal(weight, weights[name]), name
    sample = batch()
    stock_loss, stock_gradients = loss_and_gradients(*stock, sample)
    loss, gradients = loss_and_gradients(*admin, sample)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-6, atol=0)
    assert set(stock_gradients) == {name for name in gradients if not name.endswith(".omega")}
    for name, gradient in stock_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_evaluation_uses_omega(build, batch):
    """fairseq 0.12.2 evaluates a freshly loaded Post-LN encoder by a fused kernel that knows no omega."""
    model, _, _ = build("transformer_admin", "--dropout", "0")
    with torch.no_grad():
        for stack in (model.encoder, model.decoder):
            for norm in sub_layers(stack).values():
                norm.omega.uniform_(0.5, 3)
    net_input = batch()["net_input"]
    tokens = net_input["prev_output_tokens"].ne(1)  # what is computed at pads is not used
    expected, _ = model.train()(**net_input)

    loaded, _, _ = build("transformer_admin", "--dropout", "0")
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        actual, _ = loaded.eval()(**net_input)
    torch.testing.assert_close(actual[tokens], expected[tokens], rtol=1e-5, atol=1e-5)


def test_no_fast_path_copies(build):
    """Every parameter gets a gradient but the first omegas; fairseq 0.12.2's eight copies a layer would not."""
    stock, _, _ = build("transformer")
    admin, _, _ = build("transformer_admin")
    names = [name for name in admin.state_dict() if not name.endswith(".omega")]
    copies = [name for name in stock.state_dict() if name.endswith(("in_proj_weight", "fc1_weight", "fc2_bias"))]
    assert names == [n for n in stock.state_dict() if n in names]
    assert not set(copies) & set(names)


def test_stock_checkpoint_loads_with_omega_one(build, batch):
    stock, _, _ = build("transformer")
    admin, _, _ = build("transformer_admin", "--admin-init", "logn")
    weights = stock.state_dict()
    weights["encoder.layers.0.in_proj_weight"] = torch.zeros(96, 32)  # as fairseq 0.12.2 writes it
    admin.load_state_dict(weights)
    assert "stock" in admin.omega_source
    net_input = batch()["net_input"]
    torch.testing.assert_close(admin.eval()(**net_input)[0], stock.eval()(**net_input)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--admin-init", "unit", "--admin-profile", "x.json"], "exclude each other"),
        (["--admin-profile", "x.json", "--admin-profile-batches", "2"], "no effect"),
        (["--admin-init", "logn", "--admin-profile-batches", "2"], "no effect"),
        (["--admin-profile-batches", "0"], "at least 1"),
        (["--admin-init", "logn", "--admin-margin", "4"], "--admin-margin has no effect"),
        (["--admin-margin", "nan"], "must be a positive number"),
    ],
)
def test_conflicting_options_are_refused(build, options, message):
    with pytest.raises(AdminError, match=message):
        build("transformer_admin", *options)


def test_training_without_a_trainer_is_not_silent(build, batch, caplog):
    model, _, _ = build("transformer_admin")
    model.train()
    model(**batch()["net_input"])
    assert "never initialised" in caplog.text


def test_a_profiled_model_trains_without_complaint(build, batch, caplog):
    model, _, _ = build("transformer_admin")
    sample = batch()
    profile(model, [(sample["net_input"], True)])
    model.train()
    model(**sample["net_input"])
    assert "never initialised" not in caplog.text
