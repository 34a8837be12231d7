"""What holds for every architecture of every method, decoder-only ones included."""

import copy
import io
import pickle
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from helpers import ROOT, SAME_PARTS, loss_and_gradients, translate, unsettle

from admin_fairseq import AdminError
from admin_fairseq.architectures import METHODS
from admin_fairseq.methods import deepnorm_constants
from admin_fairseq.rules import RuledModel

# with a LayerNorm in front of every branch
IN_FRONT = ("preln", "periln", "keel", "lnscaling", "mixln", "subln", "siamese")
LANGUAGE_MODELS = [m for m in METHODS if issubclass(MODEL_REGISTRY[METHODS[m].language_model], RuledModel)]


def tokens(rows=3, length=7):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("method", METHODS)
def test_depths_of_deep_encoders(method):
    for suffix in ("12_1", "12_2", "18_2", "24_6", "40_6"):
        args = Namespace()
        ARCH_CONFIG_REGISTRY[f"transformer_{method}_{suffix}"](args)
        assert f"{args.encoder_layers}_{args.decoder_layers}" == suffix


@pytest.mark.parametrize("method", METHODS)
def test_names_of_language_models(method):
    stock = Namespace()
    ARCH_CONFIG_REGISTRY["transformer_lm"](stock)
    for suffix, layers in {"": 6, "_6": 6, "_12": 12, "_48": 48, "_100": 100}.items():
        name, args = f"transformer_lm_{method}{suffix}", Namespace()
        ARCH_CONFIG_REGISTRY[name](args)
        assert ARCH_MODEL_REGISTRY[name] is ARCH_MODEL_REGISTRY[f"transformer_lm_{method}"]
        assert args.decoder_layers == layers
        assert args.decoder_normalize_before is (method in IN_FRONT)
        for option in vars(stock).keys() - {"decoder_layers", "decoder_normalize_before"}:
            assert getattr(args, option) == getattr(stock, option)


@pytest.fixture
def any_model(build, build_lm):
    """any_model(method, kind, *options) -> (model, its input, task, cfg)."""

    def any_model(method, kind, *options):
        small = ("--decoder-layers", "2", *options)
        model, task, cfg = (build_lm if kind == "transformer_lm" else build)(f"{kind}_{method}", *small)
        net_input = {"src_tokens": tokens(), "src_lengths": torch.full((3,), 7)}
        if kind == "transformer":
            net_input["prev_output_tokens"] = tokens()
        return model, net_input, task, cfg

    return any_model


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        (method, kind, options)
        for method in METHODS
        for kind in ("transformer", "transformer_lm")
        for options in ((), ("--checkpoint-activations",))
        if method not in SAME_PARTS or (kind == "transformer" and options)
    ],
)
def test_a_model_can_be_pickled(method, kind, options, any_model):
    model, net_input, *_ = any_model(method, kind, *options)
    expected = model.eval()(**net_input)[0]
    saved = io.BytesIO()
    torch.save(model, saved)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert torch.equal(other(**net_input)[0], expected)


def test_a_pickle_is_read_by_another_process(any_model, tmp_path):
    """Which has built no model, so that no class of a rule and a layer is there yet."""
    model, net_input, *_ = any_model("admin", "transformer")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model.eval(), net_input, model(**net_input)[0])))
    script = "import pickle, sys, torch, admin_fairseq; model, given, expected = pickle.load(open(sys.argv[1], 'rb'))"
    script += "; assert torch.equal(model(**given)[0], expected)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model.pickle")], cwd=ROOT, check=True)


@pytest.mark.parametrize("method", ["admin", "preln", "rezero", "subln", "residual", "siamese"])
def test_translates_in_bf16_where_a_command_asks_for_it(method, any_model):
    model, net_input, task, cfg = any_model(method, "transformer")
    model.eval()
    sample = {"net_input": net_input}
    by_checkpoint, by_command = copy.deepcopy(cfg), copy.deepcopy(cfg)
    by_checkpoint.common.bf16 = by_command.common.bf16 = True  # a checkpoint's settings say how it was trained
    by_command.common_eval.path = "checkpoint_best.pt"
    scores = {}
    for dtype, cfg in ((torch.float32, by_checkpoint), (torch.bfloat16, by_command)):
        model.prepare_for_inference_(cfg)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        scores[dtype] = torch.stack([each["positional_scores"].mean() for each in translate([model], task, sample)])
    torch.testing.assert_close(scores[torch.bfloat16], scores[torch.float32], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("method", LANGUAGE_MODELS)
def test_language_models_decode_step_by_step(method, any_model):
    model, net_input, *_ = any_model(method, "transformer_lm")
    unsettle(model.eval())
    full, state = model(**net_input)[0], {}
    for step in range(full.shape[1]):
        one, _ = model.decoder(net_input["src_tokens"][:, : step + 1], incremental_state=state)
        torch.testing.assert_close(one[:, 0], full[:, step], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", LANGUAGE_MODELS)
def test_language_models_with_checkpointed_activations(method, any_model):
    results = []
    for options in ((), ("--checkpoint-activations",)):
        model, net_input, task, cfg = any_model(method, "transformer_lm", "--dropout", "0.3", *options)
        unsettle(model)
        sample = {"net_input": net_input, "target": tokens(), "ntokens": 21}
        results.append(loss_and_gradients(model, task, cfg, sample))
    (expected_loss, expected), (loss, gradients) = results
    assert loss == expected_loss
    assert gradients.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", LANGUAGE_MODELS)
def test_norms_of_language_models_stay_in_place(method, build_lm):
    if method in IN_FRONT:  # hydra can say so
        with pytest.raises(AdminError, match="decoder_normalize_before=false"):
            ARCH_CONFIG_REGISTRY[f"transformer_lm_{method}"](Namespace(decoder_normalize_before=False))
    else:
        with pytest.raises(AdminError, match="--decoder-normalize-before"):
            build_lm(f"transformer_lm_{method}", "--decoder-normalize-before")


def test_deepnorm_of_a_language_model():
    """Wang et al. 2022, figure 2: alpha (2M)^(1/4) and beta (8M)^(-1/4) for a decoder alone."""
    assert deepnorm_constants(0, 8) == {"decoder": (pytest.approx(2.0), pytest.approx(64**-0.25))}


@pytest.mark.parametrize("kind", ["transformer", "transformer_lm"])
@pytest.mark.parametrize("method", ["preln", "admin", "rezero", "siamese"])  # drawn where all models are built
def test_the_authors_weights(method, kind, any_model):
    """Feed-forward networks as Xavier's uniform distribution, biases 0; from one seed, all else as fairseq's."""
    stock, ours = (
        dict(any_model(method, kind, "--init-weights", start)[0].named_parameters()) for start in ("fairseq", "authors")
    )
    assert stock.keys() == ours.keys()
    for name, weight in ours.items():
        module, _, part = name.rpartition(".")
        module = module.rpartition(".")[2]
        if module in ("fc1", "fc2") and part == "weight":
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.9 * bound < weight.abs().max() <= bound
            assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.15)  # of 2,048 numbers
        elif module in ("fc1", "fc2", "q_proj", "k_proj", "v_proj", "out_proj") and part == "bias":
            assert not weight.any()
        else:
            assert torch.equal(weight, stock[name]), name


@pytest.mark.parametrize("kind", ["transformer", "transformer_lm"])
def test_the_recommended_start_is_the_default(kind, any_model):
    """Of Admin with a pre-pass; a closed form and other methods keep fairseq's weights, whose biases are not 0."""

    def has_biases(method, *options):
        model = any_model(method, kind, *options)[0]
        return model.decoder.layers[0].fc1.bias.any().item()

    model, *_ = any_model("admin", kind)
    assert model.margin == 16
    assert [has_biases(method) for method in ("admin", "admin_fixed", "admin_logn", "preln")] == [0, 0, 1, 1]
    assert has_biases("admin", "--admin-init", "unit") and has_biases("admin", "--init-weights", "fairseq")
    assert not has_biases("admin_logn", "--init-weights", "authors")


@pytest.mark.parametrize("method", ["b2t", "looklinear", "dsinit"])
def test_methods_start_from_the_weights_asked_for(method, any_model):
    """B2T and DS-Init scale, by L^(-1/2) and l^(-1/2), and LookLinear mirrors what the authors' fairseq would draw."""
    options = ("--init-weights", "authors", "--encoder-layers", "4")
    plain, ours = (any_model(name, "transformer", *options)[0].encoder.layers[3] for name in ("postln", method))
    if method in ("b2t", "dsinit"):
        torch.testing.assert_close(ours.fc1.weight, plain.fc1.weight / 2)
    else:
        half = len(plain.fc1.weight) // 2
        assert torch.equal(ours.fc1.weight, torch.cat([plain.fc1.weight[:half], -plain.fc1.weight[:half]]))


def test_another_start_of_weights_is_refused():
    with pytest.raises(AdminError, match="--init-weights xavier: choose fairseq or authors"):
        ARCH_CONFIG_REGISTRY["transformer_preln"](Namespace(init_weights="xavier"))
