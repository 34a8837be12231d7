"""fairseq-hydra-train with examples/hydra/translation.yaml."""

from __future__ import annotations

import pytest
from helpers import ROOT, assert_refused, checkpoint, generate, hypotheses, profile_in, run, train

TINY = [
    *("model.encoder_embed_dim=32", "model.encoder_ffn_embed_dim=64"),
    *("model.encoder_attention_heads=2", "model.decoder_attention_heads=2"),
    *("dataset.max_tokens=600", "dataset.required_batch_size_multiple=1", "dataset.num_workers=0"),
    *("common.cpu=true", "common.seed=3", "common.log_format=json", "common.log_interval=1"),
    *("optimization.lr=[0.002]", "lr_scheduler.warmup_updates=20", "lr_scheduler.warmup_init_lr=-1"),
]
LAYERS = ["model.encoder_layers=3", "model.decoder_layers=2"]


def hydra_train(data, folder, *overrides, updates=3):
    """fairseq-hydra-train in ``folder``, with checkpoints in ``folder/checkpoints``; later overrides win."""
    return run(
        *("fairseq-hydra-train", "--config-dir", ROOT / "examples/hydra", "--config-name", "translation"),
        *(f"task.data={data}", *TINY, f"optimization.max_update={updates}", *overrides),
        cwd=folder,
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hydra")
    result = hydra_train(data, folder, *LAYERS)
    assert result.code == 0, result.output
    return folder / "checkpoints", result


def test_trains_as_fairseq_train(trained, data, tmp_path):
    folder, by_hydra = trained
    by_flags = train(data, tmp_path, "--adam-betas", "(0.9, 0.98)", arch="transformer_admin_72", updates=3)
    assert by_flags.code == 0, by_flags.output
    assert by_hydra.losses() == by_flags.losses()
    assert len(by_hydra.losses()) == 3
    profiles = [profile_in(path) for path in (folder, tmp_path)]
    assert profiles[0] == profiles[1]


def test_resumes(trained, data):
    folder, _ = trained
    resumed = hydra_train(data, folder.parent, *LAYERS, updates=4)
    assert resumed.code == 0, resumed.output
    assert resumed.lines("omega from the checkpoint")
    assert list(resumed.losses()) == [4]


def test_translates(trained, data):
    folder, _ = trained
    assert len(hypotheses(generate(data, folder / "checkpoint_best.pt"))) == 30


@pytest.mark.parametrize("method", ["deepnorm", "preln"])
def test_other_methods_from_the_same_file(method, data, tmp_path):
    """Whose models do not have Admin's options, which the file leaves at null."""
    result = hydra_train(data, tmp_path, f"model._name=transformer_{method}", *LAYERS, updates=1)
    assert result.code == 0, result.output
    assert len(result.losses()) == 1


@pytest.mark.parametrize(
    ("overrides", "encoder", "decoder"),
    [
        (["model.encoder_layers=1", "model.decoder_layers=4"], 1, 4),
        (["+model.encoder.layers=2", "+model.decoder.layers=1"], 2, 1),
        (["model._name=transformer_admin_12_12", "model.decoder_layers=1"], 12, 1),
    ],
)
def test_layers_asked_are_layers_built(data, tmp_path, overrides, encoder, decoder):
    result = hydra_train(data, tmp_path, *overrides, updates=1)
    assert result.code == 0, result.output
    profile = profile_in(tmp_path / "checkpoints")
    assert (len(profile["encoder"]), len(profile["decoder"])) == (2 * encoder, 3 * decoder)
    layers = {
        name.split(".")[2]
        for name in checkpoint(tmp_path / "checkpoints/checkpoint_last.pt")["model"]
        if name.startswith("encoder.layers")
    }
    assert len(layers) == encoder


def test_bf16(data, tmp_path):
    result = hydra_train(data, tmp_path, *LAYERS, "common.bf16=true", updates=1)
    assert result.code == 0, result.output
    profile = profile_in(tmp_path / "checkpoints")
    assert profile["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("+model.encoder_layer=5", "did you mean model.encoder_layers"),
        ("+model.encoder_normalize_before=true", "Post-LN"),
        ("model.admin_init=magic", "choose profile, logn, sqrt or unit"),
        ("+model.init_weights=xavier", "choose fairseq or authors"),
        ("model._name=transformer_admin_24x6", "no such architecture; the nearest: transformer_admin_24_6"),
        ("+model.encoder.layers=4", "gives encoder_layers twice, as 3 and as 4"),
        ("+model.encoder_layerdrop=2", "--encoder-layerdrop is '2', which is no value of that option"),
        ("+task.max_target_positions=2000000", "--max-target-positions is 2000000; read are numbers from 1 to"),
        ("checkpoint.finetune_from_model=/", "--finetune-from-model: / is a folder, not a checkpoint"),
    ],
)
def test_bad_options(data, tmp_path, override, needle):
    result = hydra_train(data, tmp_path, *LAYERS, override)
    assert result.code == 1
    assert_refused(result, needle, tmp_path / "checkpoints")
