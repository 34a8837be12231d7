"""admin-fairseq analyze: statistics against closed forms."""

from __future__ import annotations

import math
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from admin_fairseq import AdminError
from admin_fairseq.analysis import amplification, dependency, report
from admin_fairseq.analysis.amplification import Case, by_noise, by_update, change, fits
from admin_fairseq.analysis.dependency import _normalised, dependency_map, residual_dependency
from admin_fairseq.analysis.figures import Page, write
from admin_fairseq.analysis.probe import SubLayer, observe
from admin_fairseq.analysis.subject import method_name
from admin_fairseq.analysis.verdict import signs_of, verdict
from admin_fairseq.profiling import Sample
from admin_fairseq.rules import stacks
from benchmarks import starts

pytest.importorskip("matplotlib")


def walsh(dim: int) -> torch.Tensor:
    """Rows that are orthogonal, of variance 1 and, but for the first, of mean 0."""
    rows = torch.ones(1, 1)
    while len(rows) < dim:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


def linear_network(variances, norm, scale=1.0):
    """Sub-layers of a residual network whose input and branches are orthogonal, with these variances (dim 64)."""
    rows, x, seen = walsh(64)[1:], None, []
    x = (rows[0] * math.sqrt(variances[0])).expand(3, -1)
    for i, variance in enumerate(variances[1:], start=1):
        branch = (rows[i] * math.sqrt(variance)).expand(3, -1)
        seen.append(SubLayer("encoder", i, "ffn", norm, False, lambda part: part * scale, x, branch))
        x = norm(x * scale + branch)
    return seen


def test_without_layer_norm_each_branch_counts_by_its_variance():
    found = dependency_map(linear_network([1.0, 2.0, 3.0, 4.0], nn.Identity()), None)
    assert found["beta2"][-1] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert found["beta2"][0] == pytest.approx([1 / 3, 2 / 3])
    assert found["correlation"] == pytest.approx([1, 1, 1])


def test_the_map_keeps_no_graph():
    norm = nn.LayerNorm(64)
    parts = []
    seen = linear_network([1.0, 2.0], norm)
    seen[0].scale = lambda part: parts.append(part * norm.weight) or parts[-1]
    dependency_map(seen, None)
    assert parts and not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_behind_layer_norm_the_map_is_the_papers_recursion(scale):
    """beta_ij^2 = (1 - share_i) beta_{i-1,j}^2 and beta_ii^2 = share_i, for uncorrelated branches."""
    norm = nn.LayerNorm(64, eps=0)
    seen = linear_network([1.0, 0.5, 0.25, 2.0], norm, scale)
    expected = [1.0]
    for sub_layer, row in zip(seen, dependency_map(seen, None)["beta2"]):
        shortcut, branch, total = sub_layer.variances()
        assert total == pytest.approx(shortcut + branch)
        expected = [(1 - branch / total) * value for value in expected] + [branch / total]
        assert row == pytest.approx(expected)
    assert branch / total == pytest.approx(2 / (2 + scale**2))


def test_pre_ln_reads_the_normalised_stream_with_the_next_gain():
    seen = linear_network([1.0, 2.0], nn.Identity())
    seen[0].pre_ln, final = True, nn.LayerNorm(64, eps=0)
    with torch.no_grad():
        final.weight[:32] = 0  # the two rows keep their proportion on any half
        final.bias.fill_(7.0)
    found = dependency_map(seen, final)
    assert found["beta2"][0] == pytest.approx([1 / 3, 2 / 3])
    assert found["bias"] == pytest.approx([0])  # a constant has no variance


def test_layer_norm_acts_on_each_part_and_the_parts_add_up():
    norm = nn.LayerNorm(16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    parts, bias = torch.randn(4, 5, 16), torch.randn(5, 16)
    out, out_bias = _normalised(norm, parts, bias)
    torch.testing.assert_close(out.sum(0) + out_bias, norm(parts.sum(0) + bias).detach())


def first_batch(batch, same_length=False):
    return Sample(batch(8, same_length=same_length)["net_input"])


RULES = ["preln", "admin_sqrt", "deepnorm", "rezero", "periln", "keel"]  # the others are built as one of these


@pytest.mark.parametrize("method", RULES)
def test_the_probe_sees_the_sum_of_every_sub_layer(build, batch, method):
    model, _, _ = build(f"transformer_{method}")
    for name, weight in model.named_parameters():
        if name.endswith(("rezero_weight", "layer_norm_out.bias")):
            nn.init.constant_(weight, 0.7)
    seen = []
    observe(model.train(), first_batch(batch, same_length=True), seen.append)
    assert model.training
    assert [s.name for s in seen] == ["self_attn", "ffn"] * 3 + ["self_attn", "encoder_attn", "ffn"] * 2
    for one, two in zip(seen, seen[1:]):
        if one.stack == two.stack:
            out = one.scale(one.x) + one.branch
            if not one.pre_ln and not isinstance(one.norm, nn.Identity):
                out = nn.LayerNorm.forward(one.norm, out)
            if one.norm_out is not None:
                out = one.norm_out(out)
            torch.testing.assert_close(two.x, out.detach(), rtol=1e-4, atol=1e-5)
    for layer in model.encoder.layers:
        assert "residual_connection" not in vars(layer)
        assert "add" not in vars(layer.final_layer_norm)


def test_positions_are_spread_over_the_whole_batch(build, batch, monkeypatch):
    kept = []
    monkeypatch.setattr(dependency, "dependency_map", lambda seen, norm: kept.append(seen[0].x) or {})
    model, sample = build("transformer_preln")[0], first_batch(batch, same_length=True)
    for positions in (10**6, 7):
        residual_dependency(model, sample, positions)
    everything, few = kept[0], kept[2]
    assert len(few) == 7 and torch.equal(few[0], everything[0]) and torch.equal(few[-1], everything[-1])


def test_rows_sum_to_one_and_admin_at_omega_one_is_post_ln(build, batch):
    sample = first_batch(batch)
    post_ln = residual_dependency(build("transformer_postln")[0], sample, 16)
    admin = residual_dependency(build("transformer_admin", "--admin-init", "unit")[0], sample, 16)
    for name, stack in post_ln.items():
        assert admin[name]["share"] == pytest.approx(stack["share"])
        for own, row, bias in zip(admin[name]["beta2"], stack["beta2"], stack["bias"]):
            assert own == pytest.approx(row)
            assert sum(row) + bias == pytest.approx(1)


def test_mixed_places_of_norms(build, batch):
    """Mix-LN's last Post-LN sub-layer is read behind the LayerNorm of the first Pre-LN one."""
    model = build("transformer_mixln", "--encoder-layers", "4")[0]
    seen = []
    observe(model, first_batch(batch), lambda sub_layer: seen.append(sub_layer))
    seen = [sub_layer for sub_layer in seen if sub_layer.stack == "encoder"]
    assert [sub_layer.pre_ln for sub_layer in seen] == [False] * 2 + [True] * 6
    before = dependency_map(seen, model.encoder.layer_norm)["beta2"]
    with torch.no_grad():
        seen[2].norm.weight[:16] = 0
    after = dependency_map(seen, model.encoder.layer_norm)["beta2"]
    changed = [one != pytest.approx(two) for one, two in zip(before, after)]
    assert changed == [False, True] + [False] * 6


def test_admin_leans_on_its_branches_less(build, batch):
    sample = first_batch(batch)
    shares = [
        residual_dependency(build(arch)[0], sample, 16)["encoder"]["share"][-1]
        for arch in ("transformer_admin_sqrt", "transformer_postln")
    ]
    assert shares[0] < shares[1] / 3


def test_padding_does_not_enter(build, batch):
    model, _, _ = build("transformer_preln")
    net_input = first_batch(batch).net_input
    padded = dict(net_input)
    for name, side in (("src_tokens", (3, 0)), ("prev_output_tokens", (0, 3))):
        padded[name] = nn.functional.pad(net_input[name], side, value=model.encoder.padding_idx)
    one, two = (residual_dependency(model, Sample(inputs), 10**6) for inputs in (net_input, padded))
    for stack in one:
        assert two[stack]["share"] == pytest.approx(one[stack]["share"], rel=1e-4)


def test_methods_with_paths_across_sub_layers_are_refused(build, batch):
    for method in ("b2t", "residual", "siamese"):
        with pytest.raises(AdminError, match="paths across sub-layers"):
            residual_dependency(build(f"transformer_{method}")[0], first_batch(batch), 16)


class Shift(nn.Module):
    """x + w: a linear residual layer, whose output changes by what w changes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(3 * torch.randn(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


class Shifts(nn.Module):
    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Shift(dim) for _ in range(layers))
        self.encoder.layer_norm, self.encoder.padding_idx = None, 1

    def forward(self, src_tokens: torch.Tensor, features_only: bool = True) -> torch.Tensor:
        x = torch.zeros(*src_tokens.t().shape, self.dim)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


def linear_case():
    torch.manual_seed(1)
    model = Shifts(layers=20, dim=20_000)
    batch = {"net_input": {"src_tokens": torch.tensor([[5, 6, 1]])}}
    return Case("linear", "encoder", model, lambda model, batch: [model(**batch["net_input"]).sum()], batch)


def test_noise_on_a_linear_stack_adds_up():
    """N layers that each add a vector of variance 9: noise of share s moves their sum by N 9 s^2 a dimension.

    Only the stack's own weights move: the other stack here comes after it.
    """
    case = linear_case()
    case.model.decoder = nn.Module()
    case.model.decoder.layers = nn.ModuleList([Shift(20_000)])
    case.model.decoder.layers[0].register_forward_pre_hook(lambda module, _: seen.append(module.shift.clone()))
    case.model.register_forward_hook(lambda model, _, out: model.decoder.layers[0](out))
    seen = []
    before = [weight.clone() for weight in case.model.parameters()]
    found = by_noise(case, 0.1, seed=3)
    assert len(seen) == 2 and torch.equal(*seen)
    expected = [n * 9 * 0.1**2 * 20_000 for n in range(1, 21)]
    assert found == pytest.approx(expected, rel=0.08)
    assert fits(range(1, 21), found)["r2_linear"] > 0.995
    for weight, old in zip(case.model.parameters(), before):
        assert torch.equal(weight, old)


def test_adams_first_update_moves_every_weight_by_the_learning_rate():
    case = linear_case()
    found = [by_update(case, layers, 0.01) for layers in (1, 10)]
    assert found == pytest.approx([0.01**2 * 20_000, (10 * 0.01) ** 2 * 20_000], rel=1e-3)
    assert len(case.model.encoder.layers) == 20


def test_the_share_counts_the_correlation_of_branch_and_shortcut():
    """Var[f] / Var[x + f] of f = c x is c^2 / (1 + c)^2."""
    x = torch.randn(7, 32)
    shortcut, branch, total = SubLayer(
        "encoder", 0, "ffn", nn.Identity(), False, lambda part: part, x, x / 2
    ).variances()
    assert (branch / total, branch / shortcut) == pytest.approx((0.25 / 2.25, 0.25))


def test_a_random_stack_of_admin_is_profiled(monkeypatch):
    args = Namespace(rest=["--cpu", "--encoder-embed-dim", "16"], sub_layers=12)
    model = amplification.random_case("transformer_admin", "encoder", 1, args).model
    omegas = [layer.final_layer_norm.omega.mean().item() for layer in model.encoder.layers]
    assert model.omega_source == "profiling" and omegas == sorted(omegas) and omegas[-1] > 1.3


def test_too_little_to_fit():
    for points in ([1.0, 2.0], [0.0, 0.0, 0.0]):
        assert fits(range(1, len(points) + 1), points)["r2_linear"] is None


def test_fits():
    n = [2, 4, 8, 16, 32, 64, 128, 200]
    assert fits(n, [3 + 2 * x for x in n])["fits"]["linear"] == pytest.approx([3, 2])
    assert fits(n, [1 + 2 * math.log(x) for x in n])["fits"]["log"] == pytest.approx([1, 2])
    found = fits(n, [2 * math.log(1 + 0.3 * x) for x in n])
    assert found["r2_log1p"] == pytest.approx(1, abs=1e-5)
    assert found["fits"]["log1p"] == pytest.approx([2, 0.3], rel=0.03)
    assert 0.9 < found["r2_log"] < 1 and found["r2_linear"] < 0.9


@pytest.mark.parametrize("method", ["preln", "admin_fixed"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_first_layers_of_a_deep_stack_are_a_shallow_one(method, stack):
    """One deep stack serves all N: a stack built on its own, with the same weights, has the same output."""
    rest = ["--cpu", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16", "--init-weights", "authors"]

    def case(layers):
        args = Namespace(rest=rest, sub_layers=layers * amplification.PER_LAYER[stack])
        return amplification.random_case(f"transformer_{method}", stack, 4, args)

    deep, shallow = case(5), case(2)
    state = deep.model.state_dict()
    omegas = {key: value for key, value in shallow.model.state_dict().items() if key.endswith("omega")}
    shallow.model.load_state_dict({key: state[key] for key in shallow.model.state_dict()})
    torch.testing.assert_close(deep.outputs()[1], shallow.outputs()[-1])
    with torch.no_grad():
        out = shallow.model.encoder(**{k: v for k, v in shallow.batch["net_input"].items() if k.startswith("src")})
    if stack == "encoder":
        torch.testing.assert_close(shallow.outputs()[-1], out["encoder_out"][0].flatten(0, 1))
    assert set(omegas) <= set(state)


def test_the_report_binds_what_this_run_wrote(monkeypatch, tmp_path, capsys):
    """An analysis that refuses has its reason on the page, not an earlier run's results."""
    for name in (*report.ORDER, "spread"):
        write(str(tmp_path), name, {}, [], Page(name, ["of an earlier run"]))

    def analysis(name, refused):
        def run(args):
            if name in refused:
                raise AdminError(f"no {name} < here")
            write(args.out, name, {}, [], Page(name, ["of this run"]))

        return run

    for name in report.ORDER:
        monkeypatch.setattr(f"admin_fairseq.analysis.{name}.main", analysis(name, ("amplification", "omega")))
    report.main(Namespace(out=str(tmp_path), rest=["data"], path=[], arch=[]))
    page = (tmp_path / "report.html").read_text()
    assert page.count("of this run") == 2 and page.count("of an earlier run") == 1  # the spread is another command's
    assert "Not measured: no omega &lt; here" in page
    assert "amplification: no amplification < here" in capsys.readouterr().err
    with pytest.raises(AdminError, match="give DATA"):
        report.main(Namespace(out=str(tmp_path), rest=["--cpu"]))
    for name in report.ORDER:
        monkeypatch.setattr(f"admin_fairseq.analysis.{name}.main", analysis(name, report.ORDER))
    with pytest.raises(AdminError, match="no dependency < here"):
        report.main(Namespace(out=str(tmp_path), rest=["data"], path=[], arch=[]))
    monkeypatch.setattr("admin_fairseq.analysis.dependency.main", analysis("dependency", ()))
    monkeypatch.setattr("admin_fairseq.analysis.gradients.main", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what the others measured is bound before
        report.main(Namespace(out=str(tmp_path), rest=["data"], path=[], arch=[]))
    page = (tmp_path / "report.html").read_text()
    assert page.count("of this run") == 1 and "it failed, ZeroDivisionError" in page


def model(method, **shares):
    return {"method": method, "when": "at initialisation", "stacks": {s: {"share": v} for s, v in shares.items()}}


def test_the_verdict_is_computed_by_its_thresholds():
    """From what the analyses measured; Post-LN leans on its branches and its gradients vanish."""
    deep = {"encoder": [0.17] * 36, "decoder": [0.25] * 54}
    steady = {"encoder": [0.05] * 36, "decoder": [0.05] * 54}
    data = {"dependency": {"models": [model("postln 18-18", **deep), model("admin 18-18", **steady)]}}
    shown, advice, thresholds = verdict(data)
    assert "postln 18-18 shows signs" in shown and "6.1 in the encoder and 13.5 in the decoder" in shown
    assert "admin 18-18 shows no such sign" in shown
    assert "train admin 18-18 instead of postln 18-18, or take fewer layers" in advice and "logn" not in advice
    assert "more than 5:" in thresholds and "below 0.05 of" in thresholds

    def gradients(method, least, update=1):
        outputs = {"decoder": {"gradient": [1.0, least]}}
        return {"method": method, "when": "at initialisation", "update": update, "outputs": outputs}

    # only the first update counts, and the stacks need not be in both
    records = [gradients("preln 18-18", 0.26), gradients("preln 18-18", 0.001, 30), gradients("postln 18-18", 0.026)]
    assert signs_of({"gradients": {"records": records}}) == {
        "preln 18-18": [],
        "postln 18-18": ["its gradients fall to 0.026 in the decoder"],
    }
    both = verdict({**data, "gradients": {"records": records}})
    assert "decoder, and its gradients fall to 0.026" in both[0] and "train admin 18-18 or preln 18-18" in both[1]
    bad = verdict({"dependency": {"models": data["dependency"]["models"][:1]}})
    assert "take fewer layers, or at this depth a method that starts steadily" in bad[1]
    trained = {**model("admin 18-18", encoder=[0.2] * 36), "when": "after training"}
    good = verdict({"dependency": {"models": [data["dependency"]["models"][1], trained]}})
    assert (
        "Training took the sum of admin 18-18's shares from 1.8 (encoder) and 2.7 (decoder) to 7.2 (encoder)" in good[0]
    )
    assert "nothing seen here speaks against training it." in good[1]
    assert verdict({}) == verdict({"omega": {"records": []}}) == []

    def start(label, low, count=36):
        omega = {"encoder": {"mean": [1.0, *([low] * (count - 1))]}}
        return {"label": label, "update": 0, **omega}

    omega = {"records": [start("admin 18-18", 1.5), start("admin_logn 18-18", 3.0), start("admin 6-6", 1.5, 12)]}
    advice = verdict({**data, "omega": omega})[1]
    assert (
        "start admin 18-18, whose first quarter of omega has a mean of 1.5 in the encoder, with a larger --admin-margin"
        in advice
    )
    assert "admin_logn" not in advice and "admin 6-6" not in advice


def test_the_report_says_how_it_was_measured(tmp_path, monkeypatch, data):
    """And marks the paper's figures as of another size unless the models are of theirs."""
    monkeypatch.setattr("sys.argv", ["admin-fairseq", "analyze", "report", "DATA", "--lr", "<&>"])
    small = ["--encoder-embed-dim", "32", "--encoder-attention-heads", "2", "--decoder-attention-heads", "2"]
    args = Namespace(
        path=[], arch=["transformer_admin"], rest=[str(data), *small, "--encoder-layers", "3", "--seed", "7"]
    )
    facts = report.run_facts(args)
    assert facts["Models"] == "admin: 3-6 layers, width 32, feed-forward 2048, heads 2" and facts["Seed"] == "7"
    assert re.match(rf"{data}: [\d,]+ training sentences, [\d,]+ words in dict.de.txt, ", facts["Data"])
    assert re.fullmatch(r"\d\d \w+ \d{4}, \d\d:\d\d UTC", facts["Date"]) and "torch" in facts["Versions"]
    table = ("Read off the published figures", [["what", "value"], ["a", "1"]])
    write(str(tmp_path), "dependency", {"models": []}, [], Page("x", tables=[table]))
    page = Path(report.bind(str(tmp_path), None, facts)).read_text()
    assert "published figures (of models of another size, 6-6 and 18-18 layers of width 512" in page
    assert "<span>&#x27;&lt;&amp;&gt;&#x27;</span>" in page and "width=device-width" in page
    for arch, same in (
        ("transformer_admin", True),
        ("transformer_admin_18_18", True),
        ("transformer_admin_12_12", False),
    ):
        facts = report.run_facts(Namespace(path=[], arch=[arch], rest=[str(data)]))
        assert ("of models of this size" in facts["Published figures"]) == same
    shown = report.run_facts(
        Namespace(path=[], arch=["transformer_lm_admin_12"], rest=["x", "--task", "language_modeling"])
    )
    assert shown["Models"].startswith("lm_admin 12: 12 layers, width 512") and shown["Data"] == "x"


def test_method_names():
    names = {"transformer_admin_18_18": "admin 18-18", "transformer_lm_admin_6": "lm_admin 6"}
    names.update({"transformer_postln": "postln", "transformer": "transformer", "transformer_admin_72": "admin 72"})
    names["transformer_admin_wmt_en_de"] = "admin_wmt_en_de"
    assert {arch: method_name(arch) for arch in names} == names


def test_stacks():
    assert list(stacks(SimpleNamespace(decoder=1))) == ["decoder"]
    assert change([torch.ones(2, 3)], [torch.zeros(2, 3)]) == [3]


def test_shares_of_the_input_and_of_attention():
    """Of the map's rows: column 0, and the columns of attention sub-layers."""
    stack = {"sub_layers": ["0 self_attn", "0 encoder_attn", "0 ffn"]}
    stack["beta2"] = [[0.9, 0.1], [0.6, 0.1, 0.3], [0.2, 0.1, 0.3, 0.4]]
    of_input, of_attention = starts.shares(stack)
    assert of_input == [0.9, 0.6, 0.2] and of_attention == pytest.approx([0.1, 0.4, 0.4])
    models = [{"method": f"{name} 18-18", "stacks": {"encoder": stack}} for name in ("postln", "keel")]
    figure = starts.draw(models)
    assert [line.get_label() for line in figure.axes[0].lines] == ["postln", "keel"]
