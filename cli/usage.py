"""What is wrong with a command line, in one sentence, and what was probably meant: by spelling alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import typer
import typer.core

# By way of a class that Typer exports: newer ones bring a click of their own.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(typer.core.TyperGroup):
    """Names an unknown command by what it resembles."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}{_meant(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


def explain(error: Any) -> str:
    """``error`` is a UsageError."""
    context = error.ctx
    asked = f"`{context.command_path} --help` lists what there is" if context is not None else ""
    option = getattr(error, "option_name", "")
    if context is None or not hasattr(error, "possibilities"):
        text = " ".join(error.format_message().split()).rstrip(".")
    else:
        text = f"No such option {option}{_meant(option, _options(context.command)) or _elsewhere(option, context)}"
    return "; ".join(filter(None, (text, asked)))


def _options(command: Any) -> list[str]:
    return [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]


def _elsewhere(option: str, context: Any) -> str:
    commands: Mapping[str, Any] = getattr(context.parent and context.parent.command, "commands", {})
    having = [name for name, command in commands.items() if option in _options(command)]
    return f", which is one of {', '.join(having)}" if having else ""


def _meant(word: str, known: Iterable[str]) -> str:
    """Those that one slip for every three letters turns into ``word``."""
    bare = word.lstrip("-")
    distances = {name: _distance(bare, name.lstrip("-")) for name in known if name.startswith("-") == (word[0] == "-")}
    nearest = min(distances.values(), default=0)
    if nearest > max(1, len(bare) // 3):
        return ""
    near = [name for name, distance in distances.items() if distance == nearest]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _distance(a: str, b: str) -> int:
    """Letters changed, left out, put in, or swapped with their neighbour (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        oldest, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and (x, y) == (b[j - 2], a[i - 2]):
                cost = min(cost, oldest[j - 2] + 1)
            row.append(cost)
    return row[-1]
