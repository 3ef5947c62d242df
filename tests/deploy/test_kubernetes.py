"""The Kubernetes manifests: rendered where there is a kubectl, checked against the API's schemas and against ourselves.

What an API server, a scheduler and a device plugin would say is not checked: there is none here.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from baton import __version__
from cli.app import app
from tests.support.deploy_files import DEPLOY, accept
from tests.support.prometheus_files import IS_INSTALLED
from tests.support.root import ROOT

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "nvidia", "rdma")
COMPONENTS = ("external-redis", "images", "nvidia", "prometheus-operator")
# What is applied besides an overlay, and an overlay as operators make it.
OTHERS = ("model", "monitoring", "examples/own")
FOLDERS = ("base", *(f"overlays/{o}" for o in OVERLAYS), *(f"components/{c}" for c in COMPONENTS), *OTHERS)
WORKERS = ("prefill", "decode")
# Metrics that must be exported for the pools to grow and shrink; docs and dashboards have the same names.
METRICS = {"baton_prefill_queue_tokens", "baton_kv_blocks", "baton_tbt_seconds"}
# What closing a worker may take after its grace time, and `baton drain` waits for it.
CLOSING_S = 10


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


BASE = [d for path in sorted((KUBERNETES / "base").glob("*.yaml")) if path.name != "kustomization.yaml"
        for d in documents(path)]  # fmt: skip
EXAMPLES = {p.stem: documents(p)[0] for p in (KUBERNETES / "examples").glob("*.yaml")}


def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    return rendered_folder(f"overlays/{overlay}")


@functools.cache
def rendered_folder(folder: str | Path) -> tuple[dict[str, Any], ...]:
    """Of `deploy/kubernetes`, or any."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: the overlay is not rendered, only its files are checked")
    command = [kubectl, "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return tuple(d for d in yaml.safe_load_all(done.stdout) if d)


def of_kind(found: Any, kind: str) -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d for d in found if d["kind"] == kind}


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    """Of a Deployment or a Job."""
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


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomizations_name_what_there_is(folder: str) -> None:
    here = KUBERNETES / folder
    (found,) = documents(here / "kustomization.yaml")
    known = {
        "apiVersion", "kind", "namespace", "labels", "resources", "components", "configMapGenerator", "images",
        "patches",
    }  # fmt: skip
    assert set(found) <= known
    assert found["kind"] == ("Component" if folder.startswith("components/") else "Kustomization")
    for resource in [*found.get("resources", []), *found.get("components", [])]:
        target = (here / resource).resolve()
        assert target.is_file() or (target / "kustomization.yaml").is_file(), resource
    for patch in found.get("patches", []):
        if "path" not in patch:
            continue
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
    asked = {container(d)["image"].partition(":")[0] for d in of_kind(BASE, "Deployment").values()}
    assert images <= asked | {"baton-worker-cuda"}


def test_every_file_is_used() -> None:
    for folder in (KUBERNETES / name for name in FOLDERS):
        (found,) = documents(folder / "kustomization.yaml")
        patches = {p["path"] for p in found.get("patches", []) if "path" in p}
        used = {*found.get("resources", []), *patches, "kustomization.yaml"}
        assert {p.name for p in folder.iterdir()} <= used
    assert {p.name for p in (KUBERNETES / "components").iterdir()} == set(COMPONENTS)
    assert {p.name for p in (KUBERNETES / "overlays").iterdir()} == set(OVERLAYS)


def test_images_have_one_version_set_in_one_place() -> None:
    """That of the package. Overlays and the model's Job take it from there; compose and the Dockerfile agree."""
    (found,) = documents(KUBERNETES / "components" / "images" / "kustomization.yaml")
    assert {i["newTag"] for i in found["images"]} == {__version__}
    for folder in (f for f in FOLDERS if f != "components/images"):
        assert "newTag" not in (KUBERNETES / folder / "kustomization.yaml").read_text(), folder
    texts = [p.read_text() for p in (DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml", DEPLOY / "Dockerfile")]
    tags = re.findall(r"\bbaton-(?:router|worker|worker-cuda):([\w.]+)", "".join(texts))
    assert len(tags) == 6
    assert set(tags) == {__version__}


@pytest.mark.parametrize("document", BASE, ids=[f"{d['kind']}-{d['metadata']['name']}" for d in BASE])
def test_base_fits_the_schemas(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ["secret", "model-claim"])
def test_examples_fit_the_schemas(name: str) -> None:
    kubernetes_validate.validate(EXAMPLES[name], kubernetes_validate.latest_version(), strict=True)


# -- what comes out


@pytest.mark.parametrize("folder", [*(f"overlays/{o}" for o in OVERLAYS), *OTHERS])
def test_what_comes_out_fits_the_schemas(folder: str) -> None:
    for document in rendered_folder(folder):
        if not document["apiVersion"].startswith("monitoring.coreos.com/"):  # the operator's own kinds
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_is_scaled_has_no_replicas_of_its_own(overlay: str) -> None:
    """Each apply would set the scaler's number back. One replica has no successor while it is replaced."""
    found = rendered(overlay)
    scaled = {s["spec"]["scaleTargetRef"]["name"] for s in of_kind(found, "HorizontalPodAutoscaler").values()}
    assert scaled == set(WORKERS)
    for name, deployment in of_kind(found, "Deployment").items():
        assert ("replicas" in deployment["spec"]) != (name in scaled), name
    assert all(s["spec"]["minReplicas"] >= 2 for s in of_kind(found, "HorizontalPodAutoscaler").values())


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(
    ("design", "bounds"),
    [
        (("--prompt=h100-80gb:3", "--token=a100-80gb:2", "--prompt-count=2-5", "--machine-label=example.com/machine"),
         {"prefill": (2, 5), "decode": (2, 2)}),
        (("--mixed=h100-80gb:4",), {"decode": (4, 4)}),
    ],
    ids=["split", "mixed"],
)  # fmt: skip
def test_a_plan_fits_every_overlay(overlay: str, design: tuple[str, ...], bounds: Any, tmp_path: Path) -> None:
    """`baton plan export`: its scalers' numbers, pods for its machines, all else as the overlay has it."""
    command = ["plan", "export", "--kubernetes", *design, "--tp=8", f"--out={tmp_path}",
               f"--overlay={KUBERNETES / 'overlays' / overlay}"]  # fmt: skip
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found, before = rendered_folder(tmp_path), rendered(overlay)
    for document in found:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    scalers = of_kind(found, "HorizontalPodAutoscaler")
    assert {n: (s["spec"]["minReplicas"], s["spec"]["maxReplicas"]) for n, s in scalers.items()} == bounds
    deployments = of_kind(found, "Deployment")
    assert set(deployments) == {"redis", "router", *bounds}
    assert set(of_kind(found, "PodDisruptionBudget")) == {"router", *bounds}
    for name in bounds:
        assert "replicas" not in deployments[name]["spec"], "the scaler owns them"
        only, plain = container(deployments[name]), container(of_kind(before, "Deployment")[name])
        assert {kind: only["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {
            "requests": "8", "limits": "8",
        }  # fmt: skip
        role = name if len(bounds) == 2 else "mixed"
        assert only["args"] == [*(f"--role={role}" if arg.startswith("--role=") else arg for arg in plain["args"])]
        assert {k: v for k, v in only.items() if k not in ("args", "resources")} == {
            k: v for k, v in plain.items() if k not in ("args", "resources")
        }
        labels = pod(deployments[name]).get("nodeSelector", {})
        assert labels.get("example.com/machine") == (
            None if len(bounds) == 1 else {"prefill": "h100-80gb", "decode": "a100-80gb"}[name]
        )


def test_the_models_job_writes_what_the_pods_read() -> None:
    found = rendered_folder("model")
    (job,) = of_kind(found, "Job").values()
    spec, only = pod(job), container(job)
    (settings,) = of_kind(found, "ConfigMap").values()
    base = documents(KUBERNETES / "base" / "kustomization.yaml")[0]["configMapGenerator"][0]["literals"]
    assert f"BATON_MODEL={settings['data']['MODEL_FOLDER']}" in base
    (claim,) = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claim == {"claimName": EXAMPLES["model-claim"]["metadata"]["name"]}
    assert EXAMPLES["model-claim"]["spec"]["accessModes"] == ["ReadWriteMany"], "one writes, all read"
    (mount,) = [m for m in only["volumeMounts"] if m["name"] == "models"]
    assert settings["data"]["MODEL_FOLDER"].startswith(mount["mountPath"] + "/")
    assert not mount.get("readOnly")
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert only["securityContext"]["readOnlyRootFilesystem"] is True
    (token,) = [v["valueFrom"]["secretKeyRef"] for v in only["env"] if v["name"] == "HF_TOKEN"]
    assert token["optional"] is True
    assert token["key"] in (KUBERNETES / "examples" / "secret.yaml").read_text()
    (policy,) = of_kind(found, "NetworkPolicy").values()
    assert matches(policy["spec"]["podSelector"], job["spec"]["template"]["metadata"]["labels"])
    assert policy["spec"]["egress"] == [{"ports": [{"protocol": "TCP", "port": 443}]}]


def test_the_models_job_is_a_command_of_the_hubs_own_program() -> None:
    (job,) = documents(KUBERNETES / "model" / "job.yaml")
    program, verb = container(job)["command"]
    told = subprocess.run(
        [Path(sys.executable).parent / program, verb, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    options = {word.partition("=")[0] for word in container(job)["args"] if word.startswith("--")}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert container(job)["image"] == "baton-worker"
    assert [need for need in extras["worker"] if need.startswith("huggingface-hub")]
    assert options == {option for option in options if option in told.stdout}


def test_a_redis_of_ones_own_takes_the_place_of_the_bundled_one() -> None:
    found = rendered_folder("examples/own")
    assert set(of_kind(found, "Deployment")) == {"router", *WORKERS}
    assert set(of_kind(found, "Service")) == {"router"}
    policies = of_kind(found, "NetworkPolicy")
    assert "registry" not in policies
    outside = policies["registry-outside"]["spec"]
    for deployment in of_kind(found, "Deployment").values():
        assert matches(outside["podSelector"], deployment["spec"]["template"]["metadata"]["labels"])
        (registry,) = [v for v in container(deployment)["env"] if v["name"] == "BATON_REGISTRY"]
        assert registry["valueFrom"]["secretKeyRef"] == {"name": "baton", "key": "registry"}
    assert outside["egress"] == [{"ports": [{"protocol": "TCP", "port": 6379}, {"protocol": "TCP", "port": 6380}]}]
    assert {container(d)["image"].partition("/")[0] for d in of_kind(found, "Deployment").values()} == {
        "registry.example.com"
    }


def test_rules_and_dashboards_are_the_files_of_this_repository() -> None:
    maps = of_kind(rendered_folder("monitoring"), "ConfigMap")
    rules, dashboards = maps["baton-rules"], maps["baton-dashboards"]
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    for found, folder in ((rules, "prometheus/rules"), (dashboards, "grafana/dashboards")):
        assert found["data"] == {p.name: p.read_text() for p in (DEPLOY / folder).iterdir()}
        # `kubectl apply` keeps all of it in one annotation, which holds no more.
        assert len(json.dumps(found)) < 262_144


def test_the_operators_rules_are_the_rules() -> None:
    command = [sys.executable, "scripts/prometheus_rule.py", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    (rule,) = documents(KUBERNETES / "components" / "prometheus-operator" / "rules.yaml")
    names = ("recording.yml", "alerts.yml")
    assert rule["spec"]["groups"] == [g for n in names for g in documents(DEPLOY / "prometheus/rules" / n)[0]["groups"]]


def test_one_setting_says_where_all_alerts_link_to(tmp_path: Path) -> None:
    """Of a copy, as operators change theirs."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/prometheus_rule.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)

    for url in ("https://git.example/a/docs/", "http://wiki.example/b"):
        assert run("--docs-url", url).returncode == 0
        assert run("check").returncode == 0
        for path in ("prometheus/rules/alerts.yml", "kubernetes/components/prometheus-operator/rules.yaml"):
            text = (tmp_path / "deploy" / path).read_text()
            links = re.findall(r"runbook_url: '\{\{ or \$externalLabels\.baton_docs \"(.+?)\" \}\}/runbook\.md#", text)
            assert set(links) == {url.rstrip("/")}
            assert len(links) == text.count("runbook_url:")
    for bad in ("docs", 'https://a"b', "https://a b", "ftp://a"):
        refused = run("--docs-url", bad)
        assert (refused.returncode, "expected http" in refused.stderr) == (1, True)


@pytest.mark.skipif(not IS_INSTALLED, reason="promtool is not installed")
def test_without_the_operator_the_same_jobs_are_scraped(tmp_path: Path) -> None:
    config = EXAMPLES["prometheus-scrape"]
    for job in config["scrape_configs"]:
        (source,) = job["kubernetes_sd_configs"]
        assert (source["role"] in ("pod", "endpoints"), source["namespaces"]) == (True, {"names": ["baton"]})
    # Debian's promtool has no Kubernetes in it; all the rest is looked at.
    known = [{k: v for k, v in job.items() if k != "kubernetes_sd_configs"} for job in config["scrape_configs"]]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config | {"scrape_configs": known}))
    command = ["promtool", "check", "config", "--syntax-only", "prometheus.yml"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)
    wanted = documents(DEPLOY / "prometheus" / "prometheus.yml")[0]
    assert {j["job_name"] for j in config["scrape_configs"]} == {j["job_name"] for j in wanted["scrape_configs"]}
    assert config["global"]["external_labels"].keys() == wanted["global"]["external_labels"].keys()
    for job in config["scrape_configs"]:
        labels = {r["target_label"] for r in job["relabel_configs"] if "target_label" in r}
        assert labels >= {"namespace", "pod"}, "prometheus-adapter asks for them"
    assert config["rule_files"] == ["/etc/prometheus/baton/*.yml"]


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
              "BATON_API_KEY": "k1 k2", "REDISCLI_AUTH": "s3cret", "BATON_CLUSTER_KEY": "c" * 32,
              "BATON_ADMIN_KEY": "a"}  # fmt: skip
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
    assert settings["cluster_key"] == values["BATON_CLUSTER_KEY"], "it listens where other pods reach it"
    patience_s = pod(deployment)["terminationGracePeriodSeconds"]
    ports = {p["containerPort"] for p in only["ports"]}
    if name == "router":
        assert (settings["api_key"], settings["admin_key"]) == (["k1", "k2"], "a")
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
    pods, service = documents(KUBERNETES / "components" / "prometheus-operator" / "monitors.yaml")
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
    _check_names_and_spans([p["spec"] for p in of_kind(found, "NetworkPolicy").values()], labels)
    assert allows("ingress", "from", "router", "redis", 8000), "the API is open"


def _check_names_and_spans(policies: list[dict[str, Any]], labels: dict[str, dict[str, str]]) -> None:
    """Names are resolved by any resolver, also a cache on the machine; spans go to the collector of `monitoring`."""

    def goes_out(name: str, protocol: str, port: int) -> list[Any]:
        """Where to; None: anywhere."""
        return [
            rule.get("to")
            for policy in policies
            if matches(policy["podSelector"], labels[name])
            for rule in policy.get("egress", [])
            if {"protocol": protocol, "port": port} in rule.get("ports", [])
        ]

    for name in labels:
        assert goes_out(name, "UDP", 53) == goes_out(name, "TCP", 53) == [None]
    collector = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    literals = documents(KUBERNETES / "base" / "kustomization.yaml")[0]["configMapGenerator"][0]["literals"]
    assert "OTEL_EXPORTER_OTLP_ENDPOINT=http://otel-collector.monitoring:4318" in literals
    assert goes_out("router", "TCP", 4318) == goes_out("router", "TCP", 4317) == [collector]


def test_overlays_ask_for_their_devices() -> None:
    devices = {"cpu": set(), "nvidia": {"nvidia.com/gpu"}, "rdma": {"nvidia.com/gpu", "rdma/hca_shared_devices_a"}}
    for overlay, wanted in devices.items():
        for name in WORKERS:
            deployment = of_kind(rendered(overlay), "Deployment")[name]
            resources = container(deployment)["resources"]
            for kind in ("requests", "limits"):
                assert set(resources[kind]) - {"cpu", "memory"} == wanted, (overlay, name)
            image = "baton-worker" if overlay == "cpu" else "baton-worker-cuda"
            assert container(deployment)["image"] == f"{image}:{__version__}"


def test_every_knob_is_documented() -> None:
    readme = (DEPLOY / "README.md").read_text()
    knobs = {"replicas", "terminationGracePeriodSeconds", "baton_kv_used_ratio", "baton_tbt_p95_seconds", *METRICS}
    for deployment in of_kind(BASE, "Deployment").values():
        knobs |= {v["name"] for v in container(deployment)["env"]}
        knobs |= {m[1] for word in container(deployment).get("args", []) if (m := re.match(r"(--[\w-]+)=", word))}
    for folder in ("base", "model"):
        (generator,) = documents(KUBERNETES / folder / "kustomization.yaml")[0]["configMapGenerator"]
        knobs |= {literal.partition("=")[0] for literal in generator["literals"]}
    for folder in FOLDERS:
        for patch in (KUBERNETES / folder).glob("worker.yaml"):
            knobs |= {v["name"] for v in container(documents(patch)[0]).get("env", [])}
    assert [knob for knob in sorted(knobs) if f"`{knob}`" not in readme] == []
