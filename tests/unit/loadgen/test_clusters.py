"""Clusters to start: what is asked for, and one that does not start."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from baton.errors import BadConfig, Unavailable
from loadgen.clusters import Shape, started


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("1+2", "1+2", "--prefill 1 --decode 2"),
        ("split=1+1", "split", "--prefill 1 --decode 1"),
        ("2", "2", "--mixed 2"),
        ("1+1+3", "1+1+3", "--prefill 1 --decode 1 --mixed 3"),
        ("two mixed=2 --tbt-target-ms 100", "two mixed", "--mixed 2 --tbt-target-ms 100"),
        ("2 --tbt-target-ms=100", "2 --tbt-target-ms=100", "--mixed 2 --tbt-target-ms=100"),
        ("a=1+1 --api-key 'x y'", "a", "--prefill 1 --decode 1 --api-key|x y"),
    ],
)
def test_a_shape_is_workers_and_options(text, name, options):
    words = [word for part in options.split("|") for word in ([part] if "x y" in part else part.split())]
    assert Shape.parse(text) == Shape(name, tuple(words))


@pytest.mark.parametrize("text", ["", "a=", "two", "1+x", "1+1+1+1", "a='1"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(BadConfig, match=r"expected .*PREFILL\+DECODE"):
        Shape.parse(text)


async def test_a_cluster_that_does_not_start_says_why(tmp_path: Path):
    with pytest.raises(Unavailable, match=r"the cluster a b did not start: .*no-such-model"):
        async with started(Shape("a b", ("--mixed", "1")), str(tmp_path / "no-such-model"), tmp_path):
            pytest.fail("it cannot be ready")


_BENCH = """
import asyncio, signal, sys
from pathlib import Path
from loadgen import clusters
# Where the tests run in the background of a shell, it may be ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
clusters._PROGRAM = Path(sys.argv[1])
async def main():
    async with clusters.started(clusters.Shape("x", ()), "m", Path(sys.argv[2])) as cluster:
        print(cluster.http, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
_UP = """
import json, os, sys, time
from pathlib import Path
Path(sys.argv[sys.argv.index("--ready-file") + 1]).write_text(json.dumps(
    {"http": str(os.getpid()), "grpc": "", "router_pid": 1, "nodes": []}))
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
async def test_a_cluster_ends_with_the_program_that_started_it(tmp_path: Path, how: signal.Signals):
    (tmp_path / "up.py").write_text(_UP)
    bench = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _BENCH, str(tmp_path / "up.py"), str(tmp_path)),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=dict(os.environ),
    )  # fmt: skip
    assert bench.stdout is not None
    async with asyncio.timeout(60):
        launcher = psutil.Process(int(await bench.stdout.readline()))
        bench.send_signal(how)
        await bench.wait()
        await asyncio.to_thread(launcher.wait)
