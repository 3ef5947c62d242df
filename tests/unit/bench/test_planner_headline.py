"""The paper's headline comparison, on few machines, and its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

from bench.planner import headline
from bench.planner.__main__ import DOCUMENT, RESULTS, headline_text, written
from planner import machines
from planner.results import Profile

SMALL = headline.Scale(num_h100=2, seconds=4.0)


def test_every_kind_is_compared_within_the_budgets_and_at_the_same_rate(tmp_path: Path) -> None:
    questions = list(headline.table(Profile.COMPAT, SMALL, workers=1))
    rows = list(chain(*questions))
    h100 = machines.catalogue()["h100-80gb"]
    assert {tuple(row["design"] for row in found) for found in questions} == {tuple(headline.kinds())}
    for compared, column, limit in (
        ("same power", "power_units", 2 * h100.power_units),
        ("same cost", "dollars_per_hour", 2 * h100.machine_dollars_per_hour),
    ):
        found = [row for row in rows if row["compared"] == compared]
        assert {row["trace"] for row in found} == {"conv", "code"}
        assert any("rate" in row for row in found)
        assert all(row[column] <= limit * (1 + 1e-9) for row in found if "rate" in row)
    own = [row for row in rows if row["compared"].startswith("least") and row["design"] == "Baseline-H100"]
    assert own
    assert all(row["cost_over_H100"] == row["power_over_H100"] == 1 for row in own)

    file = tmp_path / "saved.json"
    file.write_text(json.dumps({"results": rows}))
    text = headline_text([file])
    assert "| conv | same power | HA | 25, 26 |" in text
    assert "cost, power over H100" in text
    assert len(text.splitlines()) == len(rows) + 2 * 2 + 1


def test_one_comparison_has_the_rows_that_it_has_among_all() -> None:
    scale = replace(SMALL, traces=("code",))
    rows = [row for found in headline.table(Profile.COMPAT, scale, workers=1) for row in found]
    (found,) = headline.table(Profile.COMPAT, replace(scale, compared=("least cost",)), workers=1)
    assert found == [row for row in rows if row["compared"] == "least cost"]


def test_a_table_is_written_between_its_marks() -> None:
    document = "a\n<!-- written by python -m bench.planner x -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    assert written(document, "x", "new\n") == document.replace("old", "new")


def test_the_document_has_the_saved_results() -> None:
    files = sorted(RESULTS.glob("planner-headline-*.json"))
    assert files
    document = DOCUMENT.read_text(encoding="utf-8")
    assert written(document, "document", headline_text(files)) == document
