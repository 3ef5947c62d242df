"""Limits of docs/operating.md that no other test reaches: texts and lists of a request, and messages that a node does
not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from baton import errors
from baton.node_messages import Cancel
from router.config import LinkConfig
from router.flow.messages import Prompt
from router.nodes.sessions import NodeLink, hello
from router.turns import Turns
from tests.support.fake_nodes import FakeCluster, FakeConfig
from tests.support.router import VOCAB_SIZE, baseline, router_beside, write_model_folder


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


# Field, the largest value that is taken (None: not tried), one that is not, and what the refusal says.
REFUSED: list[tuple[str, Any, Any, str]] = [
    ("stop", ["@"] * 16, ["@"] * 17, "17 stop strings, expected at most 16"),
    ("stop", ["@" * 1024], ["@" * 1025], "1025 characters, expected 1 to 1024"),
    ("request_id", "r" * 128, "r" * 129, "expected 1 to 128"),
    ("cache_salt", "s" * 256, "s" * 257, "257 characters, expected at most 256"),
    ("allowed_token_ids", [5] * 16_384, [5] * 16_385, "16384"),
    ("bad_words", ["fox"] * 256, ["fox"] * 257, "256"),
    ("bad_words", None, ["fox jumps " * 90], "expected 1 to 64"),
    ("stream_options", None, {f"a{i}": 1 for i in range(65)}, "at most 64"),
    ("tools", None, [tool(f"t{i}") for i in range(1025)], "1024"),
    ("tools", None, [tool("t" * 257)], "1 to 256 letters"),
    ("tools", None, [tool("a b")], "1 to 256 letters"),
]


async def test_lists_and_texts_are_taken_up_to_their_bound_and_refused_by_name(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "tiny")
    config = FakeConfig(vocab_size=VOCAB_SIZE, max_model_tokens=2048)
    async with FakeCluster(config, prefill=1, decode=1) as cluster:
        async with (
            router_beside(cluster, model_folder=folder) as router,
            httpx.AsyncClient(base_url=router.http or "", timeout=20) as client,
        ):
            for name, most, more, words in REFUSED:
                path = "/v1/completions"
                body: dict[str, Any] = {"prompt": "the", "max_tokens": 2}
                if name == "tools":
                    path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}]}
                if most is not None:
                    taken = await client.post(path, json={**body, name: most})
                    assert taken.status_code == 200, (name, taken.text)
                refused = await client.post(path, json={**body, name: more})
                error = refused.json()["error"]
                assert (refused.status_code, str(error["param"]).partition(".")[0]) == (400, name), refused.text
                assert words in error["message"]
                assert len(refused.text) < 600
        await baseline(cluster)


class Silent:
    """Hears nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


async def test_a_node_that_takes_no_messages_is_lost_when_so_many_wait() -> None:
    events: Any = Silent()
    link = NodeLink("127.0.0.1:1", events, hello("r", 1), LinkConfig(max_unsent=3), Turns(0.01))
    link.dial()
    try:
        for number in range(3):
            link.send(Cancel(f"s{number}", "test"), Prompt((1,)))
        with pytest.raises(errors.NodeLost, match="has 3 messages unsent"):
            link.send(Cancel("s3", "test"), Prompt((1,)))
    finally:
        await link.close()
