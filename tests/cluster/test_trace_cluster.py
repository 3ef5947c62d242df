"""A real run's trace: layer-wise transfers lie under the prompt, and their overlap is what the reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.trace import overlap_shares
from tests.support import trace_reader
from tests.support.cluster import StartCluster
from tests.support.recall import ask_all, baton, recall


# Over tcp a trace is written by the same code; what is sent over it, test_smoke counts.
@pytest.mark.parametrize("transport", ["shm", pytest.param("tcp", marks=pytest.mark.long)])
def test_overlap_in_the_trace_equals_the_metric(
    start_cluster: StartCluster, demo_model: Path, tmp_path: Path, transport: str
) -> None:
    cluster = start_cluster(
        demo_model, prefill=1, decode=1, transport=transport, arguments=("--layerwise-from-kib", "0")
    )
    ask_all(cluster, recall(41, 8))
    path = tmp_path / "trace.json"
    baton("trace", "--router", cluster.grpc, "--last", "0", "-o", str(path))
    document = json.loads(path.read_text())
    seen = trace_reader.read(document)
    shares = overlap_shares(document)
    assert seen.overlap() == pytest.approx(shares, abs=1e-6)
    assert {start.args["sequence"] for start, _ in seen.arrows} == set(shares)
    assert {end.category for _, end in seen.arrows} <= {"decode", "mixed"}
    events = document["traceEvents"]
    requests = [e["args"] for e in events if e.get("cat") == "request"]
    reported = [x for x in requests if "transfer_total_s" in x]
    assert len(requests) == 8
    # A short answer can be complete before the report of its transfer is in.
    assert reported
    for request in reported:
        sequence = f"{request['request']}/{request['attempts'] - 1}"
        assert shares[sequence] == pytest.approx(
            1 - request["transfer_exposed_s"] / request["transfer_total_s"], abs=1e-5
        )
    assert {e["cat"] for e in events if e["ph"] == "X"} >= {
        *("request", "stage", "prefill", "decode", "transfer", "exposed", "write")
    }
    writes = [e for e in events if e.get("cat") == "write"]
    assert {e["args"]["sequence"] for e in writes} == set(shares)
    for node in document["otherData"]["nodes"].values():
        assert not node["unreachable"]
        # Processes of one machine read one clock.
        assert abs(node["clock_offset_s"]) <= node["clock_error_s"]
