import contextlib
import inspect
import json
import math

import numpy as np
import pytest
import torch
from fairseq.modules.quantization.scalar.modules import IntLinear
from fairseq.quantization_utils import quantize_model_scalar
from tqdm import tqdm

from admin_fairseq import AdminError, Profile, profile, profiling, read_profile, sub_layers
from admin_fairseq.omega import MARGIN, set_omega
from admin_fairseq.profiling import _moments, _variance

NO_DROPOUT = ["--dropout", "0"]


def authors_rule(model, net_input, margin):
    """The authors' formulation (for margin 1), written out over fairseq's own sub-modules and numpy.

    Returns omega by stack; leaves the model alone. Padding positions are cut out of every variance.
    """
    result = {}

    def sub_layer(norm, x, f, r, keep):
        shortcut = x * r
        omegas.append(r)
        values = [h.detach().numpy()[keep.numpy()].ravel() for h in (shortcut, f)]
        r = math.sqrt(np.var(values[0], dtype=np.float64) + margin * np.var(values[1], dtype=np.float64))
        return torch.nn.functional.layer_norm(shortcut + f, x.shape[-1:], norm.weight, norm.bias), r

    def ffn(layer, x):
        return layer.fc2(torch.relu(layer.fc1(x)))

    source, target = net_input["src_tokens"], net_input["prev_output_tokens"]
    pad = model.encoder.padding_idx
    source_pad, target_pad = source.eq(pad), target.eq(pad)

    omegas, r, keep = [], 1.0, ~source_pad.t()
    x, _ = model.encoder.forward_embedding(source)
    x = (x * keep.t().unsqueeze(-1)).transpose(0, 1)
    for layer in model.encoder.layers:
        f, _ = layer.self_attn(x, x, x, key_padding_mask=source_pad)
        x, r = sub_layer(layer.self_attn_layer_norm, x, f, r, keep)
        x, r = sub_layer(layer.final_layer_norm, x, ffn(layer, x), r, keep)
    memory, result["encoder"] = x, omegas

    omegas, r, keep = [], 1.0, ~target_pad.t()
    decoder = model.decoder
    x = (decoder.embed_scale * decoder.embed_tokens(target) + decoder.embed_positions(target)).transpose(0, 1)
    future = torch.full((len(x), len(x)), -math.inf).triu(1)
    for layer in decoder.layers:
        f, _ = layer.self_attn(x, x, x, key_padding_mask=target_pad, attn_mask=future)
        x, r = sub_layer(layer.self_attn_layer_norm, x, f, r, keep)
        f, _ = layer.encoder_attn(x, memory, memory, key_padding_mask=source_pad, static_kv=True)
        x, r = sub_layer(layer.encoder_attn_layer_norm, x, f, r, keep)
        x, r = sub_layer(layer.final_layer_norm, x, ffn(layer, x), r, keep)
    result["decoder"] = omegas
    return result


@pytest.mark.parametrize("margin", [None, 1, 0.5, 16])
@pytest.mark.parametrize("same_length", [True, False], ids=["no padding", "padding"])
def test_omega_follows_the_authors_rule(build, batch, same_length, margin):
    """And the same with a margin, in front of every Var[f]."""
    model, _, _ = build("transformer_admin", *NO_DROPOUT, *(["--admin-margin", str(margin)] if margin else []))
    net_input = batch(same_length=same_length)["net_input"]
    assert net_input["src_tokens"].eq(model.encoder.padding_idx).any() != same_length
    margin = margin or MARGIN
    expected = authors_rule(model, net_input, margin)
    result = profile(model, [(net_input, True)])
    assert result.margin == margin
    for name, stack in model.stacks().items():
        assert getattr(result, name) == pytest.approx(expected[name], rel=1e-5)
        variances = zip(result.shortcut_variance[name], result.branch_variance[name])
        following = [math.sqrt(shortcut + margin * branch) for shortcut, branch in variances]
        assert following[:-1] == pytest.approx(expected[name][1:], rel=1e-5) and len(following) == 6
        filled = [norm.omega.unique().item() for norm in sub_layers(stack).values()]
        assert filled == pytest.approx(expected[name], rel=1e-5)
    assert result.tokens == {
        "encoder": net_input["src_tokens"].ne(1).sum(),
        "decoder": net_input["prev_output_tokens"].ne(1).sum(),
    }
    assert {type(count) for count in result.tokens.values()} == {int}


def test_padding_does_not_enter(build, batch):
    """The same sentences with ten more columns of padding give the same omega."""
    model, _, _ = build("transformer_admin", *NO_DROPOUT)
    net_input = batch()["net_input"]
    padded = dict(net_input)
    for key, side in (("src_tokens", (10, 0)), ("prev_output_tokens", (0, 10))):
        padded[key] = torch.nn.functional.pad(net_input[key], side, value=model.encoder.padding_idx)
    expected, actual = profile(model, [(net_input, True)]), profile(model, [(padded, True)])
    assert actual.encoder == pytest.approx(expected.encoder, rel=1e-5)
    assert actual.decoder == pytest.approx(expected.decoder, rel=1e-5)


def test_variance_is_measured_after_dropout(build, batch):
    """Dropout p scales Var[f] by about 1 / (1 - p)."""
    net_input = batch(64)["net_input"]
    plain, _, _ = build("transformer_admin", "--encoder-layers", "1", *NO_DROPOUT)
    dropped, _, _ = build("transformer_admin", "--encoder-layers", "1", *NO_DROPOUT)
    for norm in sub_layers(dropped.encoder).values():
        norm.dropout.p = 0.5
    dropped.eval()  # as analyses have it; the pre-pass is in train mode
    before = profile(plain, [(net_input, True)]).branch_variance["encoder"][0]
    assert profile(dropped, [(net_input, True)]).branch_variance["encoder"][0] == pytest.approx(2 * before, rel=0.1)


def test_several_batches_count_as_one(build, batch):
    """Three batches, of other lengths and sizes, against one batch of the same sentences."""
    model, _, _ = build("transformer_admin", *NO_DROPOUT)
    parts = [(batch(count, start)["net_input"], True) for count, start in ((8, 0), (3, 8), (13, 11))]
    whole = profile(model, [(batch(24)["net_input"], True)])
    pooled = profile(model, parts)
    assert pooled.encoder == pytest.approx(whole.encoder, rel=1e-5)
    assert pooled.decoder == pytest.approx(whole.decoder, rel=1e-5)
    assert pooled.tokens == whole.tokens
    assert (pooled.batches, whole.batches) == (3, 1)


def test_several_batches_are_reproducible_with_dropout(build, batch):
    model, _, _ = build("transformer_admin", "--dropout", "0.3")
    parts = [(batch(8, start)["net_input"], True) for start in (0, 8, 16)]
    torch.manual_seed(1)
    first = profile(model, parts)
    torch.manual_seed(1)
    assert profile(model, parts) == first


def test_what_a_batch_is_unless_it_says_otherwise(build, batch):
    model, _, _ = build("transformer_admin", "--dropout", "0.3", "--encoder-layers", "1", "--decoder-layers", "1")
    net_input = batch()["net_input"]
    model.decoder.output_layer = None  # no more is computed than is observed
    plain, counted, other = (profile(model, [(net_input, *rest)]) for rest in ((), (True, 1), (True, 2)))
    assert plain == counted != other


def test_a_language_model_reads_its_source(build_lm):
    model, _, _ = build_lm("transformer_lm_admin", "--decoder-layers", "1")
    tokens = torch.tensor([[5, 6, 7], [8, 9, model.decoder.padding_idx]])
    assert profile(model, [({"src_tokens": tokens}, True)]).tokens == {"decoder": 5}


def test_the_bar_counts_sub_layers(build, batch, monkeypatch, capsys):
    bars = []
    monkeypatch.setattr(profiling, "tqdm", lambda *args, **options: bars.append(tqdm(*args, **options)) or bars[-1])
    model, _, _ = build("transformer_admin", *NO_DROPOUT)
    sample = (batch()["net_input"], True)
    profile(model, [sample, sample], progress=True)
    profile(model, [sample])
    assert [bar.n for bar in bars] == [bars[0].total, 0] == [24, 0]  # the second is not shown
    assert not capsys.readouterr().err  # it was quick
    assert (bars[0].desc, bars[0].unit, bars[0].delay) == ("Admin pre-pass", "sub-layer", 3)


def test_what_a_thread_does_not_inherit(build, batch, monkeypatch):
    """Autocast is on in each where it is at the call. And of batches on the CPU no GPU's random state is put back."""
    model, _, _ = build("transformer_admin", "--encoder-layers", "1", "--decoder-layers", "1")
    calls, devices, fork = [], [], torch.random.fork_rng
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: True)
    monkeypatch.setattr(torch, "autocast", lambda *what, **how: calls.append((what, how)) or contextlib.nullcontext())
    monkeypatch.setattr(torch.random, "fork_rng", lambda of: devices.append(of) or fork(of))
    profile(model, [(batch(4, start)["net_input"], True) for start in (0, 4)])
    assert calls == [(("cuda",), {"enabled": True})] * 2
    assert devices == [[]] * 10


def test_a_batch_that_does_not_count(build, batch):
    """What a worker with an empty shard runs."""
    model, _, _ = build("transformer_admin", *NO_DROPOUT)
    real, dummy = batch(8)["net_input"], batch(8, 8)["net_input"]
    assert profile(model, [(dummy, False), (real, True)]).encoder == pytest.approx(
        profile(model, [(real, True)]).encoder, rel=1e-6
    )


def test_reduce_sees_every_sub_layer_and_its_result_is_used(build, batch):
    model, _, _ = build("transformer_admin", *NO_DROPOUT)
    sample = (batch()["net_input"], True)
    seen = []
    doubled = profile(model, [sample], reduce=lambda moments: seen.append(moments) or 2 * moments)
    assert len(seen) == len(doubled.encoder) + len(doubled.decoder)
    assert {moments.dtype for moments in seen} == {torch.float64}
    once = profile(model, [sample])
    assert doubled.encoder == pytest.approx(once.encoder)
    assert doubled.tokens == {name: 2 * count for name, count in once.tokens.items()}


def test_leaves_everything_but_omega_alone(build, batch):
    model, _, _ = build("transformer_admin", "--encoder-layerdrop", "0.5", "--quant-noise-pq", "0.5")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = [module.training for module in model.eval().modules()]
    result = profile(model, [(batch()["net_input"], True)])
    assert len(result.encoder) == 6  # LayerDrop dropped nothing
    assert model.omega_source == "profiling"
    assert [module.training for module in model.modules()] == modes
    assert not any("add" in vars(norm) for norm in sub_layers(model).values())
    for name, weight in model.state_dict().items():
        assert name.endswith(".omega") or torch.equal(weight, before[name]), name


def test_scalar_quantisation_noise_is_off_and_left_as_it_was(build, batch, monkeypatch):
    """Its modules count their calls and keep scales; a call more would change the training that follows."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # why it wants a GPU
    plain, _, _ = build("transformer_admin", *NO_DROPOUT)
    model, _, cfg = build("transformer_admin", *NO_DROPOUT)
    cfg.model.quant_noise_scalar = 0.5
    quantize_model_scalar(model, cfg.model)
    quantised = [module for module in model.modules() if isinstance(module, IntLinear)]
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    activations = [inspect.getclosurevars(hook).nonlocals["self"] for hook in hooks]
    noisy, seen = [*quantised, *activations], set()
    sample = (batch()["net_input"], True)

    def reduce(moments):
        seen.update(module.p for module in noisy)
        return moments

    found, exact = profile(model, [sample], reduce), profile(plain, [sample])
    assert seen == {0}
    assert found.encoder == pytest.approx(exact.encoder, rel=5e-3)  # it clamps weights to what 8 bits hold
    assert min(len(quantised), len(activations)) > 20

    def states():
        scales = [[getattr(module, name, None) for name in ("scale", "zero_point")] for module in noisy]
        return [(module.p, module.counter, *scale) for module, scale in zip(noisy, scales)]

    assert states() == [(0.5, 0, None, None)] * len(quantised) + [(0, 0, None, None)] * len(activations)
    model(**sample[0])
    before = states()
    assert max(counter for _, counter, *_ in before) == 1
    again = profile(model, [sample])
    assert again.encoder == pytest.approx(exact.encoder, rel=5e-3)
    assert states() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_are_summed_in_double_precision(dtype):
    """60,000 halves overflow float16 and round away in bfloat16."""
    values = torch.full((60_000,), 3.0, dtype=dtype)
    values[::2] = 5.0
    assert _variance(_moments(values)) == 1.0
    assert math.isnan(_variance(_moments(values[:0])))


@pytest.mark.parametrize("batches", [1, 2])
def test_variance_that_is_not_finite(build, batch, batches):
    model, _, _ = build("transformer_admin")
    with torch.no_grad():
        model.encoder.layers[1].fc2.weight[0, 0] = math.inf
    with pytest.raises(AdminError, match=r"encoder\.layers\.1\.final_layer_norm"):
        profile(model, [(batch()["net_input"], True)] * batches)


def test_profile_file_round_trip(tmp_path):
    written = Profile(encoder=[1.0, 4 / 3], decoder=[1.0, math.pi, math.e], tokens={"encoder": 7}, margin=2.5)
    written.write(str(tmp_path / "p.json"))
    read = read_profile(str(tmp_path / "p.json"))
    assert (read.encoder, read.decoder, read.margin) == (written.encoder, written.decoder, 2.5)
    assert json.loads((tmp_path / "p.json").read_text())["version"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_a_profile_under_another_margin(build, batch):
    """Nearly what a pre-pass with that margin finds, from Var[f] or, as in the authors' file, from omega alone."""
    net_input = batch(24)["net_input"]
    narrow, wide = (
        profile(build("transformer_admin", *NO_DROPOUT, "--admin-margin", str(k))[0], [(net_input, True)])
        for k in (1, 9)
    )
    for start, expected in ((narrow, wide), (wide, narrow)):
        changed = start.with_margin(expected.margin)
        assert changed.encoder == pytest.approx(expected.encoder, rel=0.06)
        assert changed.decoder == pytest.approx(expected.decoder, rel=0.06)
        assert changed.with_margin(start.margin).decoder == pytest.approx(start.decoder)
    authors = Profile(encoder=[1.0, 2.0, 3.0], decoder=[1.0]).with_margin(4)
    assert authors.encoder == pytest.approx([1.0, 13**0.5, 33**0.5]) and authors.decoder == [1.0]
    with pytest.raises(AdminError, match="--admin-margin 9: this profile's encoder omegas"):
        Profile(encoder=[1.0, 0.5], decoder=[1.0]).with_margin(9)


def test_an_omega_that_its_dtype_cannot_hold(build):
    """As of a margin of 1e300, or of 1e5 in fp16."""
    model, _, _ = build("transformer_admin")
    norms = list(sub_layers(model.encoder).values())
    with pytest.raises(
        AdminError, match=r"^an omega of 1e\+150 is more than float32 holds; take a smaller --admin-marg"
    ):
        set_omega(norms, [1.0, 1e150])
    model.half()
    set_omega(norms, [65504.0])
    with pytest.raises(AdminError, match="more than float16 holds"):
        set_omega(norms, [65505.0])


def test_profile_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    Profile(encoder=[1.0], decoder=[1.0]).write(str(path))
    before = path.read_text()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(AdminError, match="No space left"):
        Profile(encoder=[1.0, 2.0], decoder=[1.0]).write(str(path))
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize("numbered", [True, False], ids=["Transformer-Clinic", "deepnmt"])
def test_authors_profile(tmp_path, numbered):
    stacks = [1.0, 1.3190397024154663, 1.4550316333770752, 1.5123295783996582], [1.0, 1.3425869941711426, 1.48]
    path = tmp_path / "profile.ratio.init"
    rows = [f"{n} {omega}" if numbered else f"{omega}" for stack in stacks for n, omega in enumerate(stack, 1)]
    path.write_text("\n".join(rows) + "\n")
    read = read_profile(str(path))
    assert (read.encoder, read.decoder) == stacks


@pytest.mark.parametrize("numbered", [True, False], ids=["Transformer-Clinic", "deepnmt"])
def test_what_the_authors_measure_again_is_not_read(tmp_path, numbered):
    """Their half-precision profiling appends the first layers' new values, which a model of that depth never reads."""
    stacks = [1.0, 1.31, 1.45, 1.51], [1.0, 1.34, 1.48, 1.61, 1.69, 1.82]
    path = tmp_path / "profile.ratio.init"
    rows = [
        f"{number} {omega}" if numbered else f"{omega}"
        for part in (*stacks, (1.64, 1.9), (2.1, 2.2, 2.3))
        for number, omega in enumerate(part, 1)
    ]
    path.write_text("\n".join(rows) + "\n")
    read = read_profile(str(path), encoder_sub_layers=4, decoder_sub_layers=6)
    assert (read.encoder, read.decoder) == stacks
    if not numbered:  # a deeper model's profile is not cut to size
        assert len(read_profile(str(path), encoder_sub_layers=4, decoder_sub_layers=3).decoder) == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"encoder": [1.0]', "malformed"),
        ('{"encoder": [1.0]}', "malformed"),
        ('{"encoder": 1.0, "decoder": [1.0]}', "malformed"),
        ('{"encoder": "11", "decoder": [1.0]}', "malformed"),
        ('{"encoder": ["x"], "decoder": [1.0]}', "malformed"),
        ('{"version": 2, "encoder": [1.0], "decoder": [1.0]}', "version 2"),
        ("[1.0, 2.0]", "malformed"),
        ('{"encoder": [1.0, NaN], "decoder": [1.0]}', "omega nan for encoder sub-layer 2"),
        ('{"encoder": [1.0], "decoder": [1.0, Infinity]}', "omega inf for decoder sub-layer 2"),
        ('{"encoder": [1.0, -1], "decoder": [1.0]}', "omega -1.0"),
        ('{"encoder": [0], "decoder": [1.0]}', "omega 0.0"),
        ('{"encoder": [1.0], "decoder": [1.0], "margin": -1}', "margin -1.0 is not positive"),
        ('{"encoder": [true], "decoder": [1.0]}', "malformed"),
        ('{"encoder": ["1.5"], "decoder": [1.0]}', "malformed"),
        ('{"encoder": [1.0, 1%s], "decoder": [1.0]}' % ("0" * 400), "malformed"),
        ('{"encoder": [1.0, 1e39], "decoder": [1.0]}', "omega 1e\\+39"),
        ('{"encoder": [1.0, 1e-60], "decoder": [1.0]}', "omega 1e-60"),
        ("hello\n", "malformed"),
        ("", "malformed"),
        ("1 1.0\n2\n", "malformed"),
        ("0 1.0\n1 1.2\n0 1.0\n1 1.3\n", "numbers do not run from 1"),
        ("1 1.0\n2 1.2\n1 1.0\n2 1.3\n1 1.0\n2 1.2\n", "numbers do not run from 1"),
        ("1 1.0\n3 1.2\n1 1.0\n", "numbers do not run from 1"),
    ],
)
def test_bad_profiles(tmp_path, text, message):
    path = tmp_path / "p"
    path.write_text(text)
    with pytest.raises(AdminError, match=message) as error:
        read_profile(str(path))
    assert "\n" not in str(error.value)


def test_missing_profile(tmp_path):
    with pytest.raises(AdminError, match="No such file"):
        read_profile(str(tmp_path / "nope"))


def test_profile_of_another_depth(build):
    model, _, _ = build("transformer_admin")
    with pytest.raises(AdminError, match="4 encoder sub-layers, the model 6"):
        Profile(encoder=[1.0] * 4, decoder=[1.0] * 6).apply(model)
    assert all(norm.omega.eq(1).all() for norm in sub_layers(model).values())


def test_first_omega_of_a_profile_is_not_used(build, caplog):
    model, _, _ = build("transformer_admin")
    Profile(encoder=[2.0] * 6, decoder=[3.0] * 6).apply(model)
    for stack, rest in ((model.encoder, 2.0), (model.decoder, 3.0)):
        assert [norm.omega.unique().item() for norm in sub_layers(stack).values()] == [1.0] + [rest] * 5
    assert "fixed at 1" in caplog.text
