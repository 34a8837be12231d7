"""Checkpoints in the authors' layouts, written here by their key names, against their formulas in plain torch."""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.logging import meters
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from helpers import checkpoint, generate, run, train

from admin_fairseq import AdminError
from admin_fairseq.checkpoints.authors import convert
from admin_fairseq.checkpoints.files import load
from admin_fairseq.checkpoints.unpickling import Unpickler
from admin_fairseq.cli import main
from admin_fairseq.omega import sub_layers

PAD, EOS = 1, 2
# the sub-layers of a layer: the LayerNorm's name, and the authors' names of its omega
ENCODER = {"self_attn": "attention_ratio_change", "final": "fc_ratio_change"}
DECODER = {"self_attn": "self_ratio_change", "encoder_attn": "encoder_ratio_change", "final": "fc_ratio_change"}
MODULES = {"self_attn": "residual_self_attn.omega", "encoder_attn": "residual_cross_attn.omega"}
OMEGA_NAMES = {
    "clinic": (ENCODER, DECODER),
    "as_module": (
        {"self_attn": "residual_attn.omega", "final": "residual_ffn.omega"},
        {**MODULES, "final": "residual_ffn.omega"},
    ),
    "as_parameter": (
        {"self_attn": "attn_omega", "final": "ffn_omega"},
        {"self_attn": "attn_omega", "encoder_attn": "encoder_attn_omega", "final": "ffn_omega"},
    ),
}


def options(**changed):
    """The command line as fairseq 0.8 keeps it, so far as it matters and more."""
    args = {
        **{"arch": "transformer_iwslt_de_en", "task": "translation", "source_lang": "de", "target_lang": "en"},
        **{"init_type": "adaptive", "criterion": "label_smoothed_cross_entropy", "optimizer": "radam", "lr": [0.001]},
        **{"encoder_layers": 3, "decoder_layers": 2, "encoder_embed_dim": 16, "decoder_embed_dim": 16},
        **{"encoder_ffn_embed_dim": 40, "decoder_ffn_embed_dim": 24, "decoder_output_dim": 16},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 2, "decoder_input_dim": 16},
        **{"encoder_normalize_before": False, "decoder_normalize_before": False, "no_cross_attention": False},
        **{"encoder_learned_pos": False, "decoder_learned_pos": False, "no_token_positional_embeddings": False},
        **{"share_all_embeddings": True, "share_decoder_input_output_embed": True, "max_source_positions": 50},
        **{"max_target_positions": 60, "left_pad_source": "True", "left_pad_target": False, "dropout": 0.3},
        **{"user_dir": "../radam_fairseq", "encoder_embed_path": None, "adaptive_softmax_cutoff": None, "fp16": True},
        **{"activation_fn": "relu", "attention_dropout": 0.0, "activation_dropout": 0.0, "min_lr": 1e-9, "seed": 1111},
        **{"ddp_backend": "c10d", "mixed_precision": False, "plot_variance": False, "max_sentences": None},
        **{"layer_wise_attention": False, "data": "../data-bin/x", "save_dir": "there", "distributed_world_size": 4},
    }
    args.update(changed)
    return args


def clinic(args, vocabulary=(23, 23), names="clinic", seed=0):
    """Random weights under the authors' key names; with today's names of projections for admin-torch."""
    random = torch.Generator().manual_seed(seed)
    weights = {}

    def add(name, *shape, mean=0.0, std=None):
        std = shape[-1] ** -0.5 if std is None else std
        weights[name] = torch.randn(*shape, generator=random) * std + mean

    for stack, size in zip(("encoder", "decoder"), vocabulary):
        d, inner = args[f"{stack}_embed_dim"], args[f"{stack}_ffn_embed_dim"]
        weights[f"{stack}.version"] = torch.tensor([3.0])
        add(f"{stack}.embed_tokens.weight", size, d)
        weights[f"{stack}.embed_tokens.weight"][PAD] = 0
        if args[f"{stack}_learned_pos"]:
            positions = args["max_source_positions" if stack == "encoder" else "max_target_positions"]
            add(f"{stack}.embed_positions.weight", positions + PAD + 1, d)
        else:
            weights[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
        if args.get("layernorm_embedding"):
            add(f"{stack}.layernorm_embedding.weight", d, mean=1.0, std=0.1)
            add(f"{stack}.layernorm_embedding.bias", d)
        for number in range(args[f"{stack}_layers"]):
            layer = f"{stack}.layers.{number}"
            for sub_layer, omega in OMEGA_NAMES[names][stack == "decoder"].items():
                add(f"{layer}.{sub_layer}_layer_norm.weight", d, mean=1.0, std=0.1)
                add(f"{layer}.{sub_layer}_layer_norm.bias", d, std=0.1)
                if args.get("init_type", "adaptive") != "default":
                    add(f"{layer}.{omega}", *([1] if names == "as_module" else [d]), mean=1.5, std=0.3)
                if sub_layer == "final":
                    continue
                source = args["encoder_embed_dim"] if sub_layer == "encoder_attn" else d
                if names != "clinic":
                    for which, width in zip("kvq", (source, source, d)):
                        add(f"{layer}.{sub_layer}.{which}_proj.weight", d, width)
                        add(f"{layer}.{sub_layer}.{which}_proj.bias", d, std=0.1)
                elif source == d:
                    add(f"{layer}.{sub_layer}.in_proj_weight", 3 * d, d)
                else:
                    for which, width in zip("kvq", (source, source, d)):
                        add(f"{layer}.{sub_layer}.{which}_proj_weight", d, width)
                if names == "clinic":
                    add(f"{layer}.{sub_layer}.in_proj_bias", 3 * d, std=0.1)
                add(f"{layer}.{sub_layer}.out_proj.weight", d, d)
                add(f"{layer}.{sub_layer}.out_proj.bias", d, std=0.1)
            for fc, shape in (("fc1", (inner, d)), ("fc2", (d, inner))):
                add(f"{layer}.{fc}.weight", *shape)
                add(f"{layer}.{fc}.bias", shape[0], std=0.1)
    if args["share_all_embeddings"]:
        weights["decoder.embed_tokens.weight"] = weights["encoder.embed_tokens.weight"]
    output = "decoder.embed_out" if names == "clinic" else "decoder.output_projection.weight"
    if not args["share_decoder_input_output_embed"]:
        add(output, vocabulary[1], args["decoder_embed_dim"])
    elif names != "clinic":
        weights[output] = weights["decoder.embed_tokens.weight"]
    return weights


def state(args, weights, as_cfg=False):
    """The rest of the file, as fairseq 0.8 writes it or, ``as_cfg``, as fairseq 1.0 does."""
    task = {"_name": "translation", "source_lang": "de", "target_lang": "en", "left_pad_source": True}
    return {
        "args": None if as_cfg else Namespace(**args),
        "cfg": {"task": task, "model": Namespace(_name=args["arch"], **args)} if as_cfg else None,
        "model": weights,
        "optimizer_history": [
            {
                **{"criterion_name": "LabelSmoothedCrossEntropyCriterion", "optimizer_name": "FP16Optimizer"},
                **{"lr_scheduler_state": {"best": None}, "num_updates": 1234},
            }
        ],
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(7)}}},
        "extra_state": {
            "train_iterator": {"epoch": 7, "iterations_in_epoch": 0},
            "val_loss": 4.0,
            "train_meters": {"train_loss": meters.AverageMeter(), "wps": meters.TimeMeter()},
        },
    }


@pytest.fixture(autouse=True, scope="module")
def old_meters():
    """fairseq 0.8 pickles its meters as ``fairseq.meters.AverageMeter``."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for meter in (meters.AverageMeter, meters.TimeMeter):
            monkeypatch.setattr(meter, "__module__", "fairseq.meters")
        yield


class Authors:
    """The authors' forward pass, from their formulas: nothing of fairseq or of this plugin is called."""

    def __init__(self, args, weights, names="clinic"):
        self.args, self.names = args, OMEGA_NAMES[names]
        self.weights = {name: weight.double() for name, weight in weights.items()}

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].t() + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def project(self, x, attention, index):
        which = "qkv"[index]
        if f"{attention}.{which}_proj.weight" in self.weights:
            return self.linear(x, f"{attention}.{which}_proj")
        bias = self.weights[f"{attention}.in_proj_bias"].reshape(3, -1)[index]
        if f"{attention}.in_proj_weight" in self.weights:
            stacked = self.weights[f"{attention}.in_proj_weight"]
            return x @ stacked.reshape(3, -1, stacked.shape[-1])[index].t() + bias
        return x @ self.weights[f"{attention}.{which}_proj_weight"].t() + bias

    def attend(self, x, memory, name, heads, hidden):
        """``hidden`` (batch, 1 or queries, keys) says which keys a query does not see."""
        q, k, v = (self.project(source, name, i) for i, source in enumerate((x, memory, memory)))
        q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(hidden.unsqueeze(1), -math.inf).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return self.linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.out_proj")

    def embed(self, tokens, stack):
        d = self.args[f"{stack}_embed_dim"]
        scale = 1.0 if self.args.get("no_scale_embedding") else math.sqrt(d)
        real = tokens.ne(PAD)
        positions = real.cumsum(1) * real + PAD
        if self.args[f"{stack}_learned_pos"]:
            added = self.weights[f"{stack}.embed_positions.weight"][positions]
        else:
            frequencies = 10000.0 ** (-torch.arange(d // 2).double() / (d // 2 - 1))
            angles = positions.unsqueeze(-1) * frequencies
            added = torch.cat([angles.sin(), angles.cos()], -1)
        x = scale * self.weights[f"{stack}.embed_tokens.weight"][tokens] + added
        return self.norm(x, f"{stack}.layernorm_embedding") if self.args.get("layernorm_embedding") else x

    def omega(self, layer, sub_layer):
        names = self.names[layer.startswith("decoder")]
        return self.weights.get(f"{layer}.{names[sub_layer]}", torch.ones(1))

    def layer(self, x, layer, hidden, memory=None, memory_hidden=None):
        heads = self.args[f"{layer.split('.')[0]}_attention_heads"]

        def add(sub_layer, f):
            return self.norm(f + x * self.omega(layer, sub_layer), f"{layer}.{sub_layer}_layer_norm")

        x = add("self_attn", self.attend(x, x, f"{layer}.self_attn", heads, hidden))
        if memory is not None:
            x = add("encoder_attn", self.attend(x, memory, f"{layer}.encoder_attn", heads, memory_hidden))
        return add("final", self.linear(self.linear(x, f"{layer}.fc1").clamp(min=0), f"{layer}.fc2"))

    def __call__(self, source, target):
        """(batch, source), (batch, target) -> (batch, target, vocabulary)"""
        source_hidden = source.eq(PAD).unsqueeze(1)
        memory = self.embed(source, "encoder")
        for number in range(self.args["encoder_layers"]):
            memory = self.layer(memory, f"encoder.layers.{number}", source_hidden)
        future = torch.ones(target.shape[1], target.shape[1]).triu(1).bool().unsqueeze(0)
        x = self.embed(target, "decoder")
        for number in range(self.args["decoder_layers"]):
            x = self.layer(x, f"decoder.layers.{number}", future, memory, source_hidden)
        tied = self.args["share_decoder_input_output_embed"]
        names = ["embed_tokens.weight"] if tied else ["embed_out", "output_projection.weight"]
        (output,) = [self.weights[f"decoder.{name}"] for name in names if f"decoder.{name}" in self.weights]
        return x @ output.t()


def dictionary(size):
    words = Dictionary()
    for number in range(size - len(words)):
        words.add_symbol(f"w{number}")
    return words


def load_model(path, vocabulary):
    """As fairseq-generate loads it."""
    task = TranslationTask(TranslationConfig(), *map(dictionary, vocabulary))
    (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], task=task)
    return model.eval()


UNEQUAL = {
    **{"share_all_embeddings": False, "share_decoder_input_output_embed": False, "decoder_layers": 5},
    **{"decoder_embed_dim": 24, "decoder_input_dim": 24, "decoder_output_dim": 24, "encoder_layers": 2},
}
LEARNED = {"encoder_learned_pos": True, "decoder_learned_pos": True, "share_all_embeddings": False}
DEEPNMT = {
    **{"arch": "adv_transformer_wmt_en_de", "task": "adv_translation", "admin_init_type": "adaptive-profiling"},
    **{"layernorm_embedding": True, "no_scale_embedding": True, "encoder_layerdrop": 0.1, "adv_opt": 0},
    **{"criterion": "adv_label_smoothed_cross_entropy", "init_type": None, "user_dir": "deepnmt"},
}
ADMIN_TORCH = {"arch": "transformer_wmt_en_de", "init_type": None, "encoder_as_parameter": True}
CASES = {
    "shared": ({}, (23, 23), "clinic", "zip"),
    "separate": (UNEQUAL, (19, 31), "clinic", "old"),
    "half precision, learned positions": (LEARNED, (23, 27), "clinic", "old half"),
    "plain Post-LN": ({"init_type": "default"}, (23, 23), "clinic", "old"),
    "deepnmt": (DEEPNMT, (23, 23), "clinic", "zip half"),
    "admin-torch, as_module": (ADMIN_TORCH, (23, 23), "as_module", "zip cfg"),
    "admin-torch, as_parameter": ({**ADMIN_TORCH, **UNEQUAL}, (19, 31), "as_parameter", "zip cfg"),
}


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_authors_do(tmp_path, case, capsys):
    changed, vocabulary, names, form = CASES[case]
    args = options(**changed)
    weights = clinic(args, vocabulary, names)
    if "half" in form:
        weights = {name: weight.half() for name, weight in weights.items()}
    written = state(args, weights, as_cfg="cfg" in form)
    torch.save(written, tmp_path / "in.pt", _use_new_zipfile_serialization="old" not in form)
    before = (tmp_path / "in.pt").read_bytes()

    main(["import", str(tmp_path / "in.pt"), str(tmp_path / "out.pt")])
    line = capsys.readouterr().out
    counts = [2 * args["encoder_layers"], 3 * args["decoder_layers"]]
    assert [int(number) for number in re.findall(r"(\d+) \w+ omegas", line)] == counts
    assert (tmp_path / "in.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.pt"]

    model = load_model(tmp_path / "out.pt", vocabulary)
    source = torch.tensor([[5, 6, 7, 8, EOS], [PAD, PAD, 9, 4, EOS], [PAD, 18, 10, 11, EOS]])
    target = torch.tensor([[EOS, 5, 6, 7], [EOS, 8, 9, PAD], [EOS, 17, 10, 16]])
    with torch.no_grad():
        ours = model(source, source.ne(PAD).sum(1), target)[0]
    expected = Authors(args, weights, names)(source, target)
    real = target.ne(PAD)
    assert expected[real].std() > 0.5  # a difference would show
    torch.testing.assert_close(ours[real].double(), expected[real], atol=1e-5, rtol=1e-5)

    assert model.omega_source == "the checkpoint"
    first = next(iter(sub_layers(model.encoder).values()))
    assert not first.omega.requires_grad
    theirs = Authors(args, weights, names).omega("encoder.layers.0", "self_attn").float()
    assert torch.equal(first.omega, theirs.expand(16))
    for name, value in checkpoint(tmp_path / "out.pt")["model"].items():
        is_made_here = name.endswith(("version", "_float_tensor")) or args["init_type"] == "default"
        assert is_made_here or value.dtype == weights["encoder.embed_tokens.weight"].dtype


@pytest.fixture(scope="module")
def imported(data, tmp_path_factory):
    """A Transformer-Clinic checkpoint for the corpus' dictionary, imported by the command: (folder, args, weights)."""
    folder = tmp_path_factory.mktemp("legacy")
    size = len(Dictionary.load(str(data / "dict.en.txt")))
    args = options()
    weights = clinic(args, (size, size))
    torch.save(state(args, weights), folder / "theirs.pt", _use_new_zipfile_serialization=False)
    result = run("admin-fairseq", "import", folder / "theirs.pt", folder / "ours.pt")
    assert result.code == 0, result.output
    assert result.lines("a checkpoint of transformer_admin with 6 encoder omegas")
    return folder, args, weights


def test_generates(imported, data):
    """fairseq-generate's score of every token it chose is the authors' model's."""
    folder, args, weights = imported
    output = generate(data, folder / "ours.pt", "--max-len-b", "9").output
    words = Dictionary.load(str(data / "dict.en.txt"))
    authors, checked = Authors(args, weights), 0
    for number, sentence in re.findall(r"^S-(\d+)\t(.+)$", output, re.M):
        (hypothesis,) = re.findall(rf"^H-{number}\t\S+\t(.+)$", output, re.M)
        (scores,) = re.findall(rf"^P-{number}\t(.+)$", output, re.M)
        source, chosen = (words.encode_line(text, add_if_not_exist=False) for text in (sentence, hypothesis))
        previous = torch.cat([torch.tensor([EOS]), chosen[:-1]]).long()
        logits = authors(source.long().unsqueeze(0), previous.unsqueeze(0))[0]
        expected = F.log_softmax(logits, -1).gather(1, chosen.long().unsqueeze(1)).squeeze(1)
        printed = torch.tensor([float(score) * math.log(2) for score in scores.split()]).double()
        torch.testing.assert_close(printed, expected, atol=2e-4, rtol=0)
        checked += 1
    assert checked == 30


def test_finetunes_and_is_restored(imported, data, tmp_path):
    folder, args, _ = imported
    shape = [f"--{name.replace('_', '-')}={args[name]}" for name in args if re.search("(layers|_dim|heads)$", name)]
    shape = [option for option in shape if "put-dim" not in option] + ["--share-all-embeddings"]
    shape += ["--max-source-positions", "50", "--max-target-positions", "60"]
    tuned = train(data, tmp_path, *shape, "--finetune-from-model", folder / "ours.pt", updates=3)
    assert tuned.code == 0, tuned.output
    assert tuned.lines("no profiling, omega from the checkpoint")
    before, after = (checkpoint(path)["model"] for path in (folder / "ours.pt", tmp_path / "checkpoint_last.pt"))
    omegas = [name for name in before if name.endswith(".omega")]
    fixed = [name for name in omegas if torch.equal(before[name], after[name])]
    assert fixed == ["encoder.layers.0.self_attn_layer_norm.omega", "decoder.layers.0.self_attn_layer_norm.omega"]
    reset = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
    restored = train(data, tmp_path / "x", *shape, "--restore-file", folder / "ours.pt", *reset, updates=1)
    assert restored.losses()[1] == tuned.losses()[1]


@pytest.mark.parametrize(
    ("changed", "messages"),
    [
        ({"encoder_normalize_before": True}, ["Pre-LN model (encoder_normalize_before)"]),
        ({"init_type": "rezero"}, ["init type is rezero"]),
        ({"init_type": "deepnet", "layer_wise_attention": True}, ["init type is deepnet", "layer_wise_attention"]),
        ({"arch": "fconv", "task": "multilingual"}, ["architecture is fconv", "task is multilingual"]),
        ({"arch": "transformer_lm_gbw"}, ["architecture is transformer_lm_gbw"]),
        ({"adaptive_softmax_cutoff": "exit(3)"}, ["option adaptive_softmax_cutoff has the value 'exit(3)'"]),
        ({"source_lang": "${oc.env:HOME}", "dropout": {}}, ["option source_lang", "option dropout"]),
        ({"encoder_layers": "many"}, ["the option encoder_layers has the value 'many'"]),
        ({"activation_fn": "step"}, ["no model can be built from its options"]),
        ({"encoder_layers": 5}, ["missing: encoder.layers.3.self_attn.k_proj.weight, ", "and 16 more"]),
        ({"decoder_layers": 1}, ["unknown: decoder.layers.1."]),
        ({"encoder_ffn_embed_dim": 41}, ["encoder.layers.2.fc1.weight (40, 16) instead of (41, 16)"]),
    ],
)
def test_says_why_it_cannot(tmp_path, changed, messages):
    weights = clinic(options())
    with pytest.raises(AdminError) as error:
        convert(state(options(**changed), weights))
    assert all(message in str(error.value) for message in messages), str(error.value)
    assert "\n" not in str(error.value)


def test_lists_all_that_does_not_fit(tmp_path):
    weights = clinic(options())
    del weights["encoder.layers.1.fc_ratio_change"], weights["decoder.layers.0.fc2.bias"]
    weights["encoder.layers.0.third_ratio_change"] = torch.ones(16)
    weights["decoder.layers.1.residual.omega"] = torch.ones(1)
    weights["decoder.layers.1.self_attn.out_proj.weight"] = torch.ones(2)
    torch.save(state(options(), weights), tmp_path / "in.pt")
    with pytest.raises(AdminError) as error:
        main(["import", str(tmp_path / "in.pt"), str(tmp_path / "out.pt")])
    line = str(error.value)
    assert line.startswith(f"cannot import {tmp_path / 'in.pt'}: missing: ")
    assert "\n" not in line
    for part in (
        "missing: encoder.layers.1.final_layer_norm.omega, decoder.layers.0.fc2.bias",
        "unknown: decoder.layers.1.residual.omega, encoder.layers.0.third_ratio_change",
        "decoder.layers.1.self_attn.out_proj.weight (2,) instead of (16, 16)",
    ):
        assert part in line
    assert os.listdir(tmp_path) == ["in.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["encoder.layers.1.fc_ratio_change"].fill_(math.nan), "holds numbers that are not finite"),
        (
            lambda w: w.update({"decoder.layers.0.fc2.bias": torch.ones(16).long()}),
            "not a dense tensor of floating-point",
        ),
        (lambda w: w.update({"decoder.layers.0.fc2.bias": torch.ones(16).to_sparse()}), "not a dense tensor"),
        (lambda w: w.update({"decoder.layers.0.fc2.bias": torch.ones(16, device="meta")}), "not a dense tensor"),
    ],
)
def test_weights_that_are_none(change, message):
    weights = clinic(options())
    change(weights)
    with pytest.raises(AdminError, match=message):
        convert(state(options(), weights))


def test_shared_embeddings_that_differ():
    shared = options(share_all_embeddings=True)
    weights = clinic(shared)
    weights["decoder.embed_tokens.weight"] = weights["encoder.embed_tokens.weight"] + 1
    with pytest.raises(AdminError, match=r"differs from encoder\.embed_tokens\.weight, which its options call one"):
        convert(state(shared, weights))


def test_names_that_are_not_text(tmp_path):
    for bad, message in (
        ({**state(options(), {**clinic(options()), 5: torch.ones(1)})}, "a weight's name is not text"),
        ({**state(options(), clinic(options())), "args": {**options(), 5: 1}}, "architecture is None"),
    ):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(AdminError, match=message):
            main(["import", str(tmp_path / "bad.pt"), str(tmp_path / "out.pt")])
    assert os.listdir(tmp_path) == ["bad.pt"]


def test_other_files(imported, build, tmp_path):
    folder, _, weights = imported
    with pytest.raises(AdminError, match="a checkpoint of this plugin already"):
        main(["import", str(folder / "ours.pt"), str(tmp_path / "out.pt")])
    with pytest.raises(AdminError, match="give another name to write to"):
        main(["import", str(folder / "theirs.pt"), str(folder / "." / "theirs.pt")])
    stock, _, cfg = build("transformer")
    with pytest.raises(AdminError, match="give it to --finetune-from-model"):
        convert({"cfg": cfg, "model": stock.state_dict()})
    with pytest.raises(AdminError, match="architecture is None"):
        convert({"model": weights})
    twice = clinic(options())
    twice["encoder.layers.0.attn_omega"] = torch.ones(16)
    with pytest.raises(AdminError, match="attn_omega is a second encoder"):
        convert(state(options(), {**twice, "encoder.version": 3}))


class Attack:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(params=["torch's safe loading", "ours, for older torch"])
def loader(request, monkeypatch):
    if request.param.startswith("ours"):
        monkeypatch.setattr(torch, "__version__", "2.5.1")
    elif torch.__version__ < "2.6":
        pytest.skip("torch before 2.6 has none that reads fairseq's checkpoints")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", ["open", "exec", "print", "system"])
def test_code_in_a_pickle_is_not_run(loader, tmp_path, capsys, zipped, call):
    proof = str(tmp_path / "proof")
    attacks = {
        "open": Attack(open, proof, "w"),
        "exec": Attack(exec, f"open({proof!r}, 'w')"),
        "print": Attack(print, "ran"),
        "system": Attack(os.system, f"touch {proof}"),
    }
    bad = state(options(), clinic(options()))
    bad["args"].arch = attacks[call]
    torch.save(bad, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        AdminError, match=rf"holds an object of (\w+\.)?{call}, .*; nothing in the file was run"
    ) as error:
        main(["import", str(tmp_path / "bad.pt"), str(tmp_path / "out.pt")])
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["bad.pt"]
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])
def test_old_checkpoints_load(loader, tmp_path, zipped):
    args = options()
    torch.save(state(args, clinic(args)), tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    read = load(str(tmp_path / "c.pt"))
    assert vars(read["args"]) == args
    assert all(torch.equal(read["model"][name], weight) for name, weight in clinic(args).items())
    assert isinstance(read["extra_state"]["train_meters"]["train_loss"], meters.AverageMeter)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00true\x85R."])
def test_other_bytes(loader, tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(
        AdminError, match=r"c\.pt (is not a fairseq checkpoint|holds an object of \w+\.system)"
    ) as error:
        load(str(tmp_path / "c.pt"))
    assert "weights_only" not in str(error.value)  # torch advises to run what the file names


def test_attributes_of_what_is_listed_are_not_found():
    """Protocol 4 can name them."""
    names = [b"argparse", b"Namespace.__init__.__globals__"]
    content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(name)]) + name for name in names) + b"\x93."
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace\.__init__\.__globals__"):
        Unpickler(io.BytesIO(content)).load()
