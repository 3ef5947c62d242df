"""Writes deploy/prometheus/rules as the PrometheusRule of the Prometheus Operator; ``check`` fails if it is stale.

    python scripts/prometheus_rule.py [check | --docs-url URL]

``--docs-url`` is the URL of docs/: alerts link to it, here and in the rule files, unless Prometheus has the external
label ``baton_docs``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
ALERTS = Path("prometheus") / "rules" / "alerts.yml"
RECORDS = Path("prometheus") / "rules" / "recording.yml"
TARGET = Path("kubernetes") / "components" / "prometheus-operator" / "rules.yaml"
# The prefix of each alert's runbook_url.
DOCS = re.compile(r'(\$externalLabels\.baton_docs ")([^"]*)(")')
URL = re.compile(r"https?://[^\s\"'{}]+")
HEAD = """\
# Written by scripts/prometheus_rule.py from deploy/prometheus/rules. Add the labels by which your Prometheus selects.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: baton
  namespace: baton
  labels: {app.kubernetes.io/part-of: baton}
spec:
  groups:
"""


def written(deploy: Path) -> str:
    """The text of all groups of the rule files, indented."""
    text = HEAD
    for path in (RECORDS, ALERTS):
        _, _, groups = (deploy / path).read_text().partition("\ngroups:\n")
        text += "".join(f"  {line}\n" if line else "\n" for line in groups.splitlines())
    return text


def link_to(deploy: Path, url: str) -> None:
    """Make every alert link to the documents at ``url``."""
    if not URL.fullmatch(url):
        raise SystemExit(f"--docs-url is {url!r}, expected http:// or https:// and where docs/runbook.md lies")
    path = deploy / ALERTS
    path.write_text(DOCS.sub(lambda found: f"{found[1]}{url.rstrip('/')}{found[3]}", path.read_text()))


def main(arguments: list[str] | None = None, deploy: Path = DEPLOY) -> None:
    parser = argparse.ArgumentParser(description="Write the rules for the Prometheus Operator.")
    parser.add_argument("verb", nargs="?", choices=["check"], help="only look whether they are stale")
    parser.add_argument("--docs-url", default="", help="where docs/ is to be read, for the links of all alerts")
    told = parser.parse_args(arguments)
    if told.docs_url:
        link_to(deploy, told.docs_url)
    target, text = deploy / TARGET, written(deploy)
    if told.verb is None:
        target.write_text(text)
    elif target.read_text() != text:
        raise SystemExit(f"{target} is not what the rules are: run `python scripts/prometheus_rule.py`")


if __name__ == "__main__":
    main()
