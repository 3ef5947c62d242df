"""``python -m bench.planner reference`` writes the comparison with the public simulator into docs/planning.md.

``python -m bench.planner headline`` runs the paper's headline comparison in one profile and saves it in bench/results,
question by question; ``python -m bench.planner document FILE ...`` writes saved ones into docs/planning.md.

``python -m bench.planner speed [--quick]`` measures what a simulated request costs in both profiles.
``python -m bench.planner pictures`` draws those of README.md and docs/planning.md anew.
``python -m bench.planner validate [--only WORDS] [--seconds S] [--minutes M]`` measures clusters and predicts them;
``python -m bench.planner accuracy FILE`` writes what that saved into docs/planning.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import measure
from bench.planner import headline, pictures, reference, speed, validate
from loadgen import machine
from planner.results import Profile

_ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = _ROOT / "docs" / "planning.md"
RESULTS = _ROOT / "bench" / "results"
# Differs from run to run.
_LEFT_OUT = "ms per request"
_QUICK = headline.Scale(num_h100=4, seconds=10.0)


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    listed = list(rows)
    columns = [column for column in dict.fromkeys(column for row in listed for column in row) if column != _LEFT_OUT]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row.get(column, "-")) for column in columns) + " |" for row in listed]
    return "\n".join(lines) + "\n"


def written(document: str, name: str, text: str) -> str:
    """The document with a text between the marks of this name."""
    begin, end = f"<!-- written by python -m bench.planner {name} -->\n", "<!-- end -->\n"
    before, rest = document.split(begin)
    _, after = rest.split(end, 1)
    return before + begin + text + end + after


def headline_text(files: Iterable[Path]) -> str:
    rows = [row for file in files for row in json.loads(file.read_text())["results"]]
    return "\n".join(markdown(table) for table in headline.documented(rows) if table)


def accuracy_text(record: Mapping[str, Any]) -> str:
    """What was measured when, the errors of all loads, and each load."""
    found, parts = record["results"], []
    about = [record["date"], f"{record['machine']['num_cpus']} processors", f"{record['seconds']:g} s a load"]
    about += [f"other work took {of['other_cores']:.2f} of them while {name} was profiled"
              for name, of in found["profiles"].items()]  # fmt: skip
    if found["left out"]:
        about.append(f"left out: {', '.join(found['left out'])}")
    parts.append("; ".join((*about, *filter(None, [record["note"]]))) + ".\n")
    parts += [markdown(table) for table in (found["summary"], found["table"]) if table]
    return "\n".join(parts)


def _headline(profile: Profile, scale: headline.Scale, workers: int, folder: Path) -> None:
    started = datetime.now(UTC)
    path = folder / f"planner-headline-{profile.value}-{started.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    record = {
        "date": started.isoformat(timespec="seconds"), "commit": measure.commit(), "machine": measure.machine(),
        "versions": machine.versions(), "scale": asdict(scale), "results": [],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[headline.Row] = []
    for found in headline.table(profile, scale, workers):
        rows += found
        print(markdown(found), flush=True)
        # It takes long: what was found is kept.
        seconds = (datetime.now(UTC) - started).total_seconds()
        path.write_text(json.dumps(record | {"seconds": seconds, "results": rows}, indent=1) + "\n")
    print(f"saved {path}")


def main() -> None:
    if sys.argv[1:2] == ["validate"]:
        validate.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("reference")
    commands.add_parser("pictures")
    commands.add_parser("speed").add_argument("--quick", action="store_true", help="few machines, a minute of trace")
    document = commands.add_parser("document")
    document.add_argument("files", nargs="+", type=Path)
    commands.add_parser("accuracy").add_argument("file", type=Path)
    asked = commands.add_parser("headline")
    asked.add_argument("--quick", action="store_true", help="a tenth of the machines")
    asked.add_argument("--profile", choices=[each.value for each in Profile], default=Profile.COMPAT.value)
    asked.add_argument("--workers", type=int, default=1, help="processes")
    asked.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    asked.add_argument("--traces", nargs="+", choices=headline.Scale().traces, help="both, if nothing is said")
    asked.add_argument("--seconds", type=float, help="of the drawn trace; the paper has 60")
    asked.add_argument("--rate-step", type=float, help="rates are multiples of it")
    asked.add_argument("--prompt-step", type=int, help="every so many prompt machines are tried")
    asked.add_argument("--compared", nargs="+", choices=headline.Scale().compared, help="all, if nothing is said")
    given = parser.parse_args()
    if given.command == "headline":
        own = {name: getattr(given, name) for name in ("traces", "seconds", "rate_step", "prompt_step", "compared")}
        scale = replace(
            _QUICK if given.quick else headline.Scale(),
            **{name: value for name, value in own.items() if value is not None},
        )
        _headline(Profile(given.profile), scale, given.workers, given.out)
        return
    if given.command == "speed":
        for row in speed.table(given.quick):
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        return
    if given.command == "pictures":
        print("\n".join(map(str, pictures.write())))
        return
    if given.command == "document":
        name, text = "document", headline_text(given.files)
    elif given.command == "accuracy":
        name, text = "accuracy", accuracy_text(json.loads(given.file.read_text()))
    else:
        name, text = "reference", markdown(reference.table(quick=False))
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), name, text), encoding="utf-8")


if __name__ == "__main__":
    main()
