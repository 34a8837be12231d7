import pytest
from conftest import run

from admin_fairseq import Profile


@pytest.fixture
def profile_file(tmp_path):
    path = tmp_path / "p.json"
    Profile(encoder=[1.0, 1.5], decoder=[1.0, 1.25, 2.0]).write(str(path))
    return path


def test_show_profile(profile_file):
    result = run("admin-fairseq", "show", profile_file)
    assert result.code == 0, result.output
    (last,) = result.lines("sub-layer 3")
    assert last.split()[2] == "2.000"
    assert last.count("#") == 2 * result.lines("sub-layer 1")[1].count("#")


def test_show_checkpoint(data, tmp_path):
    from conftest import train

    assert train(data, tmp_path, "--admin-init", "logn", updates=1).code == 0
    result = run("admin-fairseq", "show", tmp_path / "checkpoint_last.pt")
    assert result.code == 0, result.output
    assert len(result.lines("layer")) == 2 + 6 + 6
    assert result.lines("layer 1 encoder_attn")


@pytest.mark.parametrize("name", ["nope.json", "nope.pt", "garbage.pt", "garbage.json", "empty.json"])
def test_show_bad_file(tmp_path, name):
    if name.startswith("garbage"):
        (tmp_path / name).write_text("garbage")
    if name.startswith("empty"):
        (tmp_path / name).write_text('{"encoder": [], "decoder": []}')
    result = run("admin-fairseq", "show", tmp_path / name)
    assert result.code == 1
    assert name in result.lines("admin_fairseq: error:")[0]
    assert "Traceback" not in result.output


def test_usage():
    assert run("admin-fairseq", "--help").code == 0
    assert run("admin-fairseq").code == 2
    assert run("admin-fairseq", "show").code == 2
    assert run("admin-fairseq", "--version").lines("admin_fairseq ")
