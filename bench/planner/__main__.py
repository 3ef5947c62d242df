"""``python -m bench.planner`` writes the comparison with the public simulator into docs/planning.md."""

from __future__ import annotations

from pathlib import Path

from bench.planner import reference

_DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "planning.md"
_BEGIN, _END = "<!-- written by python -m bench.planner -->\n", "<!-- end -->\n"
# Differs from run to run.
_LEFT_OUT = "ms per request"


def _markdown(rows: list[dict[str, object]]) -> str:
    columns = [column for column in rows[0] if column != _LEFT_OUT]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    before, rest = _DOCUMENT.read_text(encoding="utf-8").split(_BEGIN)
    _, after = rest.split(_END)
    table = _markdown(reference.table(quick=False))
    _DOCUMENT.write_text(before + _BEGIN + table + _END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
