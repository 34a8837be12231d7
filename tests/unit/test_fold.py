"""fold: an Admin checkpoint as a stock one with the same outputs; unfold: the other way, at omega 1."""

from __future__ import annotations

import copy
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fairseq import models
from fairseq.models.transformer import TransformerConfig
from omegaconf import OmegaConf

from admin_fairseq import AdminError, sub_layers
from admin_fairseq.checkpoints import authors, checks
from admin_fairseq.checkpoints.files import settings
from admin_fairseq.checkpoints.fold import PADDING, _parameters, fold, unfold
from admin_fairseq.checkpoints.verify import compare, load_model
from admin_fairseq.rules import FAST_PATH_COPIES

NO_DROPOUT = ["--dropout", "0"]


def randomise(model, first=False, size=None):
    """Norms and omegas far from 1, of both signs; ``first``: also the omegas that training leaves at 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" in name or "layernorm_embedding" in name:
                sign = torch.randint(0, 2, weight.shape).mul(2).sub(1)
                weight.copy_(sign * torch.empty_like(weight).uniform_(0.3, 12 if name.endswith("omega") else 2))
        if not first:
            for stack in model.stacks().values():
                next(iter(sub_layers(stack).values())).omega.fill_(1)
    return model


def state_of(model, cfg, **extra):
    """What fairseq's trainer would save."""
    return {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": {name: weight.clone() for name, weight in model.state_dict().items()},
        "optimizer_history": [{"num_updates": 3}],
        "extra_state": {"train_iterator": {"epoch": 1}, **extra},
    }


def stock_model(state, task):
    """Built from the folded checkpoint alone, as fairseq builds it."""
    args = settings(state)
    assert args.arch in ("transformer", "transformer_lm")
    model = task.build_model(args)
    assert not isinstance(model, models.MODEL_REGISTRY["transformer_admin"])
    for module in model.modules():
        module.can_use_fastpath = False  # fairseq 0.12.2
    model = model.to(next(iter(state["model"].values())).dtype)
    model.load_state_dict(state["model"], strict=True)
    return model.eval()


def largest_difference(one, two, sample):
    with torch.no_grad():
        return (one(**sample["net_input"])[0] - two(**sample["net_input"])[0]).abs().max().item()


SHARED = ["--share-all-embeddings"]
VARIANTS = [
    [],
    SHARED,
    ["--layernorm-embedding", *SHARED],
    ["--decoder-embed-dim", "48", "--decoder-output-dim", "48", "--share-decoder-input-output-embed"],
    ["--encoder-learned-pos", "--decoder-learned-pos", "--no-scale-embedding"],
    ["--no-token-positional-embeddings", "--activation-fn", "gelu"],
    ["--quant-noise-pq", "0.2"],
    ["--quant-noise-pq", "0.2", "--layernorm-embedding"],
    ["--checkpoint-activations", "--encoder-layerdrop", "0.5", "--decoder-layerdrop", "0.5"],
    ["--merge-src-tgt-embed"],
    ["--adaptive-softmax-cutoff", "100,200"],
    ["--encoder-layers", "1", "--decoder-layers", "1", "--no-cross-attention", "--cross-self-attention"],
]


@pytest.mark.parametrize("options", VARIANTS, ids=" ".join)
def test_computes_the_same(build, batch, exact_softmax, options):
    if "--merge-src-tgt-embed" in options and "merge_src_tgt_embed" not in TransformerConfig.__dataclass_fields__:
        pytest.skip("not in this fairseq")
    admin, task, cfg = build("transformer_admin", *options)
    state = state_of(randomise(admin).double(), cfg)
    before = copy.deepcopy(state["model"])
    folded = fold(state)
    assert largest_difference(admin.eval(), stock_model(folded, task), batch()) < 1e-9
    assert not [name for name in folded["model"] if "omega" in name]
    assert "admin" not in repr(folded["args"]) and "admin" not in repr(vars(folded["args"]))
    assert "init_weights" not in folded["args"] and folded["args"].user_dir is None
    assert folded["cfg"] is None and "last_optimizer_state" not in folded
    assert all(torch.equal(weight, before[name]) for name, weight in state["model"].items())


@pytest.mark.parametrize("omega", ["vector", "number"])
@pytest.mark.parametrize("options", VARIANTS[:-3], ids=" ".join)
def test_trained_first_omega(build, batch, exact_softmax, options, omega):
    """By untying, or into a map that ends in the stack's input: exact either way."""
    admin, task, cfg = build("transformer_admin", *options)
    state = state_of(randomise(admin, first=True).double(), cfg)
    if omega == "number":
        for name, weight in admin.state_dict().items():
            if name.endswith("omega"):
                weight.fill_(weight[0])
                state["model"][name] = weight[:1].clone()
    has_map = "--layernorm-embedding" in options
    if not has_map:
        with pytest.raises(AdminError, match="--untie"):
            fold(state)
    folded = fold(state, untie=not has_map)
    stock = stock_model(folded, task)
    assert largest_difference(admin.eval(), stock, batch()) < 1e-9
    positions = folded["model"].get("encoder.embed_positions.weight", torch.zeros(PADDING + 1))
    assert not positions[PADDING].any()  # as fairseq starts learned ones, and keeps them
    if options == SHARED:
        shared = (stock.encoder.embed_tokens, stock.decoder.embed_tokens, stock.decoder.output_projection)
        assert len({module.weight.data_ptr() for module in shared}) == 3


def test_untied_weights_of_other_fairseqs(build):
    """0.9 saves no output layer where it is the embeddings; 0.12.2 saves a number beside sinusoidal positions."""
    admin, _, cfg = build("transformer_admin", *SHARED)
    state = state_of(randomise(admin, first=True), cfg)
    positions = {f"{stack}.embed_positions._float_tensor": torch.ones(1) for stack in ("encoder", "decoder")}
    weights = {**state["model"], **positions}
    embeddings = weights["decoder.embed_tokens.weight"]
    del weights["decoder.output_projection.weight"]
    folded = fold({**state, "model": weights}, untie=True)["model"]
    assert torch.equal(folded["decoder.output_projection.weight"], embeddings)
    assert not torch.equal(folded["decoder.embed_tokens.weight"], embeddings)
    assert not positions.keys() & folded.keys()


@pytest.mark.parametrize(
    ("stack", "options"),
    [("encoder", SHARED), ("decoder", SHARED), ("decoder", ["--share-decoder-input-output-embed"])],
)
def test_one_stack_is_untied(build, batch, exact_softmax, stack, options):
    admin, task, cfg = build("transformer_admin", *options)
    with torch.no_grad():
        next(iter(sub_layers(getattr(admin, stack)).values())).omega.uniform_(0.5, 2)
    folded = fold(state_of(admin.double(), cfg), untie=True)
    stock = stock_model(folded, task)
    assert largest_difference(admin.eval(), stock, batch()) < 1e-9
    assert folded["args"].share_all_embeddings is False
    decoder = stock.decoder
    assert (decoder.embed_tokens.weight is decoder.output_projection.weight) == (stack == "encoder")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--layernorm-embedding", "--scale-fc", "--scale-attn", "--scale-heads", "--scale-resids"],
        ["--adaptive-input", "--adaptive-input-cutoff", "100", "--share-decoder-input-output-embed"],
        ["--decoder-input-dim", "16", "--decoder-output-dim", "16", "--no-decoder-final-norm"],
    ],
    ids=" ".join,
)
def test_language_model(build_lm, exact_softmax, options):
    if "--adaptive-input" in options:
        options = [*options[:3], "--adaptive-softmax-cutoff", "100", "--tie-adaptive-weights"]
    elif (
        "--scale-fc" in options and "scale_fc" not in models.MODEL_DATACLASS_REGISTRY["transformer_lm"].__annotations__
    ):
        pytest.skip("not in this fairseq")
    admin, task, _ = build_lm("transformer_lm_admin", "--decoder-layers", "3", *options)
    has_norm = "--layernorm-embedding" in options
    randomise(admin, first=has_norm or "--adaptive-input" not in options).double()
    cfg = OmegaConf.create({"task": task.cfg, "model": {"_name": "transformer_lm_admin"}})
    state = state_of(admin, cfg)
    state["cfg"]["model"] = {**vars(admin.decoder.args), "_name": "transformer_lm_admin"}
    folded = fold(state, untie=not has_norm)
    tokens = torch.randint(4, len(task.source_dictionary), (3, 9))
    sample = {"net_input": {"src_tokens": tokens}}
    assert largest_difference(admin.eval(), stock_model(folded, task), sample) < 1e-9


def test_weights_that_a_language_model_does_not_share(build_lm):
    admin, _, _ = build_lm("transformer_lm_admin", "--decoder-layers", "1", "--adaptive-softmax-cutoff", "100")
    args = Namespace(**{**vars(admin.decoder.args), "arch": "transformer_lm_admin", "optimizer": "adam"})
    optimizer = torch.optim.Adam([weight for weight in admin.parameters() if weight.requires_grad]).state_dict()
    state = {**state_of(admin, OmegaConf.create()), "args": args, "last_optimizer_state": optimizer}
    kept = fold(state, keep_optimizer=True)["last_optimizer_state"]
    assert len(kept["param_groups"][0]["params"]) == len(optimizer["param_groups"][0]["params"]) - 1  # omega
    randomise(admin, first=True)
    untied = fold({**state, "model": admin.state_dict()}, untie=True)["model"]
    assert "decoder.embed_tokens.weight" in untied and "decoder.output_projection.weight" not in untied


@pytest.mark.parametrize("form", ["legacy", "hydra"])
def test_forms_of_settings(build, batch, exact_softmax, form):
    admin, task, cfg = build("transformer_admin", *SHARED)
    state = state_of(randomise(admin).double(), cfg)
    flat = vars(state["cfg"]["model"])
    if form == "legacy":
        del flat["_name"]
        state = {**state, "args": Namespace(**flat), "cfg": None}
    else:
        nested = {"encoder": {"layers": 3}, "decoder": {"layers": 2}}
        own = {name: value for name, value in flat.items() if name.startswith(("encoder", "decoder", "share", "admin"))}
        state["cfg"]["model"] = {**own, **nested, "_name": "transformer_admin"}
    assert largest_difference(admin.eval(), stock_model(fold(state), task), batch()) < 1e-9


def test_keeps_dtype_and_folds_the_average(build):
    admin, _, cfg = build("transformer_admin")
    average = randomise(copy.deepcopy(admin)).state_dict()
    for stack in ("encoder", "decoder"):
        average[f"{stack}.layers.0.self_attn_layer_norm.omega"] *= 1.001  # drifts where the model's stays 1
    admin.decoder.layers[1].final_layer_norm.omega.data.uniform_(1, 3)
    state = state_of(admin.half(), cfg, ema=average, ema_fp32_params=dict(average), metrics={"n": np.ones(4)})
    folded = fold(state)
    before, omega = (state["model"][f"decoder.layers.1.{part}"] for part in ("fc1.weight", "final_layer_norm.omega"))
    expected = (before.double() / omega.double()).half()  # rounded once
    assert torch.equal(folded["model"]["decoder.layers.1.fc1.weight"], expected)
    assert {weight.dtype for name, weight in folded["model"].items() if "version" not in name} == {torch.float16}
    for name in ("ema", "ema_fp32_params"):
        weights = folded["extra_state"][name]
        assert weights.keys() == folded["model"].keys()
        before, omega = (average[f"encoder.layers.1.{part}"] for part in ("fc1.weight", "final_layer_norm.omega"))
        torch.testing.assert_close(weights["encoder.layers.1.fc1.weight"], before / omega)
    assert "metrics" not in folded["extra_state"]
    average["encoder.layers.1.final_layer_norm.omega"][3] = 0
    with pytest.raises(AdminError) as raised:
        fold(state)
    assert str(raised.value) == (
        "no exact fold:\n  - of the weights' average, encoder.layers.1.final_layer_norm.omega reaches 0.0e+00, and"
        " weights are divided by it"
    )


def test_all_reasons_at_once(build):
    admin, _, cfg = build("transformer_admin", "--no-cross-attention", "--cross-self-attention")
    with torch.no_grad():
        norms = {stack: list(sub_layers(getattr(admin, stack)).values()) for stack in ("encoder", "decoder")}
        norms["encoder"][0].omega.fill_(2)
        norms["encoder"][3].omega[5] = 1e-9
        norms["encoder"][4].omega[5] = float("nan")
        norms["decoder"][2].omega.fill_(3)
    state = state_of(admin, cfg)
    del state["model"]["decoder.layers.1.self_attn.q_proj.weight"]
    settings(state)
    state["cfg"]["model"].decoder_layers_to_keep = "0,1"
    with pytest.raises(AdminError) as raised:
        fold(state)
    lines = str(raised.value).splitlines()[1:]
    for needle in (
        "  - layers_to_keep is set: layers that follow one another only after pruning cannot be folded",
        "first omega of the encoder",
        "encoder.layers.1.final_layer_norm.omega reaches 1.0e-09",
        "encoder.layers.2.self_attn_layer_norm.omega reaches nan",
        "decoder.layers.1.self_attn_layer_norm.omega is not 1: --cross-self-attention",
        "no decoder.layers.1.self_attn.q_proj.weight",
    ):
        assert len([line for line in lines if needle in line]) == 1, needle
    assert len(lines) == 6 and lines[0].endswith("cannot be folded")


def test_what_is_not_asked(build):
    """How omega started: it has its values, and a start of the user's own may be known in their folder only."""
    admin, _, cfg = build("transformer_admin")
    state = state_of(admin, cfg)
    for name, value in {"init": "mine", "margin": -1.0, "profile_batches": 0}.items():
        values = {**vars(state["cfg"]["model"]), f"admin_{name}": value}
        assert fold({**state, "args": Namespace(**values), "cfg": None})["model"]


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_layers_to_keep(build, stack):
    admin, _, cfg = build("transformer_admin")
    state = state_of(admin, cfg)
    settings(state)
    setattr(state["cfg"]["model"], f"{stack}_layers_to_keep", "0,1")
    with pytest.raises(AdminError, match="layers_to_keep is set"):
        fold(state)


def test_how_near_zero_omega_may_come(build):
    admin, _, cfg = build("transformer_admin")
    admin.encoder.layers[1].final_layer_norm.omega.data[3] = -0.0011
    fold(state_of(admin, cfg))
    admin.encoder.layers[1].final_layer_norm.omega.data[3] = -0.0009
    with pytest.raises(AdminError, match=r"encoder.layers.1.final_layer_norm.omega reaches 9.0e-04"):
        fold(state_of(admin, cfg))


def test_half_precision_overflow(build):
    admin, _, cfg = build("transformer_admin")
    with torch.no_grad():
        admin.encoder.layers[0].fc1.weight[0, 0] = 60000
        admin.encoder.layers[0].final_layer_norm.omega.fill_(0.5)
    with pytest.raises(AdminError, match=r"\n  - encoder.layers.0.fc1.weight times omega is beyond torch.float16$"):
        fold(state_of(admin.half(), cfg))


def test_only_the_right_models(build):
    stock, _, cfg = build("transformer")
    with pytest.raises(AdminError, match="architecture transformer, not of an Admin model"):
        fold(state_of(stock, cfg))
    pre, _, cfg = build("transformer", "--encoder-normalize-before")
    with pytest.raises(AdminError, match="encoder-normalize-before"):
        unfold(state_of(pre, cfg))
    admin, _, cfg = build("transformer_admin")
    with pytest.raises(AdminError, match="architecture transformer_admin, not of a stock"):
        unfold(state_of(admin, cfg))
    odd = state_of(stock, build("transformer")[2])
    odd["model"] = {name.replace("_layer_norm", "_norm"): weight for name, weight in odd["model"].items()}
    with pytest.raises(AdminError, match="no LayerNorms of the names"):
        unfold(odd)


@pytest.mark.parametrize("arch", ["transformer_iwslt_de_en", "transformer_postln"])
def test_unfold_of_a_named_architecture(build, arch):
    """The sizes that it stands for go with it; those of Admin's own architecture are the same as Post-LN's."""
    stock, _, cfg = build("transformer")
    args = unfold({**state_of(stock, cfg), "args": Namespace(arch=arch, encoder_layers=3)})["args"]
    assert (args.arch, args.encoder_layers) == ("transformer_admin", 3)
    assert getattr(args, "encoder_ffn_embed_dim", None) == (1024 if "iwslt" in arch else None)


def test_what_cannot_be_untied(build):
    admin, _, cfg = build("transformer_admin", *SHARED)
    state = state_of(randomise(admin, first=True), cfg)
    why = "--untie makes new weights, which have no state for --keep-optimizer; drop one of them"
    with pytest.raises(AdminError, match=f"^no exact fold:\n  - {why}$"):
        fold(state, untie=True, keep_optimizer=True)
    merged = {**state["cfg"], "model": Namespace(**{**vars(state["cfg"]["model"]), "merge_src_tgt_embed": True})}
    with pytest.raises(AdminError, match="first omega of the decoder is not 1, and its embeddings cannot be untied"):
        fold({**state, "cfg": merged}, untie=True)
    del state["model"]["encoder.embed_tokens.weight"]
    with pytest.raises(AdminError, match="first omega of the encoder is not 1, and its embeddings cannot be untied"):
        fold(state, untie=True)


@pytest.mark.parametrize("options", VARIANTS[:4], ids=" ".join)
def test_round_trip(build, batch, options):
    stock, task, cfg = build("transformer", *options)
    state = state_of(stock, cfg)
    copies = {f"encoder.layers.0.{name}": torch.ones(2) for name in FAST_PATH_COPIES}  # fairseq 0.12.2 has them
    unfolded = unfold({**state, "model": {**state["model"], **copies}})
    assert not copies.keys() & unfolded["model"].keys()
    admin = task.build_model(settings(unfolded))
    admin.load_state_dict(unfolded["model"], strict=True)
    assert all(torch.all(norm.omega == 1) for stack in admin.stacks().values() for norm in sub_layers(stack).values())
    again = fold(unfolded)
    names = [name for name in state["model"] if name in again["model"]]
    equal = {name: torch.equal(state["model"][name], again["model"][name]) for name in names}
    # fairseq 0.12.2 does not initialise it
    assert not [name for name, same in equal.items() if not same and not name.endswith("_float_tensor")]
    assert names == list(again["model"])
    assert fold(unfold(again))["args"] == again["args"]


def adam_state(model, sample):
    """One step's moments, as fairseq's trainer would save them."""
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad])
    model.zero_grad()
    logits = model(**sample["net_input"])[0]
    F.cross_entropy(logits.transpose(1, 2), sample["target"], ignore_index=PADDING).backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("options", [[], SHARED, ["--layernorm-embedding", "--share-decoder-input-output-embed"]])
def test_optimizer_state(build, batch, exact_softmax, options):
    """The moments are those that the folded model's own gradients have."""
    admin, task, cfg = build("transformer_admin", *options, *NO_DROPOUT)
    state = state_of(randomise(admin).double(), cfg)
    state["last_optimizer_state"] = adam_state(admin, batch())
    assert "last_optimizer_state" not in fold(state)
    folded = fold(state, keep_optimizer=True)
    stock = stock_model(folded, task).train()
    expected, found = adam_state(stock, batch()), folded["last_optimizer_state"]
    numbers = {name: number for number, (name, _) in enumerate(stock.named_parameters())}
    names = [name for name in numbers if name.split(".")[-1] not in FAST_PATH_COPIES]
    assert len(names) == len(found["param_groups"][0]["params"]) == len(found["state"])
    for number, entry in found["state"].items():
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                entry[moment], expected["state"][numbers[names[number]]][moment], rtol=1e-6, atol=1e-12
            )
    unfolded = unfold(folded, keep_optimizer=True)["last_optimizer_state"]
    assert len(unfolded["param_groups"][0]["params"]) == len(state["last_optimizer_state"]["param_groups"][0]["params"])
    assert fold(unfold(folded, keep_optimizer=True), keep_optimizer=True)["last_optimizer_state"]["state"].keys() == (
        found["state"].keys()
    )


def test_parameters_are_those_that_are_trained_once():
    merged = Namespace(merge_src_tgt_embed=True, share_decoder_input_output_embed=False)
    embeddings = [f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    others = ["encoder.version", "encoder.embed_positions._float_tensor", "decoder.output_projection.weight"]
    assert _parameters(dict.fromkeys([*embeddings, *others]), merged) == embeddings[:1]


def test_other_optimizer_states_are_refused(build, batch):
    admin, _, cfg = build("transformer_admin", *NO_DROPOUT)
    state = state_of(admin, cfg)
    with pytest.raises(AdminError, match="no optimizer state"):
        fold(state, keep_optimizer=True)
    state["last_optimizer_state"] = adam_state(admin, batch())
    sgd = {**state, "cfg": {**state["cfg"], "optimizer": {"_name": "sgd"}}}
    groups = {**state["last_optimizer_state"], "param_groups": 2 * state["last_optimizer_state"]["param_groups"]}
    for other in (sgd, {**state, "last_optimizer_state": groups}):
        with pytest.raises(AdminError, match="not that of --optimizer adam with one entry a parameter"):
            fold(other, keep_optimizer=True)
    with pytest.raises(AdminError, match="not that of a torch optimizer"):
        fold({**state, "last_optimizer_state": {"state": [], "param_groups": []}}, keep_optimizer=True)
    bad = copy.deepcopy(state)
    bad["last_optimizer_state"]["state"][1]["exp_avg_sq"] = torch.ones(3)
    with pytest.raises(AdminError, match=r"the state's entry for .* is of another shape"):
        fold(bad, keep_optimizer=True)
    del state["last_optimizer_state"]["param_groups"][0]["params"][1:]  # as with --fp16's one flat tensor
    with pytest.raises(AdminError, match="one entry a parameter"):
        fold(state, keep_optimizer=True)


def test_fixed_omega_has_no_optimizer_state(build, batch):
    admin, _, cfg = build("transformer_admin", "--admin-omega", "fixed", *NO_DROPOUT)
    state = state_of(admin, cfg)
    state["last_optimizer_state"] = adam_state(admin, batch())
    kept = fold(state, keep_optimizer=True)["last_optimizer_state"]
    assert len(kept["state"]) == len(state["last_optimizer_state"]["state"])
    assert {entry["exp_avg"].dtype for entry in kept["state"].values()} == {torch.float32}


def test_optimizers_of_the_plugin_are_not_asked_for(build):
    admin, _, cfg = build("transformer_admin")
    state = state_of(admin, cfg)
    for name, stock in {"radam": "adam", "novograd": "adam", "sgd": "sgd"}.items():
        state["cfg"]["optimizer"] = {"_name": name}
        assert fold(state)["args"].optimizer == stock


def test_verify_in_float64_and_on_other_data(build, data, monkeypatch):
    admin, task, cfg = build("transformer_admin")
    state = state_of(randomise(admin, first=True), cfg)
    folded = fold(state, untie=True)
    assert not compare(state, folded, str(data), sentences=5, untie=True).failures

    def slightly_wrong(state, untie):
        folded = fold(state, untie)
        folded["model"]["decoder.layers.0.fc2.bias"][0] += 1e-7
        return folded

    monkeypatch.setattr("admin_fairseq.checkpoints.verify.fold", slightly_wrong)
    (failure,) = compare(state, folded, str(data), sentences=5, untie=True).failures
    assert re.fullmatch(r"logits differ by \S+ in float64, more than 1.0e-09", failure)
    state["model"]["encoder.embed_tokens.weight"] = state["model"]["encoder.embed_tokens.weight"][:-1]
    with pytest.raises(AdminError, match=r"do not fit a model for DATA.*encoder.embed_tokens.weight"):
        load_model(state, task)


def test_verify_finds_a_difference(build, data):
    admin, _, cfg = build("transformer_admin")
    state = state_of(randomise(admin), cfg)
    folded = fold(state)
    found = compare(state, folded, str(data), sentences=10)
    assert not found.failures
    assert "10 of 10 translations are the same" in found.lines[-1]
    with pytest.raises(AdminError, match="no sentence"):
        compare(state, folded, str(data), sentences=0)
    output = folded["model"]["decoder.output_projection.weight"]
    folded["model"]["decoder.output_projection.weight"] = output.flip(0)
    failures = "; ".join(compare(state, folded, str(data), sentences=10).failures)
    assert re.search(r"logits differ by .* in float32, .*; \d+ of 10 translations differ", failures)


def test_verify_of_a_model_that_computes_no_numbers(build, data):
    """Weights that are finite, and whose products are not: no difference is more than none."""
    model, _, cfg = build("transformer_admin")
    state = state_of(randomise(model), cfg)
    state["model"]["decoder.layers.1.final_layer_norm.weight"] *= 1e30
    state["model"]["decoder.output_projection.weight"] *= 1e35
    with pytest.raises(AdminError, match="logits on DATA are not finite"):
        compare(state, fold(state), str(data), sentences=4)


def test_memory_that_fairseq_never_writes_may_hold_anything():
    """Its ``_float_tensor``, which only has a dtype: neither finite nor equal to itself."""
    nan = torch.tensor([float("nan")])
    model = torch.nn.Module()
    model.register_buffer("_float_tensor", nan)
    problems: list = []
    assert authors._fit({}, model, False, problems).keys() == {"_float_tensor"}
    assert problems == []
    checks.check_finite({"model": {"encoder.embed_positions._float_tensor": nan}})
    with pytest.raises(AdminError, match="its weight w holds"):
        checks.check_finite({"model": {"w": nan}})
