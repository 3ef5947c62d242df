"""Describes an error in a command line in one sentence, with a suggestion of what was probably meant."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
import typer.core

from baton.spelling import meant
from cli.vllm_flags import Refused, translated

# By way of a class that Typer exports: newer ones bring a click of their own.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(typer.core.TyperGroup):
    """Names an unknown command by what it resembles."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}{meant(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


class Serving(typer.core.TyperCommand):
    """Takes the options of `vllm serve` as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        flags: set[str] = set(ctx.help_option_names)
        valued: set[str] = set()
        for parameter in self.params:
            kind = flags if getattr(parameter, "is_flag", False) else valued
            kind.update(parameter.opts, parameter.secondary_opts)
        try:
            args = translated(args, flags, valued)
        except Refused as refused:
            ctx.fail(str(refused))
        return super().parse_args(ctx, args)


def explain(error: Any) -> str:
    """``error`` is a UsageError."""
    context = error.ctx
    asked = f"`{context.command_path} --help` lists what there is" if context is not None else ""
    option = getattr(error, "option_name", "")
    if context is None or not hasattr(error, "possibilities"):
        text = " ".join(error.format_message().split()).rstrip(".")
    else:
        text = f"No such option {option}{meant(option, _options(context.command)) or _elsewhere(option, context)}"
    return "; ".join(filter(None, (text, asked)))


def _options(command: Any) -> list[str]:
    return [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]


def _elsewhere(option: str, context: Any) -> str:
    commands: Mapping[str, Any] = getattr(context.parent and context.parent.command, "commands", {})
    having = [name for name, command in commands.items() if option in _options(command)]
    return f", which is one of {', '.join(having)}" if having else ""


def program() -> str:
    """How this command was called, for hints that are copied: `baton` by its path where it is not on PATH."""
    python, *words = sys.orig_argv
    script = next((i for i, word in enumerate(words) if not word.startswith("-")), 0)
    if not words or words[:script][-1:] == ["-m"] or words[script].endswith(".py"):
        return " ".join((_near(python), *words[: script + 1]))
    on_path = shutil.which("baton")
    return "baton" if on_path is not None and Path(on_path).samefile(words[script]) else _near(words[script])


def _near(path: str) -> str:
    """The path from the current folder, if it lies inside."""
    return os.path.relpath(path) if Path(path).is_relative_to(os.getcwd()) else path
