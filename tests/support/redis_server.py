"""A real redis-server of a test's own: on a free port, without a disk, ended with the test."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis

_START_TIMEOUT_S = 10.0


class RedisServer:
    """``kill`` and ``start`` again on the same port: it has forgotten everything. ``pause`` hangs it."""

    def __init__(self, folder: Path, *, password: str = "", tls: bool = False) -> None:
        command = shutil.which("redis-server")
        if command is None:
            pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            self.port: int = reserved.getsockname()[1]
        self._password = password
        self._folder = folder
        self._tls = tls
        self._command = [
            *(command, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)),
            *(("--requirepass", password) if password else ()),
            *(self._tls_options() if tls else ("--port", str(self.port))),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._client = redis.Redis.from_url(self.url, socket_timeout=2.0, retry=None)

    @property
    def url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        query = f"?ssl_ca_certs={self._folder}/cert.pem" if self._tls else ""
        return f"redis{'s' if self._tls else ''}://{secret}127.0.0.1:{self.port}/0{query}"

    def _tls_options(self) -> tuple[str, ...]:
        openssl = shutil.which("openssl")
        if openssl is None:
            pytest.skip("openssl is not installed, so there is no certificate to serve TLS with")
        key, cert = str(self._folder / "key.pem"), str(self._folder / "cert.pem")
        subprocess.run(
            [
                *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-keyout", key, "-out", cert),
                *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            ],
            check=True,
            capture_output=True,
            timeout=30,
        )
        return (
            *("--port", "0", "--tls-port", str(self.port), "--tls-cert-file", cert, "--tls-key-file", key),
            *("--tls-ca-cert-file", cert, "--tls-auth-clients", "no"),
        )

    def start(self) -> RedisServer:
        assert self._process is None
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        gives_up_at = time.monotonic() + _START_TIMEOUT_S
        while True:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                if self._client.ping():
                    return self
            assert self._process.poll() is None, (self._folder / "redis.log").read_text()
            assert time.monotonic() < gives_up_at, "redis-server does not answer"
            time.sleep(0.01)

    def kill(self) -> None:
        """As often as you like."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def close(self) -> None:
        self.kill()
        self._client.close()

    def pause(self) -> None:
        """Connections stay open and nothing is answered any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def keys(self) -> list[str]:
        return sorted(key.decode() for key in self._client.scan_iter())
