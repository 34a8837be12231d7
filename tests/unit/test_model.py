import pytest
import torch
from helpers import TINY

from admin_fairseq import AdminError, logn_omega, profile, sub_layers
from admin_fairseq.model import set_omega

WIDTH_8 = [*TINY[:8], "--encoder-embed-dim", "8", "--encoder-ffn-embed-dim", "8"]


def loss_and_gradients(model, task, cfg, sample):
    criterion = task.build_criterion(cfg.criterion)
    torch.manual_seed(11)
    model.train()
    loss, _, _ = criterion(model, sample)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("transformer_admin", (6, 6)),
        ("transformer_admin_6_6", (6, 6)),
        ("transformer_admin_12_12", (12, 12)),
        ("transformer_admin_18_18", (18, 18)),
        ("transformer_admin_60_12", (60, 12)),
        ("transformer_admin_72", (60, 12)),
        ("transformer_admin_100_100", (100, 100)),
        ("transformer_admin_200", (100, 100)),
        ("transformer_admin_iwslt_de_en", (6, 6)),
        ("transformer_admin_wmt_en_de", (6, 6)),
        ("transformer_admin_wmt_en_de_big", (6, 6)),
    ],
)
def test_architectures(arch, layers):
    """Depths by name; everything else as the stock architecture of the same suffix."""
    from argparse import Namespace

    from fairseq.models import ARCH_CONFIG_REGISTRY

    ours, stock = Namespace(), Namespace()
    ARCH_CONFIG_REGISTRY[arch](ours)
    assert (ours.encoder_layers, ours.decoder_layers) == layers
    name = arch.replace("_admin", "")
    ARCH_CONFIG_REGISTRY[name if name in ARCH_CONFIG_REGISTRY else "transformer"](stock)
    del stock.encoder_layers, stock.decoder_layers
    assert vars(stock).items() <= vars(ours).items()


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


def test_omega_is_a_trainable_vector_but_for_the_first_of_each_stack(build):
    model, _, _ = build("transformer_admin")
    for stack in (model.encoder, model.decoder):
        norms = list(sub_layers(stack).values())
        assert {tuple(norm.omega.shape) for norm in norms} == {(32,)}
        assert [norm.omega.requires_grad for norm in norms] == [False] + [True] * (len(norms) - 1)


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


def test_incremental_decoding_equals_full_decoding(build, batch):
    model, _, _ = build("transformer_admin")
    for stack in (model.encoder, model.decoder):
        set_omega(sub_layers(stack).values(), [1.0 + 0.1 * i for i in range(20)])
    model.eval()
    net_input = batch(same_length=True)["net_input"]
    encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    tokens = net_input["prev_output_tokens"]
    full, _ = model.decoder(tokens, encoder_out)
    state = {}
    for step in range(tokens.shape[1]):
        one, _ = model.decoder(tokens[:, : step + 1], encoder_out, incremental_state=state)
        torch.testing.assert_close(one[:, 0], full[:, step], rtol=1e-4, atol=1e-5)


def test_stock_checkpoint_loads_with_omega_one(build, batch):
    stock, _, _ = build("transformer")
    admin, _, _ = build("transformer_admin", "--admin-init", "logn")
    weights = stock.state_dict()
    weights["encoder.layers.0.in_proj_weight"] = torch.zeros(96, 32)  # as fairseq 0.12.2 writes it
    admin.load_state_dict(weights)
    assert "stock" in admin.omega_source
    net_input = batch()["net_input"]
    torch.testing.assert_close(admin.eval()(**net_input)[0], stock.eval()(**net_input)[0], rtol=1e-5, atol=1e-5)


def test_closed_form(build):
    """N sub-layers of a stack, microsoft/admin-torch's default; 12.3... for its 200-sub-layer encoder."""
    assert logn_omega(200) == pytest.approx((201 / 5.303304908 - 1) ** 0.5)
    model, _, _ = build("transformer_admin", "--admin-init", "logn")
    for stack, count in ((model.encoder, 6), (model.decoder, 6)):
        values = [norm.omega.unique().item() for norm in sub_layers(stack).values()]
        assert values == pytest.approx([1.0] + [logn_omega(count)] * (count - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder-normalize-before"], "--encoder-normalize-before"),
        (["--decoder-normalize-before"], "--decoder-normalize-before"),
        (["--admin-init", "unit", "--admin-profile", "x.json"], "exclude each other"),
        (["--admin-profile", "x.json", "--admin-profile-batches", "2"], "no effect"),
        (["--admin-init", "logn", "--admin-profile-batches", "2"], "no effect"),
        (["--admin-profile-batches", "0"], "at least 1"),
    ],
)
def test_conflicting_options_are_refused(build, options, message):
    with pytest.raises(AdminError, match=message):
        build("transformer_admin", *options)


@pytest.mark.parametrize("options", [["--checkpoint-activations"], ["--offload-activations"]])
def test_checkpointed_activations_give_the_same_gradients(build, batch, options):
    """Dropout is inside what is replayed, so its masks are the same the second time."""
    settings = ("transformer_admin", "--dropout", "0.3", "--admin-init", "logn")
    expected = loss_and_gradients(*build(*settings), batch())
    loss, gradients = loss_and_gradients(*build(*settings, *options), batch())
    assert loss == expected[0]
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-5, atol=1e-6)


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
