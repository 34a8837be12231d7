"""Every method against its equation, and what all of them have in common; Admin's own tests are in test_model.py."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from helpers import SAME_PARTS, loss_and_gradients, prepared, unsettle

from admin_fairseq import AdminError, sub_layers
from admin_fairseq.architectures import METHODS
from admin_fairseq.methods import deepnorm_constants
from admin_fairseq.norms_in_front import subln_gain
from admin_fairseq.omega import CLOSED_FORMS
from admin_fairseq.rules import RuledModel

# Post-LN and Pre-LN are fairseq's own layers, and the other names with Admin's model are options of it
OURS = [method for method, (model, *_) in METHODS.items() if issubclass(MODEL_REGISTRY[model], RuledModel)]
# with a LayerNorm in front of every branch, and fairseq's options for that
IN_FRONT = ("preln", "periln", "keel", "lnscaling", "mixln", "subln", "siamese")
EQUATIONS = [method for method in OURS if METHODS[method].translation == f"transformer_{method}"]

DEPTHS = {
    **{"": (6, 6), "_6_6": (6, 6), "_12_12": (12, 12), "_18_18": (18, 18), "_60_12": (60, 12), "_72": (60, 12)},
    **{"_100_100": (100, 100), "_200": (100, 100)},
}
FFN_WIDTHS = {"_iwslt_de_en": 1024, "_wmt_en_de": 2048, "_wmt_en_de_big": 4096}


@pytest.mark.parametrize("method", METHODS)
def test_names(method):
    """The same names of width and depth for every method; everything else is the stock architecture's."""
    for suffix in (*DEPTHS, *FFN_WIDTHS):
        name, stock_name = f"transformer_{method}{suffix}", f"transformer{suffix if suffix in FFN_WIDTHS else ''}"
        ours, stock = Namespace(), Namespace()
        ARCH_CONFIG_REGISTRY[name](ours)
        ARCH_CONFIG_REGISTRY[stock_name](stock)
        assert ARCH_MODEL_REGISTRY[name] is ARCH_MODEL_REGISTRY[f"transformer_{method}"]
        assert (ours.encoder_layers, ours.decoder_layers) == DEPTHS.get(suffix, (6, 6))
        assert ours.encoder_normalize_before is ours.decoder_normalize_before is (method in IN_FRONT)
        assert ours.encoder_ffn_embed_dim == FFN_WIDTHS.get(suffix, 2048)
        for option in ("encoder_layers", "decoder_layers", "encoder_normalize_before", "decoder_normalize_before"):
            delattr(stock, option)
        assert vars(stock).items() <= vars(ours).items()


def layer_norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def reference_stack(method, stack, x, branches_of, layers):
    """The output of a stack by the papers' equations.

    ``branches_of(layer)`` lists a layer's (f, LN), f a function of the sub-layer's input.
    """
    s, count = x, 0
    for depth, layer in enumerate(stack.layers, start=1):
        y = x
        branches = branches_of(layer)
        for number, (f, norm) in enumerate(branches, start=1):
            name = ("self_attn", "final") if len(branches) == 2 else ("self_attn", "encoder_attn", "final")
            norm_out = getattr(layer, f"{name[number - 1]}_layer_norm_out", None)
            count += 1
            if method == "rezero":
                x = x + layer.rezero_weight * f(x)
            elif method == "admin":
                x = layer_norm(norm, norm.omega * x + f(x))
            elif method == "rezero_postln":
                x = layer_norm(norm, x + layer.rezero_weight * f(x))
            elif method == "deepnorm":
                n, m = layers
                alpha = 0.81 * (n**4 * m) ** 0.0625 if len(branches) == 2 else (3 * m) ** 0.25
                x = layer_norm(norm, alpha * x + f(x))
            elif method in ("looklinear", "dsinit"):
                x = layer_norm(norm, x + f(x))
            elif method == "tfixup":
                x = x + f(x)
            elif method == "periln":
                x = x + layer_norm(norm_out, f(layer_norm(norm, x)))
            elif method == "keel":
                x = layer_norm(norm_out, len(stack.layers) * len(branches) * x + f(layer_norm(norm, x)))
            elif method == "lnscaling":
                x = x + f(layer_norm(norm, x) / math.sqrt(depth))
            elif method == "mixln" and depth <= 0.25 * len(stack.layers):
                x = layer_norm(norm, x + f(x))
            elif method in ("mixln", "subln"):
                x = x + f(layer_norm(norm, x))
            elif method == "siamese":
                branch = f(layer_norm(norm, x + layer_norm(norm.branch_sum_norm, s)))
                x, s = layer_norm(norm_out, x + branch / math.sqrt(count)), s + branch
            elif method == "b2t":
                x = layer_norm(norm, x + f(x) + (y if number == len(branches) else 0))
            elif method == "residual":
                branch = f(x)
                s = s + branch
                x = layer_norm(norm, x + branch)
    if method in ("residual", "siamese"):
        return x + layer_norm(stack.layer_norm, s)
    return layer_norm(stack.layer_norm, x) if method in IN_FRONT and method != "keel" else x


def attention(module, x, mask=0.0):
    """Self-attention of x, (time, batch, d), step by step; SubLN has a LayerNorm in front of the last matrix."""
    q, k, v = (F.linear(x, each.weight, each.bias) for each in (module.q_proj, module.k_proj, module.v_proj))
    q, k, v = (each.unflatten(-1, (module.num_heads, -1)).permute(1, 2, 0, 3) for each in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(module.head_dim) + mask, dim=-1)
    return last_map(module.out_proj, (weights @ v).permute(2, 0, 1, 3).flatten(2))


def last_map(module, x):
    norm = getattr(module, "layer_norm", None)
    return F.linear(x if norm is None else layer_norm(norm, x), module.weight, module.bias)


@pytest.mark.parametrize("method", EQUATIONS)
def test_equation(method, build, batch):
    """Encoder and decoder output on real sentences, with weights that are no longer special."""
    depth = (5, 4) if method == "mixln" else (3, 2)  # its first quarter
    options = ("--encoder-layers", str(depth[0]), "--decoder-layers", str(depth[1]))
    model, _, _ = build(f"transformer_{method}", "--dropout", "0", *options)
    unsettle(model)
    model.eval()
    sample = batch(same_length=True)["net_input"]
    source, target = sample["src_tokens"], sample["prev_output_tokens"]

    def ffn(layer):
        return lambda x: last_map(layer.fc2, F.relu(F.linear(x, layer.fc1.weight, layer.fc1.bias)))

    def encoder_branches(layer):
        return [
            (lambda x: attention(layer.self_attn, x), layer.self_attn_layer_norm),
            (ffn(layer), layer.final_layer_norm),
        ]

    x = model.encoder.forward_embedding(source)[0].transpose(0, 1)
    encoded = reference_stack(method, model.encoder, x, encoder_branches, depth)
    actual = model.encoder(source, sample["src_lengths"])["encoder_out"][0]
    torch.testing.assert_close(actual, encoded, rtol=1e-5, atol=1e-5)

    decoder = model.decoder
    mask = torch.full((target.shape[1],) * 2, -math.inf).triu(1)

    def decoder_branches(layer):
        return [
            (lambda x: attention(layer.self_attn, x, mask), layer.self_attn_layer_norm),
            (lambda x: layer.encoder_attn(x, encoded, encoded)[0], layer.encoder_attn_layer_norm),
            (ffn(layer), layer.final_layer_norm),
        ]

    x = (decoder.embed_scale * decoder.embed_tokens(target) + decoder.embed_positions(target)).transpose(0, 1)
    decoded = reference_stack(method, decoder, x, decoder_branches, depth).transpose(0, 1)
    actual = model(source, sample["src_lengths"], target, features_only=True)[0]
    torch.testing.assert_close(actual, decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["--checkpoint-activations", "--offload-activations"])
@pytest.mark.parametrize("method", [method for method in OURS if method not in SAME_PARTS])
def test_checkpointed_activations_give_the_same_gradients(method, option, build, batch):
    """Dropout is inside what is replayed, so its masks are the same the second time."""
    results = []
    for extra in ([], [option]):
        model, task, cfg = build(f"transformer_{method}", "--dropout", "0.3", *extra)
        torch.manual_seed(7)
        unsettle(model)
        results.append(loss_and_gradients(model, task, cfg, batch()))
    (expected_loss, expected), (loss, gradients) = results
    assert loss == expected_loss
    assert gradients.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "is_prepared"),
    [
        (method, is_prepared)
        for method in OURS
        for is_prepared in (False, True)
        if is_prepared or method not in SAME_PARTS
    ],
)
def test_incremental_decoding_equals_full_decoding(method, is_prepared, build, batch):
    """By fairseq's own cache step by step, with padding once the model is prepared as fairseq-generate does."""
    model, _, _ = build(f"transformer_{method}")
    unsettle(model)
    model = prepared(model) if is_prepared else model.eval()
    net_input = batch(same_length=not is_prepared)["net_input"]
    encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    tokens, state = net_input["prev_output_tokens"], {}
    full, _ = model.decoder(tokens, encoder_out)
    for step in range(tokens.shape[1]):
        one, _ = model.decoder(tokens[:, : step + 1], encoder_out, incremental_state=state)
        keep = tokens[:, step].ne(model.decoder.padding_idx)
        torch.testing.assert_close(one[keep, 0], full[keep, step], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "flags", ["--encoder-normalize-before", "--decoder-normalize-before", "--ddp-backend fully_sharded"]
)
@pytest.mark.parametrize("method", OURS)
def test_another_place_of_norms_and_sharding_are_refused(method, flags, build):
    if method in IN_FRONT and flags.endswith("-normalize-before"):  # hydra can say so
        option = flags[2:].replace("-", "_")
        with pytest.raises(AdminError, match=f"{option}=false: this method's layers are Pre-LN"):
            ARCH_CONFIG_REGISTRY[f"transformer_{method}"](Namespace(**{option: False}))
    else:
        with pytest.raises(AdminError, match=flags.split()[-1]):
            build(f"transformer_{method}", *flags.split())


@pytest.mark.parametrize(("option", "width"), [("vector", 32), ("scalar", 1), ("fixed", 32)])
def test_omega_options(option, width, build):
    """Trained but for the first of each stack, unless it is fixed."""
    model, _, _ = build(f"transformer_admin{'' if option == 'vector' else f'_{option}'}")
    for stack in (model.encoder, model.decoder):
        omegas = [norm.omega for norm in sub_layers(stack).values()]
        assert {(type(omega), *omega.shape) for omega in omegas} == {(torch.nn.Parameter, width)}
        assert [omega.requires_grad for omega in omegas] == [False] + [option != "fixed"] * 5


@pytest.mark.parametrize("arguments", ["admin --admin-init logn", "admin_logn", "admin_sqrt"])
def test_closed_forms(arguments, build):
    """microsoft/admin-torch's two output changes, O(log n) and O(1), with n sub-layers of a stack."""
    assert CLOSED_FORMS["logn"](2, 200) == pytest.approx((201 / 5.303304908 - 1) ** 0.5)  # its example, 6.07
    model, _, _ = build(*f"transformer_{arguments}".split())
    for stack, n in ((model.encoder, 6), (model.decoder, 6)):
        expected = math.sqrt(n) if "sqrt" in arguments else math.sqrt((n + 1) / math.log(n + 1) - 1)
        values = [norm.omega.unique().item() for norm in sub_layers(stack).values()]
        assert values == pytest.approx([1.0] + [expected] * (n - 1))


def test_tfixup_scales_embeddings_once(build):
    """By the depth of their stack, or by the encoder's where both share them; and there is no LayerNorm."""
    layers = ("--encoder-layers", "4", "--decoder-layers", "3")
    for shared in ((), ("--share-all-embeddings",)):
        ours, stock = (build(f"transformer{name}", *layers, *shared)[0].state_dict() for name in ("_tfixup", ""))
        for stack, depth in (("encoder", 4), ("decoder", 4 if shared else 3)):
            name = f"{stack}.embed_tokens.weight"
            torch.testing.assert_close(ours[name], stock[name] * (9 * depth) ** (-1 / 4))
        assert not [name for name in ours if "layer_norm" in name]


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


def test_subln_gain():
    """Of 6-6 and of 12 layers: ln 18 = 2.890372, ln 12 = 2.484907, ln 24 = 3.178054."""
    assert subln_gain(6, 6) == pytest.approx({"encoder": 1.547288, "decoder": 1.700109}, rel=1e-6)
    assert subln_gain(0, 12) == pytest.approx({"decoder": 1.782709}, rel=1e-6)


GAINS = {  # of a model with 4 and 3 layers
    "deepnorm": {"encoder": 0.87 * (4**4 * 3) ** (-1 / 16), "decoder": (12 * 3) ** (-1 / 4)},
    "tfixup": {"encoder": 0.67 * 4 ** (-1 / 4), "decoder": 27 ** (-1 / 4)},
    "subln": {"encoder": math.sqrt(math.log(9) * math.log(8) / 3), "decoder": math.sqrt(math.log(9))},
}


@pytest.mark.parametrize("method", GAINS)
def test_starts_from_scaled_xavier(method, build):
    layers = ("--encoder-layers", "4", "--decoder-layers", "3")
    widths = ("--encoder-embed-dim", "64", "--encoder-ffn-embed-dim", "192")
    model, _, _ = build(f"transformer_{method}", *layers, *widths)
    checked = set()
    for name, module in model.named_modules():
        stack, projection = name.split(".")[0], name.split(".")[-1]
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            gain = GAINS[method][stack]
            if projection in ("q_proj", "k_proj"):
                gain = math.sqrt(0.5) if method == "tfixup" else 1  # fairseq's own
            elif method == "subln" and "encoder_attn" in name:
                gain = 1
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


@pytest.mark.parametrize("method", ["deepnorm", "keel", "lnscaling", "mixln", "siamese"])
def test_what_computes_with_depth_is_not_pruned(method, build):
    """alpha is that of the depth trained in, and a layer's number its own."""
    with pytest.raises(AdminError, match="--encoder-layers-to-keep: this method's layers need the number"):
        build(f"transformer_{method}", "--encoder-layers-to-keep", "0,2")


@pytest.mark.parametrize("method", ["b2t", "dsinit"])
def test_scales_by_depth(method, build):
    """B2T by that of the stack, DS-Init by the layer's own."""
    ours, _, _ = build(f"transformer_{method}")
    stock = build("transformer")[0].state_dict()
    for name, weight in ours.named_parameters():
        depth = {"encoder": 3, "decoder": 2}[name.split(".")[0]]
        if method == "dsinit" and ".layers." in name:
            depth = int(name.split(".")[2]) + 1
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


@pytest.mark.parametrize("method", ["periln", "keel", "siamese"])
def test_layers_may_be_dropped(method, build, batch):
    """A second LayerNorm is found by the sub-layer that runs, whichever layers do."""
    options = ("--encoder-layerdrop", "0.5", "--decoder-layerdrop", "0.5", "--encoder-layers", "6")
    model, task, cfg = build(f"transformer_{method}", *options)
    loss, gradients = loss_and_gradients(model, task, cfg, batch())
    assert loss.isfinite() and gradients.keys() < {name for name, _ in model.named_parameters()}
