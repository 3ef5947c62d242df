"""`baton certs`: an authority of one's own, and a certificate of it for each process or name. Made by the program
openssl, so that nothing needs another package."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from baton.errors import BadConfig, quoted

CA_CERT, CA_KEY = "ca.pem", "ca.key"
_NAME = re.compile(r"[A-Za-z0-9*_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")
_MAX_COMMON_NAME_CHARS = 64
_LIMIT_S = 60
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
# An own configuration: what distributions put into openssl's differs.
_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = {common_name}
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[peer]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {alternatives}
"""


class NoProgram(BadConfig):
    """There is no openssl."""


def make(folder: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """The certificates, one for each of ``hosts``, which may be several names joined by commas; the private key of
    NAME.pem is in NAME.key. An authority that is in the folder already signs them, else one is made. A certificate that
    is there is replaced. Raises BadConfig."""
    names = [_checked(host) for host in hosts]
    _check_files(folder, names)
    program = shutil.which("openssl")
    if program is None:
        raise NoProgram("there is no program openssl, which makes certificates: install it (package openssl)")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as scratch:
            maker = _Maker(program, folder, Path(scratch), days)
            if not (folder / CA_CERT).exists():
                maker.make_authority()
            return [maker.make_certificate(each) for each in names]
    except OSError as error:
        raise BadConfig(f"cannot write certificates into {folder}: {error.strerror}", param="DIR") from error


def _checked(host: str) -> list[str]:
    names = host.split(",")
    for name in names:
        if not (_is_address(name) or _NAME.fullmatch(name)):
            expected = "names of hosts or their addresses, joined by commas"
            raise BadConfig(f"--host is {quoted(host)}, expected {expected}", param="--host")
    return names


def _check_files(folder: Path, names: Sequence[Sequence[str]]) -> None:
    """No file may be written over another one. Raises BadConfig."""
    stems = [_stem(each) for each in names]
    for stem in stems:
        if f"{stem}.pem" == CA_CERT:
            expected = f"another name before it: the file {CA_CERT} is the authority's"
            raise BadConfig(f"--host is {quoted(stem)}, expected {expected}", param="--host")
        if stems.count(stem) > 1:
            expected = "another name first in each, as files are called by it"
            raise BadConfig(f"--host begins with {quoted(stem)} more than once, expected {expected}", param="--host")
    found = [name for name in (CA_CERT, CA_KEY) if (folder / name).exists()]
    if len(found) == 1:
        missing = CA_KEY if found == [CA_CERT] else CA_CERT
        raise BadConfig(
            f"{folder} has {found[0]} and no {missing}, expected both of an authority or neither: nothing is replaced",
            param="DIR",
        )


def _stem(names: Sequence[str]) -> str:
    return names[0].replace("*", "_")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return "%" not in name


class _Maker:
    def __init__(self, program: str, folder: Path, scratch: Path, days: int) -> None:
        self._program = program
        self._folder = folder
        self._scratch = scratch
        self._days = ("-days", str(days))

    def make_authority(self) -> None:
        config = self._config("Baton test authority", ["unused"])
        cert, key = self._scratch / CA_CERT, self._scratch / CA_KEY
        self._run("req", "-x509", "-new", *_NEW_KEY, *self._days, "-config", config, "-extensions", "ca",
                  "-keyout", key, "-out", cert)  # fmt: skip
        self._keep(key, cert)

    def make_certificate(self, names: list[str]) -> Path:
        stem = _stem(names)
        config = self._config(names[0][:_MAX_COMMON_NAME_CHARS], names)
        key, request, cert = (self._scratch / f"{stem}{end}" for end in (".key", ".csr", ".pem"))
        self._run("req", "-new", *_NEW_KEY, "-config", config, "-keyout", key, "-out", request)
        self._run("x509", "-req", "-in", request, "-CA", self._folder / CA_CERT, "-CAkey", self._folder / CA_KEY,
                  "-set_serial", f"0x1{secrets.token_hex(15)}", *self._days, "-extfile", config, "-extensions", "peer",
                  "-out", cert)  # fmt: skip
        self._keep(key, cert)
        return self._folder / cert.name

    def _config(self, common_name: str, names: Sequence[str]) -> Path:
        alternatives = ", ".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)
        file = self._scratch / "openssl.cnf"
        file.write_text(_CONFIG.format(common_name=common_name, alternatives=alternatives))
        return file

    def _keep(self, *made: Path) -> None:
        """Each is whole when it gets its name: processes read them again when they change."""
        for file in made:
            os.replace(file, self._folder / file.name)

    def _run(self, *arguments: str | Path) -> None:
        command = [self._program, *map(str, arguments)]
        # Keys are read by their user alone.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
            umask=0o077,
        )
        if done.returncode != 0:
            raise BadConfig(f"openssl {arguments[0]} failed: {done.stderr.strip()[-500:]}")
