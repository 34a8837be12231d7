"""Decoder-only language models with Admin, on fairseq's language_modeling task."""

from __future__ import annotations

import re

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq_cli import eval_lm, generate, interactive
from helpers import NO_LOADER, checkpoint, lm_command, profile_in, run

from admin_fairseq import AdminError, AdminLanguageModel, Sample, profile, sub_layers
from admin_fairseq.cli import main
from admin_fairseq.omega import CLOSED_FORMS


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    result = run("fairseq-train", *lm_command(text, folder, "transformer_lm_admin_12", "--max-update", "3"))
    assert result.code == 0, result.output
    return folder, result


def test_profiles_by_itself(trained):
    folder, result = trained
    (line,) = result.lines("Admin: profiled")
    assert "profiled 24 decoder sub-layers on" in line
    found = profile_in(folder)
    assert found["tokens"] == {"decoder": result.words()[0]}
    assert found["encoder"] == []
    omegas = [w for name, w in checkpoint(folder / "checkpoint_last.pt")["model"].items() if name.endswith(".omega")]
    assert [omega.mean().item() for omega in omegas] == pytest.approx(found["decoder"], abs=0.01)
    assert found["decoder"] == sorted(found["decoder"])


def test_folded_says_what_it_needs(trained, tmp_path, capsys):
    main(["fold", str(trained[0] / "checkpoint_last.pt"), str(tmp_path / "out.pt")])
    assert "as a stock transformer_lm; without the plugin" in capsys.readouterr().out


def test_resumes(trained, text):
    folder, _ = trained
    resumed = run("fairseq-train", *lm_command(text, folder, "transformer_lm_admin_12", "--max-update", "4"))
    assert resumed.code == 0, resumed.output
    assert resumed.lines("omega from the checkpoint")
    assert list(resumed.losses()) == [4]


def test_evaluates(trained, text):
    folder, _ = trained
    result = run(
        *("fairseq-eval-lm", text, "--path", folder / "checkpoint_last.pt", "--cpu", "--tokens-per-sample", "32"),
        *("--required-batch-size-multiple", "1", *NO_LOADER),
    )
    assert result.code == 0, result.output
    (line,) = result.lines("Perplexity")
    assert 100 < float(line.split()[-1]) < 1000


def test_samples_and_scores_also_folded(trained, text, tmp_path):
    """By the hub, in this process."""
    path, folded = trained[0] / "checkpoint_last.pt", tmp_path / "folded.pt"
    main(["fold", str(path), str(folded)])
    sampled, scores = [], []
    for kind, file in ((AdminLanguageModel, path), (TransformerLanguageModel, folded)):
        model = kind.from_pretrained(str(file.parent), file.name, str(text)).eval()
        torch.manual_seed(1)
        sampled.append(model.sample("the old", beam=1, sampling=True, sampling_topk=5, max_len_b=10))
        scores.append(model.score("the old")["positional_scores"])
    assert sampled[0] == sampled[1]
    assert sampled[0].startswith("the old") and len(sampled[0].split()) > 2
    assert torch.allclose(*scores, atol=1e-5)


def test_generates_by_the_line(trained, text, tmp_path, capsys):
    """By fairseq's commands, in this process."""
    (tmp_path / "prompts").write_text("the old\n")
    common = [text, "--path", trained[0] / "checkpoint_last.pt", "--tokens-per-sample", 32, "--cpu", *NO_LOADER]
    generation = ["--task", "language_modeling", "--max-len-b", 10, "--beam", 2]
    lines = ["--sample-break-mode", "eos"]
    all_lines = ["--required-batch-size-multiple", 1, "--prefix-size", 2]  # newer fairseq drops the last batch
    for parser, command, arguments in (
        (options.get_interactive_generation_parser(), interactive, [*generation, "--input", tmp_path / "prompts"]),
        (options.get_generation_parser(), generate, [*generation, *lines, *all_lines]),
        (options.get_eval_lm_parser(), eval_lm, lines),
    ):
        argv = [*map(str, [*common, *arguments])]
        command.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, argv)))
    found = re.findall(r"^H-\d+\t\S+\t(.*)", capsys.readouterr().out, re.M)
    assert len(found) == 1 + 30
    assert found[0].startswith("the old ")


def test_given_profile(trained, text, tmp_path):
    folder, profiled = trained
    file = folder / "admin_profile.json"
    given = run(
        "fairseq-train",
        *lm_command(text, tmp_path, "transformer_lm_admin_12", "--max-update", "3", "--admin-profile", file),
    )
    assert given.code == 0, given.output
    assert given.losses() == profiled.losses()
    wrong = run("fairseq-train", *lm_command(text, tmp_path / "no", "transformer_lm_admin_6", "--admin-profile", file))
    assert "24 decoder sub-layers, the model 12" in wrong.lines("admin_fairseq: error:")[0]


def test_is_the_stock_model_at_omega_1(build_lm):
    """From the same seed the same weights, bit for bit, and the same output as a Post-LN transformer_lm."""
    stock, task, _ = build_lm(
        "transformer_lm", "--decoder-layers", "6", "--decoder-input-dim", "32", "--decoder-output-dim", "32"
    )
    ours, _, _ = build_lm("transformer_lm_admin", "--admin-init", "unit")
    weights = ours.state_dict()
    for name, weight in stock.state_dict().items():
        ours_has = weights.pop(name)
        if not name.endswith("._float_tensor"):  # fairseq 0.12.2's placeholder, never initialised
            assert torch.equal(ours_has, weight), name
    assert len(weights) == 12
    assert all(name.endswith(".omega") for name in weights)
    tokens = torch.randint(4, len(task.source_dictionary), (3, 9))
    assert torch.allclose(stock.eval()(tokens)[0], ours.eval()(tokens)[0], atol=1e-6)


@pytest.mark.parametrize("layers", [6, 12, 18, 24, 36, 48, 60, 72, 100])
def test_architectures(build_lm, layers):
    model, _, _ = build_lm(f"transformer_lm_admin_{layers}", "--admin-init", "logn")
    omegas = [norm.omega[0].item() for norm in sub_layers(model).values()]
    assert omegas == pytest.approx([1.0] + [CLOSED_FORMS["logn"](2, 2 * layers)] * (2 * layers - 1))


def test_padding_is_not_measured(build_lm):
    model, task, _ = build_lm("transformer_lm_admin_6", "--dropout", "0")
    tokens = torch.randint(4, len(task.source_dictionary), (3, 9))
    padded = torch.cat([tokens, tokens.new_full((3, 4), task.source_dictionary.pad())], dim=1)
    exact, with_padding = (
        profile(model, [Sample({"src_tokens": t, "src_lengths": torch.full((3,), 9)})]) for t in (tokens, padded)
    )
    assert with_padding.tokens == exact.tokens == {"decoder": 27}
    assert with_padding.decoder == pytest.approx(exact.decoder, rel=1e-5)


def test_an_encoder_decoder_is_refused(text, tmp_path):
    result = run(
        "fairseq-train", *lm_command(text, tmp_path / "save", "transformer_lm_admin", "--arch", "transformer_admin")
    )
    assert result.code != 0
    assert "--arch transformer_lm_admin" in result.lines("admin_fairseq: error:")[0]


def test_pre_ln_is_refused(build_lm):
    with pytest.raises(AdminError, match="Post-LN"):
        build_lm("transformer_lm_admin", "--decoder-normalize-before")


def test_hydra(text, trained, tmp_path):
    """No config of ours is needed: the model section names the architecture."""
    _, by_flags = trained
    (tmp_path / "lm.yaml").write_text(
        "task: {_name: language_modeling, data: '???', tokens_per_sample: 32}\n"
        "model: {_name: transformer_lm_admin_12, decoder_embed_dim: 32, decoder_ffn_embed_dim: 64,"
        " decoder_attention_heads: 2}\n"
        "criterion: cross_entropy\noptimizer: {_name: adam}\n"
        "lr_scheduler: {_name: inverse_sqrt, warmup_updates: 20}\n"
        "common: {cpu: true, seed: 3, log_format: json, log_interval: 1}\n"
        "dataset: {max_tokens: 600, required_batch_size_multiple: 1, num_workers: 0}\n"
        "optimization: {lr: [0.002], max_update: 3}\n"
        "hydra: {run: {dir: .}}\n"
    )
    result = run(
        "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "lm", f"task.data={text}", cwd=tmp_path
    )
    assert result.code == 0, result.output
    assert result.losses() == by_flags.losses()
