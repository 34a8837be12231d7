"""Beam search with keys once a sentence gives what fairseq's own gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import prepared, translate

from admin_fairseq.fast import attention, decoding
from admin_fairseq.fast.beams import by_sentence, repeats
from admin_fairseq.fast.measured import MEASURED

pytestmark = pytest.mark.skipif(
    not hasattr(F, "scaled_dot_product_attention"), reason="before torch 2.0 attention is fairseq's own"
)
BEAM = 3  # of helpers.translate
EOS = 2  # with which fairseq's decoder starts, too
OPTIONS = ("transformer_admin", "--admin-init", "logn")


@pytest.fixture
def model(build):
    """model(*options): one prepared for inference, and its task."""

    def model(*options):
        model, task, _ = build(*OPTIONS, *options)
        prepared(model)
        with torch.no_grad():  # some sentences end early
            model.decoder.output_projection.weight[EOS] *= 2
        return model, task

    return model


@pytest.fixture
def saved(monkeypatch):
    """The rows of keys that attention to the encoder saves, each time."""
    seen = []
    save = attention.FastAttention._set_input_buffer

    def spy(self, incremental_state, buffer):
        if self.encoder_decoder_attention:
            seen.append(len(buffer["prev_key"]))
        return save(self, incremental_state, buffer)

    monkeypatch.setattr(attention.FastAttention, "_set_input_buffer", spy)
    return seen


def assert_same(expected, found):
    assert len(expected) == len(found)
    for theirs, ours in zip(expected, found):
        assert torch.equal(theirs["tokens"], ours["tokens"])
        torch.testing.assert_close(theirs["positional_scores"], ours["positional_scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("models", [1, 2])
def test_translations(model, batch, saved, models):
    sample = batch(4)
    for settings in ({}, {"sampling": True, "sampling_topk": 5}, {"diverse_beam_groups": BEAM}):
        found = []
        for fast in ("off", "measured"):
            made = [model("--admin-fast", fast) for _ in range(models)]
            torch.manual_seed(5)
            found.append(translate([one for one, _ in made], made[0][1], sample, **settings))
        assert_same(*found)
        lengths = {len(hypothesis["tokens"]) for hypothesis in found[0]}
        assert len(lengths) > 1, "sentences should leave the batch at different steps"
    assert saved and max(saved) == 4


def repeated_output(model, net_input):
    """The encoder's, BEAM times each sentence."""
    output = model.encoder(net_input["src_tokens"], net_input["src_lengths"])
    order = torch.arange(len(net_input["src_tokens"])).repeat_interleave(BEAM)
    return model.encoder.reorder_encoder_out(output, order)


def decode(model, net_input, orders, is_incremental):
    """Logits of a step for each order, from an output repeated BEAM times."""
    output = repeated_output(model, net_input)
    tokens, state, logits = torch.full((len(net_input["src_tokens"]) * BEAM, 1), EOS), {}, []
    for step, order in enumerate([None, *orders]):
        if order is not None:
            tokens = tokens[order]
            model.decoder.reorder_incremental_state_scripting(state, order)
            output = model.encoder.reorder_encoder_out(output, order)
        logits.append(model.decoder(tokens, output, incremental_state=state if is_incremental else None)[0][:, -1])
        new = 4 + (torch.arange(len(tokens)) + step) % 7
        tokens = torch.cat([tokens, new[:, None]], 1)
    return logits


def orders_of(kind, sentences):
    rows = sentences * BEAM
    generator = torch.Generator().manual_seed(1)
    within = torch.stack([torch.randperm(BEAM, generator=generator) + BEAM * i for i in range(sentences)]).view(-1)
    fewer = within[BEAM:]  # the first sentence has left
    last = torch.tensor([2, 0, 0, 4, 4, 4])
    torn = torch.randperm(rows, generator=generator)
    return {
        "within": [within, within],
        "first leaves": [within, fewer, torch.arange(len(fewer)), last],
        "last leaves": [within, within[:-BEAM], within[: -2 * BEAM]],
        "sentences swapped": [within.view(sentences, BEAM).flip(0).reshape(-1), within],
        "torn": [within, torn, torn.flip(0), within],
        "no multiple": [within, torch.tensor([0, 5, 5, 1]), torch.tensor([3, 2, 0, 1])],
    }[kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["within", "first leaves", "last leaves", "sentences swapped", "torn", "no multiple"])
def test_any_order(model, batch, saved, kind):
    net_input, orders = batch(3)["net_input"], orders_of(kind, 3)
    (stock, _), (ours, _) = model("--admin-fast", "off"), model()
    # fairseq's own steps leave keys where they are whenever as many rows stay
    at_once, steps = decode(stock, net_input, orders, False), decode(ours, net_input, orders, True)
    for expected, found in zip(at_once, steps):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert saved[0] == 3
    assert (max(saved) > 3) == (kind in ("torn", "no multiple"))


@pytest.fixture
def slots(monkeypatch):
    """Of the first layer's attention to the past, at each step: sentences, slots and room."""
    seen = []
    write = decoding.Past.write

    def spy(self, keys, values):
        write(self, keys, values)
        seen.append((len(self.keys), self.slots, self.keys.shape[1]))

    monkeypatch.setattr(decoding.Past, "write", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_of_a_long_search(model, batch, slots, dtype):
    """Keys stay in place, those that nobody sees make room, and more room is made."""
    net_input, generator = batch(3)["net_input"], torch.Generator().manual_seed(2)
    orders, sentences = [], 3
    for step in range(30):
        parents = torch.randint(BEAM, (sentences, BEAM), generator=generator)
        if step % 4 < 3:
            parents = parents.sort().values if step < 6 else torch.arange(BEAM).expand(sentences, BEAM)
        left = torch.arange(sentences) if step != 22 else torch.tensor([0, 2])
        orders.append((parents + BEAM * torch.arange(sentences)[:, None])[left].view(-1))
        sentences = len(left)
    stock, ours = (model("--admin-fast", fast)[0].to(dtype) for fast in ("off", "measured"))
    at_once, steps = decode(stock, net_input, orders, False), decode(ours, net_input, orders, True)
    allowed = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for expected, found in zip(at_once, steps):
        torch.testing.assert_close(found, expected, **allowed)
    layers = len(ours.decoder.layers)
    assert len(slots) == 31 * layers
    used = [slots[step * layers] for step in range(31)]
    assert [sentences for sentences, _, _ in used] == [3] * 23 + [2] * 8
    assert used[1][1] <= 2 * BEAM and used[30][1] < 31 * BEAM, "slots without descendants should be left"
    assert len({room for _, _, room in used}) > 1


@torch.no_grad()
@pytest.mark.parametrize("when", [1, 4])
@pytest.mark.parametrize("what", ["no order", "two orders", "a pad", "weights", "a copied state", "dropout"])
def test_slots_are_left_to_fairseq(model, batch, what, when):
    """At one step in six, something that a search does not do; its own way before and after."""
    net_input, results = batch(2)["net_input"], []
    order = torch.tensor([1, 1, 0, 5, 3, 4])
    for fast in ("off", "measured"):
        one, _ = model("--admin-fast", fast)
        output = repeated_output(one, net_input)
        tokens, state, logits = torch.full((2 * BEAM, 1), EOS), {}, []
        for step in range(6):
            is_now, options = step == when, {}
            for _ in range(1 if not is_now else {"no order": 0, "two orders": 2}.get(what, 1)):
                if step:
                    one.decoder.reorder_incremental_state_scripting(state, order)
                    tokens = tokens[order]
            if is_now and what == "a copied state":
                state = copy.deepcopy(state)
            if is_now and what == "weights":
                options = {"alignment_layer": 0, "alignment_heads": 1}
            for layer in one.decoder.layers:
                dropout = layer.self_attn.dropout_module
                dropout.p, dropout.apply_during_inference = 0.5, is_now and what == "dropout"
            torch.manual_seed(1)
            logits.append(one.decoder(tokens, output, incremental_state=state, **options)[0][:, -1])
            new = 4 + torch.arange(len(tokens)) % 5 + step
            if is_now and what == "a pad":
                new[2] = one.decoder.padding_idx
            tokens = torch.cat([tokens, new[:, None]], 1)
        results.append(torch.stack(logits))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_in_the_middle_of_a_search_without_padding(model, batch):
    net_input, results = batch(2, same_length=True)["net_input"], []
    for fast in ("off", "measured"):
        one, _ = model("--admin-fast", fast)
        output, tokens, state = repeated_output(one, net_input), torch.full((2 * BEAM, 1), EOS), {}
        one.decoder(tokens, output, incremental_state=state)
        tokens = torch.cat([tokens, tokens + 3], 1)
        logits, extra = one.decoder(tokens, output, incremental_state=state, alignment_layer=0)
        results.append((logits, extra["attn"][0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_gradients_of_steps(model, batch):
    """Of training by what a search finds."""
    net_input, gradients = batch(2)["net_input"], []
    for fast in ("off", "measured"):
        one, _ = model("--admin-fast", fast)
        sum(logits.square().mean() for logits in decode(one, net_input, orders_of("within", 2), True)).backward()
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_output_is_copied_only_if_that_changes_it(model, batch):
    net_input = batch(3)["net_input"]
    encoder = model()[0].encoder
    output = encoder(net_input["src_tokens"], net_input["src_lengths"])
    assert encoder.reorder_encoder_out(output, torch.tensor([2, 0])) is not output
    repeated = encoder.reorder_encoder_out(output, torch.arange(3).repeat_interleave(BEAM))
    assert repeats(repeated["encoder_out"][0]) == BEAM
    within, fewer = torch.tensor([2, 0, 1, 3, 3, 3, 8, 7, 8]), torch.tensor([2, 0, 1, 3, 3, 3])
    assert encoder.reorder_encoder_out(repeated, within) is repeated
    left = encoder.reorder_encoder_out(repeated, fewer)["encoder_out"][0]
    assert left.shape[1] == 6 and repeats(left) == BEAM
    torn = encoder.reorder_encoder_out(repeated, torch.tensor([0, 3, 6]))["encoder_out"][0]
    assert torn.shape[1] == 3 and repeats(torn) == 1


@torch.no_grad()
@pytest.mark.parametrize("what", ["output", "padding"])
def test_what_was_changed_is_not_shared(model, batch, saved, what):
    """Each hypothesis gets an output, or padding, of its own, in place, after the output was repeated."""
    net_input = batch(3)["net_input"]
    logits = []
    for fast in ("off", "measured"):
        one, _ = model("--admin-fast", fast)
        output = repeated_output(one, net_input)
        if what == "output":
            output["encoder_out"][0].mul_(torch.linspace(0.5, 2, 3 * BEAM)[None, :, None])
        else:
            output["encoder_padding_mask"][0][1::BEAM, -1] = True
        logits.append(one.decoder(torch.full((3 * BEAM, 1), EOS), output, incremental_state={})[0])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    assert set(saved) == {3 * BEAM}


@torch.no_grad()
def test_a_state_used_again_is_no_longer_shared(model, batch):
    """Emptied by hand, and filled from an output that was not repeated."""
    net_input, order = batch(3)["net_input"], torch.tensor([2, 0])
    one, _ = model()
    output = one.encoder(net_input["src_tokens"], net_input["src_lengths"])
    repeated = one.encoder.reorder_encoder_out(output, torch.arange(3).repeat_interleave(BEAM))
    used: dict = {}
    one.decoder(torch.full((3 * BEAM, 1), EOS), repeated, incremental_state=used)
    for name in [name for name in used if name.endswith("attn_state")]:
        used[name] = {}
    logits = []
    for state in ({}, used):
        one.decoder(torch.full((3, 1), EOS), output, incremental_state=state)
        one.decoder.reorder_incremental_state_scripting(state, order)
        left, tokens = one.encoder.reorder_encoder_out(output, order), torch.tensor([[EOS, 5], [EOS, 6]])
        logits.append(one.decoder(tokens, left, incremental_state=state)[0])
    assert torch.equal(*logits)


def test_training_goes_on_after_translations(model, batch):
    """A batch of as many sentences as hypotheses is no beam."""
    sample = batch(BEAM * 2)
    one, task = model()
    before = one(**sample["net_input"])[0]
    translate([one], task, sample)
    assert torch.equal(one(**sample["net_input"])[0], before)


def test_in_inference_mode(model, batch):
    one, task = model()
    expected = translate([one], task, batch(4))
    with torch.inference_mode():
        assert_same(expected, translate([one], task, batch(4)))
        assert by_sentence(torch.tensor([1, 0, 2, 3]), 2)[0].tolist() == [0, 1]
    sample = batch(3)["net_input"]
    with torch.no_grad():
        output = repeated_output(one, sample)
    with torch.inference_mode():
        assert repeats(copy.deepcopy(output["encoder_out"][0])) == 1


def test_not_where_it_was_not_measured(model, batch, saved, monkeypatch):
    monkeypatch.setitem(MEASURED, "beams", frozenset())
    one, task = model()
    translate([one], task, batch(4))
    assert max(saved) == 4 * BEAM


def test_an_order_that_changes_is_asked_again():
    order = torch.tensor([1, 0, 2, 3])
    sentences, stays = by_sentence(order, 2)
    assert stays and sentences.tolist() == [0, 1]
    order[:2] = torch.tensor([2, 3])
    sentences, stays = by_sentence(order, 2)
    assert not stays and sentences.tolist() == [1, 1]
    assert by_sentence(order, 4)[0].tolist() == [0]
    order[0] = 0
    assert by_sentence(order, 2) == (None, False)
