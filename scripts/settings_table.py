"""Writes the settings of docs/operating.md from the dataclasses that hold them; ``check`` fails if they are stale.

python scripts/settings_table.py [check]
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from baton.settings import Key  # noqa: E402
from cli import router, up, worker  # noqa: E402
from cli.launch.options import ClusterOptions  # noqa: E402
from cli.options import Options, default_shown  # noqa: E402
from router.config import RouterConfig  # noqa: E402
from worker.config import WorkerConfig  # noqa: E402

DOCUMENT = ROOT / "docs" / "operating.md"
COMMANDS = {"up": up.OPTIONS, "worker": worker.OPTIONS, "router": router.OPTIONS}


def options() -> str:
    """A row for each option; a dash where a command does not have it."""
    rows: dict[str, dict[str, Key]] = {}
    for command, settings in COMMANDS.items():
        for key in settings.options.values():
            if not key.about.is_hidden:
                rows.setdefault(key.option, {})[command] = key
    lines = [f"| option | {' | '.join(COMMANDS)} | in a file | |", "|---" * (len(COMMANDS) + 3) + "|"]
    for name, found in rows.items():
        about = next(iter(found.values())).about
        defaults = (_shown(default_shown(found[command])) if command in found else "–" for command in COMMANDS)
        # Without the prefix that the keys of workers and the router have for `up`.
        own = [key for command, key in found.items() if command != "up"] or list(found.values())
        paths = ", ".join(f"`{path}`" for path in dict.fromkeys(key.path for key in own))
        variable = f" (`{about.variable}`)" if about.variable else ""
        also = f" Also {', '.join(f'`{alias}`' for alias in about.aliases)}." if about.aliases else ""
        lines.append(f"| `{name}` | {' | '.join(defaults)} | {paths} | {_cell(about.help + variable + also)} |")
    return "\n".join(lines)


def file_only(settings: Options, config: type) -> str:
    """A row for each setting without an option. Its meaning is the comment above its field."""
    meanings = dict(_meanings(config))
    lines = ["| setting | default | |", "|---|---|---|"]
    for key in settings.keys:
        if not key.about.flag and not key.path.startswith(("worker.", "router.")):
            default = "computed" if key.is_computed else _shown(key.default)
            lines.append(f"| `{key.path}` | {default} | {_cell(meanings.get(key.path, ''))} |")
    return "\n".join(lines)


def _meanings(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The comment above each field of a dataclass, and of those nested in it."""
    comment: list[str] = []
    for line in inspect.getsource(config).splitlines():
        field = re.match(r" {4}(\w+): ", line)
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # "))
            continue
        if field is not None:
            yield prefix + field[1], " ".join(comment)
        comment = []
    for name, hint in get_type_hints(config).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _meanings(hint, f"{prefix}{name}.")


def _shown(value: object) -> str:
    if value is inspect.Parameter.empty or value is MISSING:
        return "required"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return f"`{value}`" if value not in (None, "", ()) else "none"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def filled(text: str) -> str:
    tables = {
        "options": options(),
        "settings of up": file_only(up.OPTIONS, ClusterOptions),
        "settings of a worker": file_only(worker.OPTIONS, WorkerConfig),
        "settings of the router": file_only(router.OPTIONS, RouterConfig),
    }
    for name, table in tables.items():
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
            raise SystemExit("docs/operating.md is not what the settings are: run `python scripts/settings_table.py`")
    else:
        DOCUMENT.write_text(fresh)


if __name__ == "__main__":
    main()
