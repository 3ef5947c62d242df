"""Writes deploy/prometheus/rules as the PrometheusRule of the Prometheus Operator; ``check`` fails if it is stale.

python scripts/prometheus_rule.py [check]
"""

from __future__ import annotations

import sys
from pathlib import Path

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
TARGET = DEPLOY / "kubernetes" / "components" / "prometheus-operator" / "rules.yaml"
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


def written() -> str:
    """The text of all groups as it stands in the rule files, further in."""
    text = HEAD
    for name in ("recording.yml", "alerts.yml"):
        _, _, groups = (DEPLOY / "prometheus" / "rules" / name).read_text().partition("\ngroups:\n")
        text += "".join(f"  {line}\n" if line else "\n" for line in groups.splitlines())
    return text


def main() -> None:
    text = written()
    if sys.argv[1:] != ["check"]:
        TARGET.write_text(text)
    elif TARGET.read_text() != text:
        raise SystemExit(f"{TARGET} is not what the rules are: run `python scripts/prometheus_rule.py`")


if __name__ == "__main__":
    main()
