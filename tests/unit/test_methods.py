"""The methods beside Admin: each against its equation, and from training to translations."""

import logging
import math
import re
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq_cli import generate as fairseq_generate
from helpers import checkpoint, needs_stock_translation, train_here

from admin_fairseq import AdminError
from admin_fairseq.architectures import METHODS
from admin_fairseq.methods import deepnorm_constants

# the stock model and Admin itself have tests of their own
RULES = ("rezero", "rezero_postln", "deepnorm", "looklinear", "b2t", "residual")


@pytest.mark.parametrize("method", METHODS)
def test_names(method):
    """The same names of width and depth for every method."""
    for suffix, layers in {"": (6, 6), "_18_18": (18, 18), "_72": (60, 12), "_200": (100, 100)}.items():
        args = Namespace()
        ARCH_CONFIG_REGISTRY[f"transformer_{method}{suffix}"](args)
        assert (args.encoder_layers, args.decoder_layers) == layers
        assert args.encoder_normalize_before is args.decoder_normalize_before is (method == "preln")
    for suffix, width in {"_iwslt_de_en": 1024, "_wmt_en_de": 2048, "_wmt_en_de_big": 4096}.items():
        args = Namespace()
        ARCH_CONFIG_REGISTRY[f"transformer_{method}{suffix}"](args)
        assert args.encoder_ffn_embed_dim == width
        assert ARCH_MODEL_REGISTRY[f"transformer_{method}{suffix}"] is ARCH_MODEL_REGISTRY[f"transformer_{method}"]


def layer_norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def reference_stack(method, stack, x, branches_of, layers):
    """The output of a stack by the papers' equations.

    ``branches_of(layer)`` lists a layer's (f, LN), f a function of the sub-layer's input.
    """
    s = x
    for layer in stack.layers:
        y = x
        branches = branches_of(layer)
        for number, (f, norm) in enumerate(branches, start=1):
            if method == "rezero":
                x = x + layer.rezero_weight * f(x)
            elif method == "rezero_postln":
                x = layer_norm(norm, x + layer.rezero_weight * f(x))
            elif method == "deepnorm":
                n, m = layers
                alpha = 0.81 * (n**4 * m) ** 0.0625 if len(branches) == 2 else (3 * m) ** 0.25
                x = layer_norm(norm, alpha * x + f(x))
            elif method == "looklinear":
                x = layer_norm(norm, x + f(x))
            elif method == "b2t":
                x = layer_norm(norm, x + f(x) + (y if number == len(branches) else 0))
            elif method == "residual":
                branch = f(x)
                s = s + branch
                x = layer_norm(norm, x + branch)
    return x + layer_norm(stack.layer_norm, s) if method == "residual" else x


@pytest.mark.parametrize("method", RULES)
def test_equation(method, build, batch):
    """Encoder and decoder output on real sentences, with weights that are no longer special."""
    model, _, _ = build(f"transformer_{method}", "--dropout", "0")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name or name.endswith(("bias", "rezero_weight")):
                weight.add_(torch.randn_like(weight) * 0.3)
    model.eval()
    sample = batch(same_length=True)["net_input"]
    source, target = sample["src_tokens"], sample["prev_output_tokens"]

    def ffn(layer):
        return lambda x: F.linear(
            F.relu(F.linear(x, layer.fc1.weight, layer.fc1.bias)), layer.fc2.weight, layer.fc2.bias
        )

    def encoder_branches(layer):
        return [
            (lambda x: layer.self_attn(x, x, x)[0], layer.self_attn_layer_norm),
            (ffn(layer), layer.final_layer_norm),
        ]

    x = model.encoder.forward_embedding(source)[0].transpose(0, 1)
    encoded = reference_stack(method, model.encoder, x, encoder_branches, (3, 2))
    actual = model.encoder(source, sample["src_lengths"])["encoder_out"][0]
    torch.testing.assert_close(actual, encoded, rtol=1e-5, atol=1e-5)

    decoder = model.decoder
    mask = torch.full((target.shape[1],) * 2, -math.inf).triu(1)

    def decoder_branches(layer):
        return [
            (lambda x: layer.self_attn(x, x, x, attn_mask=mask)[0], layer.self_attn_layer_norm),
            (lambda x: layer.encoder_attn(x, encoded, encoded)[0], layer.encoder_attn_layer_norm),
            (ffn(layer), layer.final_layer_norm),
        ]

    x = (decoder.embed_scale * decoder.embed_tokens(target) + decoder.embed_positions(target)).transpose(0, 1)
    decoded = reference_stack(method, decoder, x, decoder_branches, (3, 2)).transpose(0, 1)
    actual = model(source, sample["src_lengths"], target, features_only=True)[0]
    torch.testing.assert_close(actual, decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["rezero", "rezero_postln"])
def test_rezero_starts_as_the_identity(method, build, batch):
    model, _, _ = build(f"transformer_{method}", "--dropout", "0")
    source = batch(same_length=True)["net_input"]["src_tokens"]
    x = model.encoder.forward_embedding(source)[0].transpose(0, 1)
    if method == "rezero_postln":
        for _ in range(2 * 3):
            x = F.layer_norm(x, x.shape[-1:])
    torch.testing.assert_close(model.encoder(source)["encoder_out"][0], x, rtol=1e-5, atol=1e-5)
    norms = [name for name in model.state_dict() if "layer_norm" in name]
    assert bool(norms) == (method == "rezero_postln")


def test_deepnorm_constants():
    """Wang et al. 2022, figure 2, as microsoft/torchscale's encoder.py and decoder.py compute it.

    All but the encoder's beta: torchscale divides by (N^4 M)^(1/16) / 1.15, which puts 1.15 where the paper has 0.87.
    """
    for n, m in ((6, 6), (18, 18), (60, 12), (100, 100)):
        encoder, decoder = deepnorm_constants(n, m)["encoder"], deepnorm_constants(n, m)["decoder"]
        assert encoder[0] == pytest.approx(math.pow(math.pow(n, 4) * m, 0.0625) * 0.81)
        assert encoder[1] == pytest.approx(0.87 / (encoder[0] / 0.81))
        assert decoder == pytest.approx((math.pow(3.0 * m, 0.25), 1 / math.pow(12.0 * m, 0.25)))


def test_deepnorm_starts_from_scaled_xavier(build):
    layers = ("--encoder-layers", "4", "--decoder-layers", "3")
    widths = ("--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "192")
    model, _, _ = build("transformer_deepnorm", *layers, *widths)
    beta = {"encoder": 0.87 * (4**4 * 3) ** (-1 / 16), "decoder": (12 * 3) ** (-1 / 4)}
    checked = set()
    for name, module in model.named_modules():
        stack, projection = name.split(".")[0], name.split(".")[-1]
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            gain = 1 if projection in ("q_proj", "k_proj") else beta[stack]
            expected = gain * math.sqrt(2 / (module.in_features + module.out_features))
            error = 1 / math.sqrt(2 * module.weight.numel())  # of a standard deviation
            assert module.weight.std().item() == pytest.approx(expected, rel=5 * error), name
            assert not module.bias.any()
            checked.add((stack, projection))
    assert len(checked) == 12


def test_looklinear_starts_linear(build):
    """f((x + y) / 2) = (f(x) + f(y)) / 2, which no network with a working ReLU obeys."""
    for method, linear in (("looklinear", True), ("postln", False)):
        model, _, _ = build(f"transformer_{method}")
        x, y = torch.randn(2, 50, 32)
        for layer in (*model.encoder.layers, *model.decoder.layers):
            f = lambda x, layer=layer: layer.fc2(torch.relu(layer.fc1(x)))  # noqa: E731
            assert torch.allclose(f((x + y) / 2), (f(x) + f(y)) / 2, atol=1e-5) == linear


def test_looklinear_needs_an_even_width(build):
    with pytest.raises(AdminError, match="its width, 65, is odd"):
        build("transformer_looklinear", "--encoder-ffn-embed-dim", "65")


def test_looklinear_needs_an_activation_that_mirrors(build):
    build("transformer_looklinear", "--activation-fn", "gelu")
    for activation in ("tanh", "linear"):
        with pytest.raises(AdminError, match="with --activation-fn relu or gelu only"):
            build("transformer_looklinear", "--activation-fn", activation)


def test_deepnorm_is_not_pruned(build):
    """alpha is that of the depth trained in."""
    with pytest.raises(AdminError, match="--encoder-layers-to-keep: this method's layers need the number"):
        build("transformer_deepnorm", "--encoder-layers-to-keep", "0,2")


def test_b2t_scales_by_depth(build):
    b2t, _, _ = build("transformer_b2t")
    stock = build("transformer")[0].state_dict()
    for name, weight in b2t.named_parameters():
        depth = {"encoder": 3, "decoder": 2}[name.split(".")[0]]
        scaled = ".layers." in name and name.endswith("weight") and "layer_norm" not in name
        torch.testing.assert_close(weight, stock[name] * (depth**-0.5 if scaled else 1))


def test_residual_keeps_no_stream(build, batch, monkeypatch):
    """The sum of the branches is not kept, with its graph, beyond a layer's forward pass; nor where that fails."""
    model, _, _ = build("transformer_residual")
    layers = [*model.encoder.layers, *model.decoder.layers]
    net_input = batch()["net_input"]
    model(**net_input)
    assert [layer.branch_sum for layer in layers] == [None] * len(layers)

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layers[0].fc2, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**net_input)
    assert layers[0].branch_sum is None


@pytest.mark.parametrize("option", ["scalar", "fixed"])
def test_omega_options(option, build):
    model, _, _ = build(f"transformer_admin_{option}")
    omegas = {name: p for name, p in model.named_parameters() if name.endswith(".omega")}
    assert len(omegas) == 2 * 3 + 3 * 2
    first = ("encoder.layers.0.self_attn_layer_norm.omega", "decoder.layers.0.self_attn_layer_norm.omega")
    for name, omega in omegas.items():
        assert omega.numel() == (1 if option == "scalar" else 32)
        assert omega.requires_grad == (option == "scalar" and name not in first)


@pytest.mark.parametrize("method", ["admin_logn", "admin_sqrt"])
def test_closed_forms(method, build):
    """microsoft/admin-torch's two output changes, O(log n) and O(1)."""
    model, _, _ = build(f"transformer_{method}")
    for stack, n in ((model.encoder, 6), (model.decoder, 6)):
        expected = math.sqrt((n + 1) / math.log(n + 1) - 1) if method == "admin_logn" else math.sqrt(n)
        values = [norm.omega[0].item() for name, norm in stack.named_modules() if hasattr(norm, "omega")]
        assert values == pytest.approx([1] + [expected] * (n - 1))


@pytest.mark.parametrize("method", RULES)
def test_checkpointed_activations_give_the_same_gradients(method, build, batch):
    sample, results = batch(), []
    for extra in ([], ["--checkpoint-activations"]):
        model, task, cfg = build(f"transformer_{method}", "--dropout", "0.3", *extra)
        torch.manual_seed(11)
        loss, _, _ = task.build_criterion(cfg.criterion)(model.train(), sample)
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", RULES)
def test_pre_ln_and_sharding_are_refused(method, build):
    with pytest.raises(AdminError, match="--decoder-normalize-before"):
        build(f"transformer_{method}", "--decoder-normalize-before")
    with pytest.raises(AdminError, match="fully_sharded"):
        build(f"transformer_{method}", "--ddp-backend", "fully_sharded")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=needs_stock_translation if m in ("postln", "preln") else ()) for m in METHODS]
)
def test_trains_resumes_and_generates(method, data, tmp_path, caplog, capsys):
    """By fairseq's own main functions, in this process: two updates, two more from the checkpoint, translations."""
    flags = "--dropout 0.1 --no-epoch-checkpoints --disable-validation"
    train_here(f"transformer_{method}", data, tmp_path, flags)
    caplog.set_level(logging.INFO)
    train_here(f"transformer_{method}", data, tmp_path, f"{flags} --max-update 4")
    assert "@ 2 updates" in caplog.text
    assert checkpoint(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 4

    path = ["--path", str(tmp_path / "checkpoint_last.pt"), "--cpu", "--beam", "2", "--max-len-b", "5"]
    argv = [str(data), *path, "-s", "de", "-t", "en", "--required-batch-size-multiple", "1"]
    parser = options.get_generation_parser()
    fairseq_generate.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, argv)))
    assert len(re.findall(r"^H-\d+\t", capsys.readouterr().out, re.M)) == 30


@pytest.mark.parametrize("method", RULES)
def test_incremental_decoding_equals_full_decoding(method, build, batch):
    model, _, _ = build(f"transformer_{method}")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("rezero_weight"):
                weight.fill_(0.7)
    model.eval()
    net_input = batch(same_length=True)["net_input"]
    encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    tokens, state = net_input["prev_output_tokens"], {}
    full, _ = model.decoder(tokens, encoder_out)
    for step in range(tokens.shape[1]):
        one, _ = model.decoder(tokens[:, : step + 1], encoder_out, incremental_state=state)
        torch.testing.assert_close(one[:, 0], full[:, step], rtol=1e-4, atol=1e-5)
