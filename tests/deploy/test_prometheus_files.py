"""Prometheus' and Grafana's files: valid, about metrics that exist, every alert tested and explained."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.deploy_files import DEPLOY, load_yaml
from tests.support.prometheus_files import (
    DASHBOARDS,
    IS_INSTALLED,
    PROMETHEUS,
    RULES,
    Query,
    alerts,
    panel_queries,
    panels,
    rule_queries,
    rules,
)
from tests.support.root import ROOT

needs_promtool = pytest.mark.skipif(not IS_INSTALLED, reason="promtool is not installed")
RUNBOOK = ROOT / "docs" / "runbook.md"
METRICS_DOC = ROOT / "docs" / "metrics.md"
QUERIES = [*panel_queries(), *rule_queries()]


def promtool(*arguments: str, folder: Path = PROMETHEUS) -> None:
    # Each group of rules has a database of its own: collecting garbage rarely saves a quarter of the time.
    env = os.environ | {"GOGC": "800"}
    done = subprocess.run(
        ["promtool", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_config_and_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", *(str(path) for path in RULES))


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", "tests/alerts.yml")


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    fired = {
        case["alertname"]
        for test in load_yaml(PROMETHEUS / "tests" / "alerts.yml")["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == {alert["alert"] for alert in alerts()}


def test_every_alert_has_a_paragraph_in_the_runbook() -> None:
    written = re.findall(r"^## (Baton\w+)$\n\n(.+?)(?=^## |\Z)", RUNBOOK.read_text(), re.M | re.S)
    assert {name for name, _ in written} == {alert["alert"] for alert in alerts()}
    assert all(len(text.split()) > 30 for _, text in written)
    for alert in alerts():
        # An absolute address, whose beginning is the operator's; promtool's tests have what comes out.
        base = '{{ or $externalLabels.baton_docs "https://baton.example/docs" }}'
        assert alert["annotations"]["runbook_url"] == f"{base}/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"] in ({"severity": "page"}, {"severity": "ticket"})


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.where)
def test_queries_ask_for_metrics_that_exist(query: Query) -> None:
    documented = set(re.findall(r"^\| `([a-z0-9_:]+)` \|", METRICS_DOC.read_text(), re.M))
    histograms = set(re.findall(r"^\| `([a-z0-9_:]+)` \| histogram", METRICS_DOC.read_text(), re.M))
    series = {f"{name}{end}" for name in histograms for end in ("_bucket", "_sum", "_count")}
    known = (documented - histograms) | series | {rule["record"] for rule in rules() if "record" in rule}
    assert query.metrics - known == set()
    assert query.metrics or "up{" in query.expr


# What each router sees whole: a sum over routers counts it twice.
SEEN = ("baton_nodes", "baton_node_losses_total", "baton_node_drains_total", "baton_ready")
_AGGREGATE = r"(?:(?:max|min|group|count) by \([^)]*\) |min|max|sum by \([^)]*\binstance\) )\("
ONCE = re.compile(rf"{_AGGREGATE}(?:(?:increase|rate|changes|\w+_over_time)\()?$")


@pytest.mark.parametrize("query", [q for q in QUERIES if q.metrics & set(SEEN)], ids=lambda query: query.where)
def test_what_every_router_sees_is_not_summed_over_routers(query: Query) -> None:
    for found in re.finditer("|".join(rf"\b{name}\b" for name in SEEN), query.expr):
        before = query.expr[: found.start()]
        assert ONCE.search(before) or before.endswith("unless on () group(last_over_time("), before


def test_cached_blocks_count_as_free_wherever_used_ones_are_meant() -> None:
    adapter = (DEPLOY / "kubernetes" / "examples" / "prometheus-adapter.yaml").read_text()
    texts = [query.expr for query in QUERIES] + [adapter]
    excluded = [found for text in texts for found in re.findall(r'state!~?"([^"]*)"', text) if "free" in found]
    assert set(excluded) == {"free|cached"}


@pytest.mark.parametrize("query", rule_queries(), ids=lambda query: query.where)
def test_rules_tell_clusters_and_models_apart(query: Query) -> None:
    for labels in re.findall(r"\b(?:sum|min|max|count|group) by \(([^)]*)\)", query.expr):
        assert {"cluster", "model_name"} <= set(labels.split(", ")) or query.where == "BatonNoRouter"
    assert not re.search(r"\b(sum|min|max|avg)\(", query.expr), "an aggregate over all clusters"


NODE_FACTS = {row for row in re.findall(
    r"^\| `([a-z0-9_:]+)` \|", METRICS_DOC.read_text().partition("## Workers: engine")[2], re.M
) if not row.startswith("baton:joules")} | set(
    re.findall(r"^\| `(process_\w+)` \|", METRICS_DOC.read_text(), re.M)
)  # fmt: skip


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.where)
def test_panels_ask_for_the_chosen_cluster_model_and_node(query: Query) -> None:
    records = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    for name, labels in query.selectors:
        wanted = ['cluster=~"$cluster"', 'model_name=~"$model"']
        is_of_nodes = re.sub("_(bucket|sum|count)$", "", name) in NODE_FACTS or "node)" in records.get(name, "")
        if is_of_nodes:
            wanted += ['pool=~"$pool"', 'node=~"$node"']
        assert [part for part in wanted if part not in labels] == [], name


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_have_the_variables_that_their_panels_use(path: Path) -> None:
    listed = json.loads(path.read_text())["templating"]["list"]
    assert [variable["name"] for variable in listed] == ["datasource", "cluster", "model", "pool", "node"]
    for variable in listed[1:]:
        # A router has no node and no pool: everything has to match what is not there.
        assert (variable["includeAll"], variable["allValue"], variable["multi"]) == (True, ".*", True)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_hang_together(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids))
    for panel in panels(dashboard):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "heatmap", panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    spots = {(x, y) for p in panels(dashboard) for x, y in _cells(p["gridPos"])}
    assert len(spots) == sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in panels(dashboard)), "panels overlap"


def _cells(place: dict[str, int]) -> list[tuple[int, int]]:
    return [(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])]


def test_what_has_no_data_without_a_reading_or_a_peak_is_listed() -> None:
    """The cluster test asks all others of a real Prometheus."""
    section = (ROOT / "docs" / "metrics.md").read_text().partition("## Panels and rules without data")[2]
    needy = [q.where for q in QUERIES if re.search("joules|power_watts|utilization", f"{q.where} {q.expr}")]
    titles = {where.partition(": ")[2] or where for where in needy}
    assert {title for title in titles if title not in section} == set()
    assert len(titles) == 8


def test_provisioning_finds_the_dashboards_and_prometheus() -> None:
    grafana = DEPLOY / "grafana" / "provisioning"
    (provider,) = load_yaml(grafana / "dashboards" / "baton.yaml")["providers"]
    (source,) = load_yaml(grafana / "datasources" / "prometheus.yaml")["datasources"]
    services = load_yaml(DEPLOY / "compose.yaml")["services"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    assert source["url"] == "http://prometheus:9090"
    interval = load_yaml(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
    assert "./prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]
