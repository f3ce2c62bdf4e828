"""The tables that benchmarks write into the docs say what was measured."""

import sys

import pytest

from tests.run_tools import ROOT


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import miniature_tables

    return miniature_tables


def scored(right: float, shuffled: float, cider: float = 0.1) -> dict:
    return {"loss_right": right, "loss_shuffled": shuffled, "cider": cider, "blind_cider": 0.05}


FOUND = {
    "TomeFormer": {
        "sweep": [
            {"init_lr": 1e-3, "body": 0.02, "steps": 100, "val": scored(3.5, 3.6)},
            {"init_lr": 2.5e-3, "body": 0.1, "steps": 100, "val": scored(3.4, 3.6)},
        ],
        "runs": [
            {"name": f"run{n}", "steps": 240, "steps_ahead": 0, "test": scored(right, 3.5, cider), "trains": 11_200_000,
             "seconds": 60.0 * n, "macs": 2e14}
            for n, (right, cider) in enumerate([(3.3, 0.1), (3.2, 0.2), (3.1, 0.3)], 1)
        ],
    },
    "two stages": {
        "sweep": [{"init_lr": 1e-3, "body": 1.0, "steps": 40, "val": scored(3.7, 3.7)}],
        "runs": [{"name": "x", "steps": 72, "steps_ahead": 224, "test": scored(3.0, 3.0), "trains": 9,
                  "seconds": 7200.0, "macs": 1e12}],
    },
}  # fmt: skip


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]


def test_scores_are_mean_least_and_most_over_seeds(tables):
    header, _, tome, _ = rows(tables.scores_table(FOUND))
    assert dict(zip(header, tome, strict=True)) == {
        "connector": "TomeFormer", "CIDEr": "0.200 (0.100 to 0.300)", "blind CIDEr": "0.050 (0.050 to 0.050)",
        "loss, right picture": "3.200 (3.100 to 3.300)", "loss, shuffled": "3.500 (3.500 to 3.500)",
        "gap, nats/token": "0.300 (0.200 to 0.400)",
    }  # fmt: skip


def test_costs_count_both_stages(tables):
    _, _, one, two = rows(tables.costs_table(FOUND))
    assert one == ["TomeFormer", "11.2M", "240", "2 min", "200 T"]
    assert two == ["two stages", "0.0M", "224 + 72", "2 h", "1 T"]


def test_the_rate_taken_is_the_one_in_bold(tables):
    losses = {line[1]: line[4] for line in rows(tables.sweep_table(FOUND))[2:4]}
    assert losses == {"0.001": "3.500", "0.0025": "**3.400**"}


def test_only_what_is_between_the_marks_is_written(tables, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{tables.START}\nold\n{tables.END}\n\nAfter.\n")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "read_runs", lambda folders: [type("Run", (), {"rows": []})])
    monkeypatch.setattr(tables, "comparison_plot", lambda *_: None)
    for _ in range(2):
        tables.write_page(FOUND, tmp_path)
        text = page.read_text()
        assert text.startswith("# Before\n") and text.endswith(f"{tables.END}\n\nAfter.\n") and "old" not in text
        assert text.count("| TomeFormer |") == 4
