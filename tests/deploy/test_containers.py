"""The Dockerfile and the compose files, as far as they can be checked without a container engine.

What a build would find out (that base images and packages can be fetched and fit together) is not checked here.
"""

from __future__ import annotations

import ast
import re
import subprocess
from typing import Any

import pytest

from tests.support.deploy_files import (
    DEPLOY,
    Stage,
    UsageError,
    accept,
    copy_sources,
    interpolate,
    load_yaml,
    parse_dockerfile,
    validate,
)
from tests.support.root import ROOT

ARGUMENTS, STAGES = parse_dockerfile(DEPLOY / "Dockerfile")
NAMES = [stage.name for stage in STAGES]
FINAL = ("router", "worker")
# Without defaults: what everybody can read in a file is no secret.
SECRETS = {"BATON_CLUSTER_KEY": "c" * 32, "BATON_ADMIN_KEY": "operators"}
KNOWN = {
    "FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD",
}  # fmt: skip


def stage(name: str) -> Stage:
    return next(s for s in STAGES if s.name == name)


def ancestors(name: str) -> list[str]:
    """The stage, what it is built from, and what it copies from."""
    if name not in NAMES:
        return []
    found = [name]
    own = stage(name)
    bases = [own.base.replace("${DEVICE}", device) for device in ("cpu", "cuda")]
    for base in dict.fromkeys([*bases, *(copy_sources(c)[0] for c in own.all("COPY"))]):
        found += ancestors(base)
    return found


def test_the_names_of_stages_and_instructions_are_known() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for number, found in enumerate(STAGES):
        before = set(NAMES[:number])
        for device in ("cpu", "cuda"):
            base = found.base.replace("${DEVICE}", device)
            assert base in before or base == "python:${PYTHON}-slim-bookworm${BASE_DIGEST}", base
        for instruction in found.instructions:
            assert instruction.keyword in KNOWN, instruction
            if instruction.keyword == "COPY" and (source := copy_sources(instruction)[0]):
                assert source in before


def test_every_copied_path_exists_and_is_in_the_build_context() -> None:
    patterns = (DEPLOY / "Dockerfile.dockerignore").read_text().split("\n")
    allowed = {p[1:] for p in patterns if p.startswith("!")}
    copied = [path for s in STAGES for c in s.all("COPY") for path in copy_sources(c)[1] if not copy_sources(c)[0]]
    assert set(copied) == allowed
    for path in copied:
        assert (ROOT / path).exists(), path


def test_every_package_that_the_wheel_has_is_copied() -> None:
    found = re.search(r"^SERVING = (\(.*?\))$", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    serving = set(ast.literal_eval(found[1]))
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert serving == folders - {"baton", "bench", "tests"}
    copied = {path for c in stage("wheel").all("COPY") for path in copy_sources(c)[1]}
    assert {"baton", "pyproject.toml", "setup.py", *serving} <= copied


@pytest.mark.parametrize("name", FINAL)
def test_final_images_are_nobodys_root_and_know_their_health(name: str) -> None:
    final = stage(name)
    assert final.last("USER").text == "10001:10001"
    after = final.instructions[final.instructions.index(final.last("USER")) :]
    assert not [i for i in after if i.keyword in ("RUN", "COPY")], "nothing is owned by the user that runs"
    entry = final.last("ENTRYPOINT").command
    assert entry == ["baton"]
    assert accept(final.last("CMD").command)["model"] == "/models/model"
    program, *health = final.last("HEALTHCHECK").command
    assert program == "baton"
    port = accept(health)["address"].rpartition(":")[2]
    assert port in final.last("EXPOSE").text.split()
    assert port in " ".join(final.last("CMD").command)


def test_the_routers_image_never_meets_torch() -> None:
    stages = ancestors("router")
    assert not [s for s in stages if s.startswith(("torch", "worker"))]
    text = " ".join(i.text for name in stages for i in stage(name).all("RUN"))
    assert "torch" not in text
    assert "[router,otel]" in text


def test_the_torch_of_the_images_is_the_one_that_setup_installs() -> None:
    version = re.search(r'^torch="torch==(.+)"$', (ROOT / "scripts/setup.sh").read_text(), re.MULTILINE)
    assert version is not None
    for name in ("torch-cpu", "torch-cuda"):
        assert stage(name).last("ARG").text == f"TORCH={version[1]}"


@pytest.mark.parametrize("found", STAGES, ids=NAMES)
def test_shell_commands_parse(found: Stage) -> None:
    for run in found.all("RUN"):
        script = re.sub(r"^(--\S+\s+)+", "", run.text)
        subprocess.run(["bash", "-n", "-c", script], check=True, timeout=10)


# -- compose

COMPOSE = load_yaml(DEPLOY / "compose.yaml")
GPU = load_yaml(DEPLOY / "compose.gpu.yaml")
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def command_of(service: dict[str, Any], environment: dict[str, str] | None = None) -> list[str]:
    return [interpolate(word, environment or {}) for word in service["command"]]


def test_the_files_fit_the_schema_of_compose() -> None:
    validate("vendor.compose-spec", DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml")


def test_the_cluster_is_whole() -> None:
    assert set(COMPOSE["services"]) == {"redis", "router", "prometheus", "grafana", *WORKERS}
    assert set(GPU["services"]) == set(WORKERS)


@pytest.mark.parametrize("name", ["router", *WORKERS])
def test_commands_are_taken_by_the_cli(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = COMPOSE["services"][name]
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, interpolate(str(value), {"BATON_API_KEY": "k1 k2", **SECRETS}))
    settings = accept(command_of(service))
    assert settings["registry"] == "redis://:baton@redis:6379/0"
    assert settings["grace"] + 10 <= int(service["stop_grace_period"].removesuffix("s"))
    assert settings["cluster_key"] == SECRETS["BATON_CLUSTER_KEY"]
    if name == "router":
        assert settings["api_key"] == ["k1", "k2"]
        assert settings["admin_key"] == SECRETS["BATON_ADMIN_KEY"]
        return
    assert "BATON_ADMIN_KEY" not in service["environment"], "it is the router's alone"
    assert settings["role"] == name.partition("-")[0]
    assert (settings["node_id"], settings["advertise"]) == (name, name), "others find it by its service's name"
    assert settings["listen"].endswith(":50052"), "where its image looks for its health"


def test_no_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_API_KEY", "")
    assert not accept(["router", "--model", "m", "--node", "h:1"])["api_key"]


def test_what_the_cli_does_not_know_is_noticed() -> None:
    with pytest.raises(UsageError):
        accept(["worker", "--model", "m", "--role", "prefill", "--no-such-option"])
    with pytest.raises(UsageError):
        accept(["worker", "--model", "m", "--role", "boss"])


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_services_are_hardened(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    for volume in service.get("volumes", []):
        source, target, *mode = interpolate(volume, {}).split(":")
        if source.startswith("."):
            assert mode == ["ro"], f"{source} is mounted for writing"
        else:
            assert source in COMPOSE["volumes"], source
            assert target.startswith("/")


def test_ports_are_open_to_this_host_alone_and_workers_to_nobody() -> None:
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert interpolate(port, {}).startswith("127.0.0.1:"), f"{name}: {port}"
        is_inside = name in (*WORKERS, "redis")
        assert (service["networks"] == ["cluster"]) == is_inside
    assert COMPOSE["networks"]["cluster"]["internal"] is True


def test_mounted_folders_and_build_files_exist() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = interpolate(volume, {}).split(":")[0]
            if source.startswith(".") and not source.startswith(("./prometheus", "./grafana")):
                assert (DEPLOY / source).exists(), source
        if "build" in service:
            build = service["build"]
            assert (DEPLOY / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]).is_file()
            assert build["target"] in FINAL
            assert set(build.get("args", {})) <= set(ARGUMENTS)


def test_every_variable_is_explained() -> None:
    text = (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "compose.gpu.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text)) - {"VARIABLE"}
    readme = (DEPLOY / "README.md").read_text()
    assert [name for name in sorted(used) if f"`{name}`" not in readme] == []


def test_gpus_are_one_for_each_worker() -> None:
    devices = []
    for name in WORKERS:
        service = GPU["services"][name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        devices += [interpolate(i, {}) for i in device["device_ids"]]
        assert service["build"]["args"] == {"DEVICE": "cuda"}
    assert devices == ["0", "1", "2", "3"]
