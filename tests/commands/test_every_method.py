"""Every method from training to translations, by fairseq's own main functions in this process."""

import logging
import re

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import generate as fairseq_generate
from helpers import NO_LOADER, SAME_PARTS, checkpoint, train_here

from admin_fairseq.architectures import METHODS


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow if m in SAME_PARTS else ()) for m in METHODS]
)
def test_trains_resumes_and_generates(method, data, tmp_path, caplog, capsys):
    """Two updates, two more from the checkpoint, translations."""
    flags = "--dropout 0.1 --no-epoch-checkpoints --disable-validation"
    train_here(f"transformer_{method}", data, tmp_path, flags)
    caplog.set_level(logging.INFO)
    train_here(f"transformer_{method}", data, tmp_path, f"{flags} --max-update 4")
    assert "@ 2 updates" in caplog.text
    assert checkpoint(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 4

    path = ["--path", str(tmp_path / "checkpoint_last.pt"), "--cpu", "--beam", "2", "--max-len-b", "5"]
    argv = [str(data), *path, "-s", "de", "-t", "en", "--required-batch-size-multiple", "1", *NO_LOADER]
    parser = options.get_generation_parser()
    fairseq_generate.main(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, argv)))
    assert len(re.findall(r"^H-\d+\t", capsys.readouterr().out, re.M)) == 30
