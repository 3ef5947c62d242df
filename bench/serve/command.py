"""``python -m bench serve``: runs a scenario within a time limit; saves its record and its pictures."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.errors import Unavailable
from bench import measure
from bench import model as bench_model
from bench.serve import burst, overload, replay, table, uneven
from bench.serve.turns import Result, Setting
from loadgen import machine

_ROOT = Path(__file__).resolve().parents[2]
_DEMO_MODEL = _ROOT / "demo" / "model"
# Of every cluster: prompts are never the same, so a prefix cache would only cost.
_OPTIONS = ("--kv-mib", "1024", "--dtype", "bfloat16", "--prefix-cache", "off")
_QUICK_OPTIONS = ("--kv-mib", "64", "--prefix-cache", "off")

SCENARIOS: dict[str, Callable[[Setting], Coroutine[Any, Any, Result]]] = {
    "table": table.run, "replay": replay.run, "burst": burst.run, "overload": overload.run, "uneven": uneven.run,
}  # fmt: skip
# Beyond the minutes, to stop a cluster and draw what was measured.
_GRACE_S = 60.0
# Of a run for the record on two cores: three rounds of the table, two of the replay.
_MINUTES = {"table": 70.0, "replay": 50.0, "burst": 15.0, "overload": 15.0, "uneven": 15.0}


def main(arguments: Sequence[str], results: Path) -> None:
    args = _parse(arguments, results)
    # Treated as Ctrl-C: the clusters are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=None if sys.stdout.isatty() else 200)
    model = str(args.model or (_DEMO_MODEL if args.quick else bench_model.bench_model()))
    setting = Setting(
        model=model, options=_QUICK_OPTIONS if args.quick else _OPTIONS, minutes=args.minutes, rounds=args.rounds,
        seconds=args.seconds, share=0.1 if args.quick else 1.0, only=args.only, console=console,
    )  # fmt: skip
    started = datetime.now(UTC)
    facts: dict[str, Any] = {
        "scenario": args.scenario, "date": started.isoformat(timespec="seconds"), "quick": args.quick,
        "commit": measure.commit(), "machine": measure.machine(), "versions": machine.versions(),
        "model": Path(model).name, "minutes": args.minutes, "seconds": args.seconds,
    }  # fmt: skip
    result = asyncio.run(_within(SCENARIOS[args.scenario](setting), setting))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"serve-{args.scenario}-{started.strftime('%Y-%m-%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(facts | {"results": result.record}, indent=1) + "\n")
    console.print(f"saved {path}", highlight=False, soft_wrap=True)
    args.images.mkdir(parents=True, exist_ok=True)
    for name, picture in result.pictures.items():
        (args.images / f"{name}.svg").write_text(picture)
        console.print(f"saved {args.images / name}.svg", highlight=False, soft_wrap=True)


async def _within(scenario: Coroutine[Any, Any, Result], setting: Setting) -> Result:
    """Raises Unavailable if it takes longer than its minutes; scenarios with turns end by themselves before."""
    try:
        async with asyncio.timeout(setting.minutes * 60 + _GRACE_S):
            return await scenario
    except TimeoutError as error:
        raise Unavailable(f"not done in {setting.minutes:g} minutes; give it more with --minutes") from error


def _parse(arguments: Sequence[str], results: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--quick", action="store_true", help="the demo's model and a tenth of all; not for the record")
    parser.add_argument("--model", type=Path, help="default: the bench model, made on first use; quick: the demo's")
    parser.add_argument("--minutes", type=float, help="no turn is begun that would end later; default: of the scenario")
    parser.add_argument("--rounds", type=int, help="default: 3, quick: 1")
    parser.add_argument("--seconds", type=float, help="of each open loop; default: 60, quick: 5")
    parser.add_argument(
        "--only", type=_names, default=(), metavar="A,B", help="configurations so named, or whose names contain it"
    )
    parser.add_argument("--out", type=Path, default=results, help="folder of the JSON file")
    parser.add_argument("--images", type=Path, help="folder of the pictures; default: docs/images, quick: --out")
    args = parser.parse_args(list(arguments))
    quick: bool = args.quick
    args.minutes = args.minutes or (5.0 if quick else _MINUTES[args.scenario])
    args.rounds = args.rounds or (1 if quick else 3)
    args.seconds = args.seconds or (5.0 if quick else 60.0)
    args.images = args.images or (args.out if quick else _ROOT / "docs" / "images")
    if args.rounds < 1 or args.minutes <= 0 or args.seconds <= 0:
        parser.error("--rounds, --minutes and --seconds: expected numbers above 0")
    return args


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
