"""The Kubernetes manifests: rendered where there is a kubectl, checked against the API's schemas and against ourselves.

What an API server, a scheduler and a device plugin would say is not checked: there is none here.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.support import DEPLOY, accept

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "nvidia", "rdma")
WORKERS = ("prefill", "decode")
# Metrics that somebody has to export for the pools to grow and shrink; docs and dashboards have the same names.
METRICS = {"baton_prefill_queue_tokens", "baton_kv_blocks", "baton_tbt_seconds"}
# What closing a worker may take after its grace time, and `baton drain` waits for it.
CLOSING_S = 10


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


BASE = [d for path in sorted((KUBERNETES / "base").glob("*.yaml")) if path.name != "kustomization.yaml"
        for d in documents(path)]  # fmt: skip
EXAMPLES = {p.stem: documents(p)[0] for p in (KUBERNETES / "examples").glob("*.yaml")}


@functools.cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: the overlay is not rendered, only its files are checked")
    command = [kubectl, "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return tuple(d for d in yaml.safe_load_all(done.stdout) if d)


def of_kind(found: Any, kind: str) -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d for d in found if d["kind"] == kind}


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(deployment)["containers"]
    assert isinstance(only, dict)
    return only


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions)
    return all(labels.get(k) == v for k, v in wanted.items()) and all(
        labels.get(e["key"]) in e["values"] for e in expressions
    )


# -- the files, without kubectl


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{o}" for o in OVERLAYS)])
def test_kustomizations_name_what_there_is(folder: str) -> None:
    here = KUBERNETES / folder
    (found,) = documents(here / "kustomization.yaml")
    known = {"apiVersion", "kind", "namespace", "labels", "resources", "configMapGenerator", "images", "patches"}
    assert set(found) <= known
    for resource in found["resources"]:
        target = (here / resource).resolve()
        assert target.is_file() or (target / "kustomization.yaml").is_file(), resource
    for patch in found.get("patches", []):
        assert (here / patch["path"]).is_file()
        target = patch["target"]
        chosen = [
            d for d in BASE
            if d["kind"] == target["kind"] and target.get("name", d["metadata"]["name"]) == d["metadata"]["name"]
            and all(
                d["metadata"].get("labels", {}).get(k) == v
                for k, _, v in (part.partition("=") for part in target.get("labelSelector", "").split(",") if part)
            )
        ]  # fmt: skip
        assert len(chosen) == (2 if target["kind"] == "Deployment" else 1), "both pools, and nothing else"
    images = {i["name"] for i in found.get("images", [])}
    assert images <= {container(d)["image"].partition(":")[0] for d in of_kind(BASE, "Deployment").values()}


def test_every_file_is_used() -> None:
    for folder in (KUBERNETES / "base", *((KUBERNETES / "overlays" / o) for o in OVERLAYS)):
        (found,) = documents(folder / "kustomization.yaml")
        used = {*found["resources"], *(p["path"] for p in found.get("patches", [])), "kustomization.yaml"}
        assert {p.name for p in folder.iterdir()} <= used


@pytest.mark.parametrize("document", BASE, ids=[f"{d['kind']}-{d['metadata']['name']}" for d in BASE])
def test_base_fits_the_schemas(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["secret", "model-claim"])
def test_examples_fit_the_schemas(name: str) -> None:
    kubernetes_validate.validate(EXAMPLES[name], kubernetes_validate.latest_version(), strict=True)


# -- what comes out


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_fit_the_schemas(overlay: str) -> None:
    for document in rendered(overlay):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_whole(overlay: str) -> None:
    found = rendered(overlay)
    deployments = of_kind(found, "Deployment")
    assert set(deployments) == {"redis", "router", *WORKERS}
    assert all(d["metadata"].get("namespace") == "baton" for d in found if d["kind"] != "Namespace")
    for name, deployment in deployments.items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert matches(deployment["spec"]["selector"], labels)
        assert not [n for n in deployments if n != name and matches(deployments[n]["spec"]["selector"], labels)]
    for name, service in of_kind(found, "Service").items():
        ports = {p["name"] for p in container(deployments[name])["ports"]}
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports
        assert (
            service["spec"]["selector"].items() <= deployments[name]["spec"]["template"]["metadata"]["labels"].items()
        )


def variables(deployment: dict[str, Any], found: Any) -> dict[str, str]:
    """What a container's environment holds; what is only known at run time gets an example."""
    values = {"POD_NAME": "prefill-7d4b9-x2x", "POD_IP": "10.1.2.3", "BATON_REGISTRY": "redis://:s3cret@redis:6379/0",
              "BATON_API_KEY": "k1 k2", "REDISCLI_AUTH": "s3cret"}  # fmt: skip
    for source in container(deployment).get("envFrom", []):
        values |= of_kind(found, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for variable in container(deployment)["env"]:
        if "value" in variable:
            values[variable["name"]] = variable["value"]
        else:
            assert variable["name"] in values
    return values


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", ["router", *WORKERS])
def test_commands_probes_and_hooks_are_taken_by_the_cli(
    overlay: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rendered(overlay)
    deployment = of_kind(found, "Deployment")[name]
    only = container(deployment)
    values = variables(deployment, found)
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    arguments = [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], word) for word in only["args"]]
    settings = accept(arguments)
    assert settings["registry"] == values["BATON_REGISTRY"]
    patience_s = pod(deployment)["terminationGracePeriodSeconds"]
    ports = {p["containerPort"] for p in only["ports"]}
    if name == "router":
        assert settings["api_key"] == ["k1", "k2"]
        assert {int(settings[face].rpartition(":")[2]) for face in ("http", "grpc")} == ports
        program, seconds = only["lifecycle"]["preStop"]["exec"]["command"]
        assert (program, int(seconds) + settings["grace"] + CLOSING_S <= patience_s) == ("sleep", True)
        return
    assert settings["role"] == name
    assert settings["advertise"] == values["POD_IP"]
    named = {p["name"]: p["containerPort"] for p in only["ports"]}
    port = named["grpc"]
    assert settings["listen"] == f"0.0.0.0:{port}"
    assert named == {"grpc": port, "metrics": settings["metrics_port"]}
    program, *hook = only["lifecycle"]["preStop"]["exec"]["command"]
    drain = accept(hook)
    assert (program, drain["node"], drain["direct"], drain["wait"]) == ("baton", f"127.0.0.1:{port}", True, True)
    assert drain["grace"] == settings["grace"]
    assert settings["grace"] + 2 * CLOSING_S <= patience_s
    services = {
        probe: only[f"{probe}Probe"]["grpc"].get("service", "") for probe in ("startup", "readiness", "liveness")
    }
    assert services == {"startup": "", "readiness": "", "liveness": "baton.live"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_hardened(overlay: str) -> None:
    for name, deployment in of_kind(rendered(overlay), "Deployment").items():
        spec, only = pod(deployment), container(deployment)
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        own = only["securityContext"]
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"]["drop"] == ["ALL"]
        is_rdma_worker = overlay == "rdma" and name in WORKERS
        assert own["capabilities"].get("add", []) == (["IPC_LOCK"] if is_rdma_worker else [])
        assert "memory" in only["resources"]["limits"]
        assert set(only["resources"]["requests"]) >= {"cpu", "memory"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_the_documented_ones_and_none_is_in_a_manifest(overlay: str) -> None:
    found = rendered(overlay)
    assert not of_kind(found, "Secret")
    keys = set(EXAMPLES["secret"]["stringData"])
    asked = {
        (ref["name"], ref["key"])
        for d in of_kind(found, "Deployment").values()
        for variable in container(d)["env"]
        if (ref := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    assert asked == {(EXAMPLES["secret"]["metadata"]["name"], key) for key in keys}
    claims = {v["persistentVolumeClaim"]["claimName"] for d in of_kind(found, "Deployment").values()
              for v in pod(d)["volumes"] if "persistentVolumeClaim" in v}  # fmt: skip
    assert claims == {EXAMPLES["model-claim"]["metadata"]["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_budgets_spread_and_scaling_point_at_their_pools(overlay: str) -> None:
    found = rendered(overlay)
    deployments = of_kind(found, "Deployment")
    for name in ("router", *WORKERS):
        labels = deployments[name]["spec"]["template"]["metadata"]["labels"]
        budget = of_kind(found, "PodDisruptionBudget")[name]["spec"]
        assert budget["maxUnavailable"] == 1
        assert matches(budget["selector"], labels)
        (spread,) = pod(deployments[name])["topologySpreadConstraints"]
        assert matches(spread["labelSelector"], labels)
    scalers = of_kind(found, "HorizontalPodAutoscaler")
    assert set(scalers) == set(WORKERS)
    for name, scaler in scalers.items():
        assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert scaler["spec"]["behavior"]["scaleDown"]["policies"] == [
            {"type": "Pods", "value": 1, "periodSeconds": 300}
        ]


def test_what_the_pools_scale_on_is_what_the_adapter_makes_of_our_metrics() -> None:
    rules = EXAMPLES["prometheus-adapter"]["rules"]["custom"]
    made = {rule["name"]["as"]: rule for rule in rules}
    asked = set()
    for scaler in of_kind(BASE, "HorizontalPodAutoscaler").values():
        for metric in scaler["spec"]["metrics"]:
            source = metric["pods"] if metric["type"] == "Pods" else metric["object"]
            name = source["metric"]["name"]
            asked.add(name)
            resource = "pod" if metric["type"] == "Pods" else source["describedObject"]["kind"].lower()
            assert resource in made[name]["resources"]["overrides"]
    assert asked == set(made)
    series = {rule["seriesQuery"].partition("{")[0].removesuffix("_bucket") for rule in rules}
    assert series == METRICS
    for rule in rules:
        assert re.match(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])


def test_the_operators_monitors_find_their_targets_and_name_jobs_as_the_rules_do() -> None:
    pods, service = documents(KUBERNETES / "examples" / "prometheus-operator.yaml")
    deployments = of_kind(BASE, "Deployment")
    (endpoint,) = pods["spec"]["podMetricsEndpoints"]
    chosen = {n for n, d in deployments.items()
              if matches(pods["spec"]["selector"], d["spec"]["template"]["metadata"]["labels"])}  # fmt: skip
    assert chosen == set(WORKERS)
    for name in chosen:
        assert endpoint["port"] in {p["name"] for p in container(deployments[name])["ports"]}
    (router,) = [s for s in of_kind(BASE, "Service").values()
                 if matches(service["spec"]["selector"], s["metadata"].get("labels", {}))]  # fmt: skip
    (face,) = service["spec"]["endpoints"]
    assert (router["metadata"]["name"], face["port"] in {p["name"] for p in router["spec"]["ports"]}) == (
        "router",
        True,
    )
    config = documents(DEPLOY / "prometheus" / "prometheus.yml")[0]
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert {e["relabelings"][0]["replacement"] for e in (endpoint, face)} == jobs
    assert {e["interval"] for e in (endpoint, face)} == {config["global"]["scrape_interval"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_let_through_what_has_to_talk(overlay: str) -> None:
    found = rendered(overlay)
    deployments = of_kind(found, "Deployment")
    policies = [p["spec"] for p in of_kind(found, "NetworkPolicy").values()]
    labels = {name: d["spec"]["template"]["metadata"]["labels"] for name, d in deployments.items()}

    def allows(direction: str, peer_key: str, mine: str, peer: str, port: int) -> bool:
        for policy in policies:
            if not matches(policy["podSelector"], labels[mine]):
                continue
            for rule in policy.get(direction, []):
                ports = [p["port"] for p in rule.get("ports", [{"port": port}]) if p.get("protocol", "TCP") == "TCP"]
                peers = rule.get(peer_key)
                is_peer = peers is None or any(
                    "podSelector" in x and matches(x["podSelector"], labels[peer]) for x in peers
                )
                if port in ports and is_peer:
                    return True
        return False

    def talks(source: str, target: str, port: int) -> bool:
        return allows("egress", "to", source, target, port) and allows("ingress", "from", target, source, port)

    for policy in policies:
        assert set(policy["policyTypes"]) <= {"Ingress", "Egress"}
    assert any(
        p["podSelector"] == {} and set(p["policyTypes"]) == {"Ingress", "Egress"} and len(p) == 2 for p in policies
    )
    any_port = 43210
    for worker in WORKERS:
        assert talks("router", worker, 50052)
        assert talks(worker, "redis", 6379)
        assert not talks(worker, "router", 8000)
        assert not talks("router", worker, any_port)
        assert not talks("redis", worker, 50052)
        assert all(talks(worker, other, any_port) for other in WORKERS)
    assert talks("router", "redis", 6379)
    assert allows("ingress", "from", "router", "redis", 8000), "the API is open"


def test_overlays_ask_for_their_devices() -> None:
    devices = {"cpu": set(), "nvidia": {"nvidia.com/gpu"}, "rdma": {"nvidia.com/gpu", "rdma/hca_shared_devices_a"}}
    for overlay, wanted in devices.items():
        for name in WORKERS:
            deployment = of_kind(rendered(overlay), "Deployment")[name]
            resources = container(deployment)["resources"]
            for kind in ("requests", "limits"):
                assert set(resources[kind]) - {"cpu", "memory"} == wanted, (overlay, name)
            assert container(deployment)["image"].endswith(":latest" if overlay == "cpu" else ":cuda")


def test_every_knob_is_documented() -> None:
    readme = (DEPLOY / "README.md").read_text()
    knobs = {"replicas", "terminationGracePeriodSeconds", "baton_kv_used_ratio", "baton_tbt_p95_seconds", *METRICS}
    for deployment in of_kind(BASE, "Deployment").values():
        knobs |= {v["name"] for v in container(deployment)["env"]}
        knobs |= {m[1] for word in container(deployment).get("args", []) if (m := re.match(r"(--[\w-]+)=", word))}
    knobs |= {w.partition("=")[0] for g in documents(KUBERNETES / "base/kustomization.yaml")[0]["configMapGenerator"]
              for w in g["literals"]}  # fmt: skip
    for overlay in OVERLAYS:
        for patch in (KUBERNETES / "overlays" / overlay).glob("worker.yaml"):
            knobs |= {v["name"] for v in container(documents(patch)[0]).get("env", [])}
    assert [knob for knob in sorted(knobs) if f"`{knob}`" not in readme] == []
