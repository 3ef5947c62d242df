"""A Prometheus of the test's own, with the rules of deploy/ and a scrape interval that tests can wait for."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.deploy_files import load_yaml
from tests.support.prometheus_files import PROMETHEUS, RULES

START_TIMEOUT_S = 30.0


class Prometheus:
    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._client = httpx.Client(base_url=url, timeout=10.0)

    def query(self, expr: str) -> list[dict[str, Any]]:
        answer = self._client.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", f"{expr}: {answer}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Those that fire."""
        alerts = self._client.get("/api/v1/alerts").json()["data"]["alerts"]
        return [alert for alert in alerts if alert["state"] == "firing"]

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.alerts()}

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._client.close()


def _configured(routers: Sequence[str]) -> dict[str, Any]:
    """The configuration of deploy/, quicker and for these routers."""
    config: dict[str, Any] = load_yaml(PROMETHEUS / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    of_routers, of_workers = config["scrape_configs"]
    of_routers["static_configs"] = [{"targets": [url.removeprefix("http://") for url in routers]}]
    (found,) = of_workers["http_sd_configs"]
    of_workers["http_sd_configs"] = [
        found | {"url": found["url"].replace("http://router:8000", url), "refresh_interval": "1s"} for url in routers
    ]
    return config


@contextmanager
def running_prometheus(folder: Path, *routers: str) -> Iterator[Prometheus]:
    """``routers`` are the base URLs of HTTP faces. Workers are found by their lists."""
    (folder / "rules").mkdir(parents=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(_configured(routers)))
    for path in RULES:
        # A test does not wait a minute.
        (folder / "rules" / path.name).write_text(re.sub(r"for: \w+", "for: 2s", path.read_text()))
    port = _free_port()
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    found = Prometheus(f"http://127.0.0.1:{port}", process)
    try:
        gives_up_at = time.monotonic() + START_TIMEOUT_S
        while not found.is_ready():
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < gives_up_at, (folder / "prometheus.log").read_text()
            time.sleep(0.05)
        yield found
    finally:
        found.close()
        process.terminate()
        process.wait(10)


def _free_port() -> int:
    """Prometheus says nowhere which port it took, so it cannot be asked for any."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def numbers(result: list[dict[str, Any]]) -> list[float]:
    """What a query found, NaN left out."""
    found = [float(series["value"][1]) for series in result]
    return [value for value in found if value == value]


def describe(result: list[dict[str, Any]]) -> str:
    return json.dumps(result)[:400]
