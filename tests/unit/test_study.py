"""docs/reproduction.md is what the recorded runs and its prose make of it."""

from benchmarks import study


def test_the_page_is_made_from_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "PAGE", tmp_path / "page.md")
    study.main(["page"])
    made = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert made == (study.ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    assert "{" not in made
    summary = made[made.index("Pre-LN and the recommended start") :].split("\n\n")[1]
    assert summary in (study.ROOT / "README.md").read_text(encoding="utf-8")


def run(method, lr, valid_ppl, seed=1, depth="18-18"):
    return {
        **{"data": "d", "regime": "short", "method": method, "depth": depth, "lr": lr, "seed": seed},
        **{"valid_ppl": valid_ppl, "bleu": None},
    }


def test_a_cell_is_the_best_rate_of_those_with_most_seeds():
    runs = [run("preln", lr, ppl) for lr, ppl in ((0.001, 40.0), (0.002, 30.0), (0.004, 25.0))]
    runs += [run("preln", 0.001, 50.0, seed=2), run("preln", 0.002, 40.0, seed=2)]
    assert study.cell(runs) == "**35.0 ± 7.1** at 0.002; 2 seeds; 45.0 at 0.001; 25.0 at 0.004"
    assert "(edge)" in study.cell(runs[:2]) and "inf at 0.002" in study.cell([runs[0], run("preln", 0.002, None)])


def test_a_table_tells_the_weights_apart():
    rows = [
        run("preln --init-weights fairseq", 0.001, 40.0),
        run("preln --init-weights authors", 0.001, 39.0, depth="6-6"),
    ]
    rows += [run("admin --init-weights authors --admin-margin 16", 0.001, 38.0)]
    text = study.tables(rows, "d", "short")
    assert text.splitlines()[0] == "| weights: the authors' | 6-6 | 18-18 |"
    assert text.splitlines()[2:4] == [
        "| Pre-LN | **39.0** at 0.001; 1 seed |  |",
        "| Admin, K = 16 (default) |  | **38.0** at 0.001; 1 seed |",
    ]
    assert study.tables(rows, "d", "paper") == ""


def test_the_plan_is_of_methods_that_have_names():
    for part in study.PLAN:
        assert {*part.methods.split(",")} <= study.NAMES.keys()
        assert part.regime in study.REGIMES
