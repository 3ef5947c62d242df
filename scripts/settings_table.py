"""Writes the settings tables of docs/operating.md from the options of the command line; ``check`` fails if they are
stale.

    python scripts/settings_table.py [check]
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from typer.main import get_command  # noqa: E402

from cli.app import app  # noqa: E402
from router.cluster.membership import MembershipConfig  # noqa: E402
from router.config import LimitsConfig, LinkConfig, WatchConfig  # noqa: E402
from router.flow import FlowConfig  # noqa: E402

DOCUMENT = ROOT / "docs" / "operating.md"
COMMANDS = ("up", "worker", "router")
CONFIGS = (LimitsConfig, FlowConfig, MembershipConfig, LinkConfig, WatchConfig)


def options() -> str:
    """A row for each option; a dash where a command does not have it. Every option has a meaning in one of them."""
    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    rows: dict[str, dict[str, str]] = {}
    meanings: dict[str, str] = {}
    for command in COMMANDS:
        for option in commands[command].params:
            if option.hidden or option.name == "help":
                continue
            name = max(option.opts, key=len)
            rows.setdefault(name, {})[command] = _default(option)
            variable = f" (`{option.envvar}`)" if option.envvar else ""
            if option.help:
                meanings[name] = f"{option.help}{variable}"
    lines = [f"| option | {' | '.join(COMMANDS)} | |", "|---" * (len(COMMANDS) + 2) + "|"]
    for name, found in rows.items():
        cells = (found.get(command, "–") for command in COMMANDS)
        lines.append(f"| `{name}` | {' | '.join(cells)} | {meanings[name].replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def built_in() -> str:
    """Settings without an option: for those who embed the router."""
    lines = ["| in `RouterConfig` | default |", "|---|---|"]
    for config in CONFIGS:
        values = ", ".join(f"{f.name} {_value(f)}" for f in fields(config))
        lines.append(f"| `{config.__name__}` | {values} |")
    return "\n".join(lines)


def _value(setting: Field[Any]) -> str:
    value = setting.default if setting.default is not MISSING else "computed"
    return str(value)


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = getattr(option.default, "value", option.default)
    return f"`{value}`" if value not in (None, "", ()) else "none"


def filled(text: str) -> str:
    for name, table in (("options", options()), ("built-in", built_in())):
        begin, end = f"<!-- {name}: written by scripts/settings_table.py -->\n", f"\n<!-- end of {name} -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise SystemExit(f"{DOCUMENT} has no place for {name!r}")
        text = head + begin + table + end + tail
    return text


def main() -> None:
    text = DOCUMENT.read_text()
    fresh = filled(text)
    if sys.argv[1:] == ["check"]:
        if fresh != text:
            raise SystemExit("docs/operating.md is not what the options are: run `python scripts/settings_table.py`")
    else:
        DOCUMENT.write_text(fresh)


if __name__ == "__main__":
    main()
