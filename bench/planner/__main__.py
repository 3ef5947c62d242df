"""``python -m bench.planner`` writes the comparison with the public simulator into docs/planning.md.

``python -m bench.planner headline [--quick] [--profile honest] [--workers N]`` prints the paper's headline table.

``python -m bench.planner pictures`` draws those of README.md and docs/planning.md anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.planner import headline, pictures, reference
from planner.results import Profile

_DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
_BEGIN, _END = "<!-- written by python -m bench.planner -->\n", "<!-- end -->\n"
# Differs from run to run.
_LEFT_OUT = "ms per request"


def _markdown(rows: list[dict[str, object]]) -> str:
    columns = [column for column in dict.fromkeys(column for row in rows for column in row) if column != _LEFT_OUT]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row.get(column, "-")) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", nargs="?", choices=("reference", "headline", "pictures"), default="reference")
    parser.add_argument("--quick", action="store_true", help="headline: a tenth of the machines")
    parser.add_argument("--profile", choices=[each.value for each in Profile], default=Profile.COMPAT.value)
    parser.add_argument("--workers", type=int, default=1, help="headline: processes")
    given = parser.parse_args()
    if given.table == "headline":
        print(_markdown(headline.table(Profile(given.profile), given.quick, given.workers)), end="")
        return
    if given.table == "pictures":
        print("\n".join(map(str, pictures.write())))
        return
    before, rest = _DOCUMENT.read_text(encoding="utf-8").split(_BEGIN)
    _, after = rest.split(_END)
    table = _markdown(reference.table(quick=False))
    _DOCUMENT.write_text(before + _BEGIN + table + _END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
