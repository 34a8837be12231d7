"""FastAttention against fairseq's own attention, and attention weights for those who ask."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fairseq.data.data_utils import collate_tokens
from fairseq.modules import MultiheadAttention
from fairseq.sequence_scorer import SequenceScorer
from helpers import needs_stock_translation, prepared, translate

from admin_fairseq.fast import attention
from admin_fairseq.fast.attention import AlignsOnDemand, FastAttention
from admin_fairseq.fast.measured import MEASURED

pytestmark = pytest.mark.skipif(
    not hasattr(F, "scaled_dot_product_attention"), reason="torch before 2.0 has no fused attention"
)
PAD = 1


@pytest.fixture
def calls(monkeypatch):
    """How the fused kernel is called: (has a mask, is causal, dropout)."""
    seen = []

    def spy(q, k, v, attn_mask, dropout_p, is_causal):
        seen.append((attn_mask is not None, is_causal, dropout_p))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)

    monkeypatch.setattr(attention, "F", SimpleNamespace(scaled_dot_product_attention=spy, linear=F.linear))
    return seen


@pytest.fixture
def pair(build):
    """pair(fast, *options): one model by fairseq's own attention, and by ours."""

    def pair(fast="measured", *options, arch="transformer_admin", dtype=torch.float32):
        settings = ("--admin-init", "logn", "--dropout", "0", *options)
        (stock, _, _), (ours, task, _) = (build(arch, *settings, "--admin-fast", mode) for mode in ("off", fast))
        return stock.to(dtype), ours.to(dtype), task

    return pair


def outputs(model, net_input, keep):
    """The logits at tokens, and the gradients of a function of them."""
    model.zero_grad()
    logits = model(**net_input)[0][keep]
    torch.manual_seed(0)
    (logits * torch.randn(logits.shape).to(logits)).sum().backward()
    return {"logits": logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(stock, ours, net_input, tolerance):
    keep = net_input["prev_output_tokens"].ne(PAD) | torch.tensor(not ours.training)
    expected, actual = outputs(stock, net_input, keep), outputs(ours, net_input, keep)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        # relative to the largest entry: sums over many terms have no fixed relative error each
        assert (actual[name] - value).abs().max() <= tolerance * max(1, value.abs().max()), name


@pytest.mark.parametrize(
    ("fast", "dtype", "tolerance"),
    [("measured", torch.float64, 1e-10), ("all", torch.float64, 1e-10), ("measured", torch.float32, 1e-5)],
)
def test_values_and_gradients(pair, batch, exact_softmax, calls, fast, dtype, tolerance):
    """At every token and for every parameter, in training and evaluation, with and without padding."""
    stock, ours, _ = pair(fast, dtype=dtype)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for padded in (True, False):
        net_input = batch(same_length=not padded)["net_input"]
        assert net_input["src_tokens"].eq(PAD).any() == net_input["prev_output_tokens"].eq(PAD).any() == padded
        for mode in ("train", "eval"):
            getattr(stock, mode)(), getattr(ours, mode)()
            calls.clear()
            assert_same(stock, ours, net_input, tolerance)
            encoder, decoder, cross = (padded, False, 0.0), (False, True, 0.0), (padded, False, 0.0)
            # in evaluation fairseq asks every layer for weights until prepare_for_inference_
            in_decoder = [decoder, cross] if mode == "train" else [] if padded else [decoder]
            assert calls == [encoder] * 3 + in_decoder * 2


def test_a_pad_before_a_token_is_masked(pair, batch, exact_softmax, calls):
    """--left-pad-target, or a pad between tokens: the causal mask does not hide those."""
    stock, ours, _ = pair(dtype=torch.float64)
    net_input = batch()["net_input"]
    assert attention.is_right_padded(net_input["prev_output_tokens"].eq(PAD))
    net_input["prev_output_tokens"][::2, 2] = PAD
    assert_same(stock, ours, net_input, 1e-10)
    assert not any(is_causal for _, is_causal, _ in calls)
    left = collate_tokens([torch.tensor([2, 5]), torch.tensor([2, 5, 6])], PAD, left_pad=True)
    assert not attention.is_right_padded(left.eq(PAD))


def test_changed_padding_is_seen():
    of_mask = attention.MaskProperty(attention.has_padding)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert not of_mask(mask)
    mask[1, 2] = True
    assert of_mask(mask)
    with torch.inference_mode():
        assert not of_mask(torch.zeros(2, 3, dtype=torch.bool))


def test_padding_is_asked_for_once_a_batch(pair, batch, monkeypatch):
    """Each answer waits for the device; also where backward computes again, from detached masks."""
    asked = []
    for options in ((), ("--checkpoint-activations",)):
        _, ours, _ = pair("measured", *options)
        asked.clear()
        attentions = [module for module in ours.modules() if isinstance(module, FastAttention)]
        for of_mask in {id(module.of_padding): module.of_padding for module in attentions}.values():
            question = of_mask.question
            of_mask.question = lambda mask, question=question: asked.append(question.__name__) or question(mask)
        ours.train()(**batch()["net_input"])[0].sum().backward()
        assert sorted(asked) == ["has_padding", "is_right_padded"]


def test_offloaded_activations_on_a_gpu_are_fairseqs(build):
    on_cpu, on_gpu = (SimpleNamespace(device=torch.device(kind), is_cuda=kind == "cuda") for kind in ("cpu", "cuda"))
    for options, expected in (((), True), (("--offload-activations",), False)):
        model, _, _ = build("transformer_admin", "--admin-fast", "all", *options)
        attentions = [module for module in model.modules() if isinstance(module, FastAttention)]
        assert attentions and all(module._is_served(on_cpu) for module in attentions)
        assert all(module._is_served(on_gpu) == expected for module in attentions)


def attend(module, query, key=None, **kwargs):
    key = query if key is None else key
    return module(query, key, key, **{"need_weights": False, **kwargs})


def fast(mode="all", **options):
    torch.manual_seed(1)
    module = MultiheadAttention(8, 2, **options)
    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList([copy.deepcopy(module)])
    decoder.layers[0].need_attn = True
    decoder._future_mask = torch.triu(torch.full((9, 9), float("-inf")), 1)
    attention.speed_up({"decoder": decoder}, mode)
    return module, decoder.layers[0], decoder


X, Y = torch.randn(5, 3, 8), torch.randn(4, 3, 8)
PADS = torch.zeros(3, 5, dtype=torch.bool)
PADS[1, 3:] = True
BANDS = torch.full((5, 5), float("-inf")).triu(2)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"self_attention": True}, {"need_weights": True}),
        ({"self_attention": True}, {"need_head_weights": True, "static_kv": False}),
        ({"encoder_decoder_attention": True}, {"need_head_weights": True, "static_kv": True}),
        ({"encoder_decoder_attention": True}, {"need_weights": True, "static_kv": True}),
        ({"encoder_decoder_attention": True}, {"before_softmax": True, "static_kv": True}),
        ({"self_attention": True}, {"attn_mask": BANDS}),
        ({"self_attention": True}, {"attn_mask": BANDS, "key_padding_mask": PADS}),
        ({"self_attention": True, "add_bias_kv": True}, {}),
        ({"self_attention": True, "add_zero_attn": True}, {}),
        ({"self_attention": True, "dropout": 0.3, "mode": "measured"}, {}),
        ({"encoder_decoder_attention": True, "dropout": 0.3, "mode": "measured"}, {"static_kv": True}),
        ({"self_attention": True, "dropout": 1.0}, {}),
        ({"self_attention": True, "q_noise": 0.5, "qn_block_size": 1}, {}),
        ({"encoder_decoder_attention": True, "q_noise": 0.5, "qn_block_size": 1}, {"static_kv": True}),
    ],
)
def test_the_rest_is_fairseqs(calls, options, arguments):
    """Bit for bit, random numbers included."""
    stock, ours, _ = fast(**options)
    results = []
    for module in (stock, ours):
        torch.manual_seed(2)
        results.append(attend(module.train(), X, **arguments))
    for expected, actual in zip(*results):
        assert (expected is None and actual is None) or torch.equal(expected, actual)
    assert not calls


def test_pruned_heads(calls):
    stock, ours, _ = fast(self_attention=True)
    for module in (stock, ours):
        module._adaptive_prune_heads(module._get_reserve_head_index(1))
        module._set_skip_embed_dim_check()
    assert torch.equal(attend(ours, X)[0], attend(stock, X)[0])
    assert not calls


def test_hooks_of_projections_run():
    _, ours, _ = fast(self_attention=True)
    seen = []
    ours.v_proj.register_forward_pre_hook(lambda *_: seen.append(1))
    attend(ours, X, static_kv=True, incremental_state={})
    attend(ours, X)  # by F.multi_head_attention_forward, which knows the weights only
    assert len(seen) == 1


@pytest.mark.parametrize("padded", [True, False])
def test_keys_of_another_width(calls, padded):
    stock, ours, _ = fast(encoder_decoder_attention=True, kdim=6, vdim=6)
    key = torch.randn(5, 3, 6)
    mask = PADS if padded else torch.zeros_like(PADS)
    expected, actual = (attend(m, Y, key, static_kv=True, key_padding_mask=mask)[0] for m in (stock, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert calls == [(padded, False, 0.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"self_attention": True}, {"encoder_decoder_attention": True}])
def test_half_precision(calls, dtype, options):
    stock, ours, _ = fast(**options)
    static = {"static_kv": "self_attention" not in options}
    expected = attend(stock, X, key_padding_mask=PADS, **static)[0]
    actual = attend(ours.to(dtype), X.to(dtype), key_padding_mask=PADS, **static)[0]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.02)
    assert len(calls) == 1


def test_the_decoders_own_causal_mask_is_recognised(calls):
    stock, ours, decoder = fast(self_attention=True)
    mask = decoder._future_mask[:5, :5]
    torch.testing.assert_close(attend(ours, X, attn_mask=mask)[0], attend(stock, X, attn_mask=mask)[0])
    assert calls == [(False, True, 0.0)]


def test_checkpointed_activations(pair, batch, exact_softmax):
    stock, _, _ = pair(dtype=torch.float64)
    for option in ("--checkpoint-activations", "--offload-activations"):
        _, ours, _ = pair("measured", option, dtype=torch.float64)
        assert_same(stock.train(), ours.train(), batch()["net_input"], 1e-10)


def test_decoder_alone(pair, batch, exact_softmax, calls):
    """As language models have it."""
    stock, ours, _ = pair("measured", "--no-cross-attention", dtype=torch.float64)
    assert_same(stock.train(), ours.train(), batch()["net_input"], 1e-10)
    assert calls == [(True, False, 0.0)] * 3 + [(False, True, 0.0)] * 2


def test_off_is_fairseqs_own(build):
    off, _, _ = build("transformer_admin", "--admin-fast", "off")
    assert not any(isinstance(module, (FastAttention, AlignsOnDemand)) for module in off.modules())


def test_measured_does_nothing_on_devices_not_measured(build, batch, monkeypatch, calls):
    monkeypatch.setitem(MEASURED, "attention", frozenset({"some GPU"}))
    model, _, _ = build("transformer_admin")
    model(**batch()["net_input"])
    assert not calls


@pytest.mark.parametrize(("options", "reason"), [(["--quant-noise-pq", "0.2"], "quantised or hooked projections")])
def test_one_line_says_what_falls_back(build, caplog, options, reason):
    caplog.set_level(logging.INFO)
    model, _, _ = build("transformer_admin", *options)
    lines = [line for line in caplog.messages if "fairseq's own attention" in line]
    assert len(lines) == 1
    assert reason in lines[0]
    assert not any(isinstance(module, FastAttention) for module in model.modules())


def test_torch_without_fused_attention(build, batch, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(attention, "F", object())
    model, _, _ = build("transformer_admin")
    assert len([line for line in caplog.messages if "fairseq's own attention" in line]) == 1
    model(**batch()["net_input"])


def test_a_copied_model_is_its_own(build, batch):
    """As --store-ema makes it."""
    model, _, _ = build("transformer_admin", "--admin-init", "unit")
    net_input = batch()["net_input"]
    expected = model.eval()(**net_input)[0]
    other = copy.deepcopy(model)
    assert torch.equal(other(**net_input)[0], expected)
    assert other.decoder.layers[0].self_attn.decoder[0] is other.decoder


# attention weights: who asks gets them


def weights(model, net_input, **kwargs):
    attention = model(**net_input, **kwargs)[1]["attn"]
    return attention and attention[0]


def test_attention_weights_are_computed_on_demand(pair, batch):
    stock, ours, _ = pair()
    net_input = batch()["net_input"]
    keep = net_input["prev_output_tokens"].ne(PAD)

    def assert_same_weights(**asked):
        torch.testing.assert_close(weights(ours, net_input, **asked)[keep], weights(stock, net_input, **asked)[keep])

    for mode in ("train", "eval", "prepare"):
        for model in (stock, ours):
            prepared(model) if mode == "prepare" else getattr(model, mode)()
        for asked in ({"alignment_layer": 0}, {"alignment_heads": 1}):
            assert_same_weights(**asked)
        if mode == "eval":
            assert_same_weights()
        else:
            assert weights(ours, net_input) is None


def test_alignment_criterion_gets_its_weights(build, batch):
    model, _, _ = build("transformer_admin", "--load-alignments")
    assert weights(model.train(), batch()["net_input"]) is not None


@needs_stock_translation
def test_translations_are_stocks(build, batch):
    """Tokens, scores, attention and alignments; also if the model was prepared for none, as torch.hub's is."""
    sample = batch(5)
    for prepared_for, print_alignment in ((None, None), ("hard", "hard"), (None, "hard"), (None, "soft")):
        found = []
        for arch in (["transformer"], ["transformer_admin", "--init-weights", "fairseq"]):
            model, task, _ = build(*arch)
            found.append(translate([prepared(model, prepared_for)], task, sample, print_alignment=print_alignment))
        assert len(found[0]) == len(found[1]) == 3 * 5
        for stock, ours in zip(*found):
            assert torch.equal(stock["tokens"], ours["tokens"])
            torch.testing.assert_close(stock["positional_scores"], ours["positional_scores"])
            if print_alignment is None:
                assert stock["attention"].numel() > ours["attention"].numel() == 0
            else:
                torch.testing.assert_close(stock["attention"], ours["attention"])
            assert len(ours["alignment"]) == (0 if print_alignment is None else len(stock["alignment"]))
            if print_alignment == "hard":
                assert stock["alignment"] == ours["alignment"]
            elif print_alignment == "soft":
                for theirs, own in zip(stock["alignment"], ours["alignment"]):
                    assert [float(p) for p in own] == pytest.approx([float(p) for p in theirs], abs=2e-6)


@needs_stock_translation
def test_scores_of_an_ensemble_with_a_stock_model(build, batch):
    """One that computes attention weights for its scorer, and one that does not, in either order."""
    models = [prepared(build(arch)[0]) for arch in ("transformer", "transformer_admin")]
    task, sample = build("transformer")[1], batch(4)
    scorer = SequenceScorer(task.target_dictionary)
    for one, other in zip(scorer.generate(models, sample), scorer.generate(models[::-1], sample)):
        torch.testing.assert_close(one[0]["positional_scores"], other[0]["positional_scores"])
