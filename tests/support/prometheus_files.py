"""Reads deploy/prometheus and deploy/grafana for tests: every query there is, and what it asks for."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from typing import Any

from tests.support.deploy_files import DEPLOY, load_yaml

PROMETHEUS = DEPLOY / "prometheus"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
IS_INSTALLED = bool(shutil.which("prometheus") and shutil.which("promtool"))

# A metric's name: not a label, function or keyword. Recorded ones have colons.
_NAME = re.compile(r"\b(?:baton[_:]|vllm:|process_)[a-z0-9_:]+")
_SELECTOR = re.compile(rf"({_NAME.pattern})(?:\{{([^}}]*)\}})?")


@dataclass(frozen=True, slots=True)
class Query:
    where: str
    expr: str

    @property
    def metrics(self) -> set[str]:
        return set(_NAME.findall(re.sub(r'"[^"]*"', "", self.expr)))

    @property
    def selectors(self) -> list[tuple[str, str]]:
        """Metric and what is asked of its labels."""
        return _SELECTOR.findall(self.expr)


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those inside collapsed rows too."""
    found = []
    for panel in dashboard["panels"]:
        found += [panel, *panel.get("panels", [])]
    return found


def panel_queries() -> list[Query]:
    found = []
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in panels(dashboard):
            found += [Query(f"{path.stem}: {panel['title']}", t["expr"]) for t in panel.get("targets", [])]
        found += [
            Query(f"{path.stem}: annotation {note['name']}", note["expr"]) for note in dashboard["annotations"]["list"]
        ]
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in load_yaml(path)["groups"] for rule in group["rules"]]


def rule_queries() -> list[Query]:
    return [Query(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def filled_in(query: Query) -> str:
    everything = re.sub(r"\$(cluster|model|pool|node)\b", ".*", query.expr)
    return everything.replace("$__rate_interval", "15s").replace("[1m]", "[15s]")
