"""docs/options.md, row by row: each is trained by fairseq's own main function, in this process."""

from __future__ import annotations

import re

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models.transformer import TransformerConfig
from helpers import DEFAULT_COMBINATION, ROOT, checkpoint, preprocess, profile_in, train_here

from admin_fairseq.errors import explain

PAGE = (ROOT / "docs/options.md").read_text().split("## Not for Admin")[0]
TABLE = re.findall(r"^\| `(--[^|`]+)` \| (works|refused|fairseq|GPU) \|", PAGE, re.M)


@pytest.fixture(scope="session")
def aligned(data, tmp_path_factory):
    """The corpus with alignments and separate dictionaries."""
    folder = tmp_path_factory.mktemp("aligned")
    for name in ("train", "valid"):
        for language in ("de", "en"):
            (folder / f"{name}.{language}").symlink_to(data.parent / f"{name}.{language}")
        count = len((folder / f"{name}.de").read_text(encoding="utf-8").splitlines())
        (folder / f"{name}.align").write_text("0-0 1-1\n" * count)
    splits = ("--trainpref", folder / "train", "--validpref", folder / "valid")
    preprocess("-s", "de", "-t", "en", *splits, "--align-suffix", "align", "--destdir", folder / "bin")
    return folder / "bin"


def assert_trained_from_the_profile(cfg, save_dir):
    profile = profile_in(save_dir)
    dtype = getattr(torch, profile["settings"]["dtype"])
    state = checkpoint(save_dir / "checkpoint_last.pt")
    weights = [state["model"], *([state["extra_state"]["ema"]] if cfg.ema.store_ema else [])]
    for stack in ("encoder", "decoder"):
        per_layer = 2 if stack == "encoder" or len(profile["encoder"]) == 0 or cfg.model.no_cross_attention else 3
        assert len(profile[stack]) == per_layer * getattr(cfg.model, f"{stack}_layers", 0)
        for model in weights:
            omegas = [w for name, w in model.items() if name.startswith(stack) and name.endswith(".omega")]
            assert len(omegas) == len(profile[stack])
            for start, omega in zip(profile[stack], omegas):
                rounded = torch.tensor(start, dtype=dtype).item()  # bf16 has no number between 5 and 5.03
                assert omega.float().mean().item() == pytest.approx(rounded, abs=0.01)
        assert all(later != 1 for later in profile[stack][1:])
    model, _ = checkpoint_utils.load_model_ensemble([str(save_dir / "checkpoint_last.pt")])
    assert model[0].omega_source == "the checkpoint"


def test_every_row_is_tested():
    assert len(TABLE) == PAGE.count("\n| `") > 40


@pytest.mark.parametrize(("flags", "outcome"), TABLE, ids=[flags for flags, _ in TABLE])
def test_row(data, aligned, text, tmp_path, flags, outcome):
    criterion = re.search(r"--criterion (\w+)", flags)
    if criterion and criterion[1] not in CRITERION_REGISTRY:
        pytest.skip(f"this fairseq has no criterion {criterion[1]}")
    if "--merge-src-tgt-embed" in flags and not hasattr(TransformerConfig, "merge_src_tgt_embed"):
        pytest.skip("this fairseq has no --merge-src-tgt-embed")
    if outcome == "GPU" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    arch = "transformer_lm_admin" if "language_modeling" in flags else "transformer_admin"
    folder = aligned if "alignments" in flags else data
    if "denoising" in flags or "language_modeling" in flags:
        folder = text
    if outcome in ("works", "GPU"):
        try:
            cfg = train_here(arch, folder, tmp_path, flags, on_gpu=outcome == "GPU")
        except Exception as ours:
            if DEFAULT_COMBINATION:
                raise
            with pytest.raises(type(ours), match=re.escape(str(ours))):
                train_here(arch.replace("_admin", ""), folder, tmp_path / "stock", flags)
            pytest.skip(f"fairseq itself fails here: {ours}")
        assert_trained_from_the_profile(cfg, tmp_path)
        return
    with pytest.raises(Exception) as ours:
        train_here(arch, folder, tmp_path, flags)
    assert not list(tmp_path.iterdir())
    if outcome == "refused":
        assert explain(ours.value)
    else:
        with pytest.raises(ours.type) as stock:
            train_here("transformer", folder, tmp_path, flags)
        assert str(stock.value) == str(ours.value)


def test_separate_dictionaries(aligned, tmp_path):
    cfg = train_here("transformer_admin", aligned, tmp_path, "")
    assert_trained_from_the_profile(cfg, tmp_path)
    state = checkpoint(tmp_path / "checkpoint_last.pt")["model"]
    assert state["encoder.embed_tokens.weight"].shape != state["decoder.embed_tokens.weight"].shape
