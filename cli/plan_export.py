"""`baton plan export`: a plan as manifests."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.errors import BadConfig, quoted
from baton.types import Role
from cli import preflight
from cli.options import path
from cli.planning import range_of, warn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.export import Planned
    from planner.machines import Machine

_OVERLAY = Path("deploy") / "kubernetes" / "overlays" / "nvidia"
_FILE = "kustomization.yaml"
Design = list[str] | None


def export(
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="As a kustomize overlay for deploy/kubernetes; the only form.")
    ] = False,
    plan: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="The plan.json of `baton plan search --out`.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Of the plan's kinds of designs, such as 'h100-80gb mixed'; without it the best one.")
    ] = "",
    prompt: Annotated[
        Design, typer.Option(metavar="MACHINE:COUNT", help="In place of --plan: machines for prompts.")
    ] = None,
    token: Annotated[Design, typer.Option(metavar="MACHINE:COUNT", help="Machines for tokens.")] = None,
    mixed: Annotated[Design, typer.Option(metavar="MACHINE:COUNT", help="Machines for both.")] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, max=1024, help="GPUs of a pod; without it the plan's, or the machine's.")
    ] = None,
    prompt_count: Annotated[
        str | None,
        typer.Option(
            metavar="MIN-MAX", help="Machines that the pool scales between; without it, it stays as planned. Never "
            "beyond the plan's maxima.",
        ),
    ] = None,
    tokens_count: Annotated[str | None, typer.Option("--token-count", metavar="MIN-MAX", help="Likewise.")] = None,
    mixed_count: Annotated[str | None, typer.Option(metavar="MIN-MAX", help="Likewise.")] = None,
    overlay: Annotated[
        Path, typer.Option(parser=path, metavar="FOLDER", help="What it changes: cpu, nvidia, rdma, or your own.")
    ] = _OVERLAY,
    machine_label: Annotated[
        str, typer.Option(metavar="KEY", help="A label of the Kubernetes nodes whose value is the machine type.")
    ] = "",
    machines: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Machine types of your own, in TOML.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", parser=path, metavar="FOLDER", help=f"Write {_FILE} there; without it, print it."),
    ] = None,
) -> None:  # fmt: skip
    """Write how many pods each pool has, and between which numbers it scales."""
    if not kubernetes:
        raise BadConfig("no form is asked for, expected --kubernetes", param="--kubernetes")
    if not (overlay / _FILE).is_file():
        raise BadConfig(
            f"--overlay is {quoted(str(overlay))}, which has no {_FILE}; expected an overlay such as {_OVERLAY}",
            param="--overlay",
        )
    if out is not None:
        preflight.writable_folder(out, "--out")
    from planner import export as exported
    from planner import machines as catalogue

    known = catalogue.catalogue(machines)
    designs = (prompt, token, mixed)
    planned = _planned(known, plan, kind, designs, tp)
    asked = ((Role.PREFILL, prompt_count, "--prompt-count"), (Role.DECODE, tokens_count, "--token-count"),
             (Role.MIXED, mixed_count, "--mixed-count"))  # fmt: skip
    pools = exported.pools(planned, {role: range_of(text, option) for role, text, option in asked if text is not None})
    for warning in exported.warnings(pools, machine_label):
        warn(warning)
    base = os.path.relpath(overlay.resolve(), (out or Path.cwd()).resolve())
    text = exported.overlay(planned, pools, base, machine_label)
    if out is None:
        typer.echo(text, nl=False)
        return
    (out / _FILE).write_text(text, encoding="utf-8")
    typer.echo(f"wrote {out / _FILE}; `kubectl apply -k {out}` applies it")


def _planned(
    known: Mapping[str, Machine], plan: Path | None, kind: str, designs: tuple[Design, Design, Design], tp: int | None
) -> Planned:
    from planner import design
    from planner.export import Planned, read

    is_given = any(designs)
    if (plan is None) != is_given or (kind and plan is None):
        raise BadConfig(
            "expected either --plan, with which --kind may go, or a design by --prompt and --token, or by --mixed",
            param="--plan",
        )
    if plan is not None:
        found = read(plan, known, kind)
        return found if tp is None else replace(found, tensor_parallel=tp)
    prompt, token, mixed = (each or () for each in designs)
    asked = design.parse(known, prompt=prompt, token=token, mixed=mixed)
    return Planned(asked, asked.name, tp)
