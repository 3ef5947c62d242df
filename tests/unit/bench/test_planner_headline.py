"""The paper's headline comparison, on few machines."""

from __future__ import annotations

from bench.planner import headline
from planner import machines
from planner.results import Profile


def test_every_kind_is_compared_within_the_budgets() -> None:
    rows = headline.table(Profile.COMPAT, quick=True, workers=1)
    h100 = machines.catalogue()["h100-80gb"]
    names = {"Baseline-A100", "Baseline-H100", "AA", "HH", "HA", "HHcap"}
    for trace in ("conv", "code"):
        for compared, column, limit in (
            ("same power", "power units", 4 * h100.power_units),
            ("same cost", "$/hour", 4 * h100.machine_dollars_per_hour),
        ):
            found = [row for row in rows if (row["trace"], row["compared"]) == (trace, compared)]
            assert {row["design"] for row in found} == names
            assert all(float(row[column]) <= limit + 0.5 for row in found if row[column] != "-")
    least = [row for row in rows if row["compared"].startswith("least")]
    own = [row for row in least if row["design"] == "Baseline-H100"]
    assert own
    assert all(float(row["cost over Baseline-H100"]) <= 1 for row in own)
