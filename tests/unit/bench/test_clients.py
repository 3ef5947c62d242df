"""The table of clients: what a script says becomes a cell, every client speaks of every feature, the document is the
newest result, and the model is taught what the router reads."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from baton.chat import Tool
from bench.clients import environments, lm_eval, table
from bench.clients.model import CHAT_TEMPLATE, THINKS, TOOL, Examples
from bench.clients.recipes import CLIENTS, FEATURES, Client
from router.reply.formats import CallFormat, ReasoningFormat, ReplyFormat
from router.reply.parser import ReplyParser
from router.text.deltas import CallArguments, CallBegin, ContentText

SCRIPT = """
from cells import case, equal, lacks, main, streamed, told

@case("plain")
def good() -> None:
    print("a client's own words", {"feature": "plain"})
    streamed(["Ada likes", " plums."])

@case("plain")
async def also_good() -> None:
    told(1, "one")

@case("tools", "a bad one")
def bad() -> None:
    equal("jam", "plums")

lacks("embeddings", "no such thing")
main()
ENDING
"""


def ran(tmp_path: Path, ending: str = "") -> list[dict[str, str]]:
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("ENDING", ending))
    client = Client("fake", (), (), str(script))
    return environments.cells(client, folder, "http://127.0.0.1:1", "model", tmp_path)


def test_a_script_says_what_became_of_each_case(tmp_path: Path) -> None:
    assert ran(tmp_path) == [
        {"feature": "plain", "case": "good", "state": "ok", "said": ""},
        {"feature": "plain", "case": "also good", "state": "ok", "said": ""},
        {
            "feature": "tools", "case": "a bad one", "state": "failed",
            "said": "AssertionError: the answer is 'jam', expected 'plums'",
        },
        {"feature": "embeddings", "case": "", "state": "not offered", "said": "no such thing"},
    ]  # fmt: skip


def test_a_script_that_does_not_end_well_is_a_failure(tmp_path: Path) -> None:
    *cells, last = ran(tmp_path, "raise SystemExit('no luck')")
    assert len(cells) == 4
    assert (last["state"], last["case"]) == ("failed", "the script")
    assert "ended with 1" in last["said"]
    assert "no luck" in last["said"]


@pytest.mark.parametrize("line", ["words", "[1]", '{"feature": "magic", "state": "ok"}', '{"feature": "plain"}'])
def test_other_lines_are_no_cells(line: str) -> None:
    good = json.dumps({"feature": "plain", "case": "a", "state": "ok", "said": ""})
    assert list(environments.parsed(f"{line}\n{good}\n")) == [json.loads(good)]


@pytest.mark.parametrize("client", [client for client in CLIENTS if client.script], ids=lambda client: client.key)
def test_every_script_speaks_of_every_feature(client: Client) -> None:
    text = (environments.HERE / "scripts" / client.script).read_text()
    assert set(re.findall(r'\b(?:case|check|lacks)\("(\w+)"', text)) == set(FEATURES)


def test_the_cells_of_both_languages_ask_the_same() -> None:
    texts = [(environments.HERE / "support" / name).read_text() for name in ("cells.py", "cells.mjs")]
    asked = [re.findall(r'\b(QUESTION|IN_JSON|ANSWER|CALLING|TOOL|TOOL_ABOUT) = "(.*?)"', text) for text in texts]
    assert len(asked[0]) == 6
    assert asked[0] == asked[1]


CELLS = [
    {"feature": "plain", "case": "a", "state": "ok", "said": ""},
    {"feature": "plain", "case": "b", "state": "ok", "said": ""},
    {"feature": "tools", "case": "c", "state": "failed", "said": "bad | worse\nworst"},
    {"feature": "tools", "case": "d", "state": "ok", "said": ""},
    {"feature": "agent", "case": "", "state": "not offered", "said": "none"},
    {"feature": "stream", "case": "e", "state": "ok", "said": ""},
]
ROWS = [
    {"name": "one", "versions": {"one": "1.2", "two": "3"}, "not_installed": "", "cells": CELLS},
    {"name": "gone", "versions": {}, "not_installed": "no index", "cells": []},
]


def test_the_table_counts_cases() -> None:
    _, _, one, gone = table.table(ROWS).splitlines()
    assert one == "| one 1.2 | yes, 2 | yes | 1 of 2 | – |  |  |  |  |  |  |"
    assert gone == "| gone | not installed: no index |" + " |" * (len(FEATURES) - 1)
    assert table.failures(ROWS) == [("one", "tools, c", "bad / worse worst")]
    assert table.not_offered(ROWS) == [("one", "agent", "none")]


def test_the_document_has_the_newest_result() -> None:
    path = table.newest()
    assert path is not None
    text = table.DOCUMENT.read_text()
    assert table.filled(text, json.loads(path.read_text())) == text, "run `python -m bench.clients.table`"


def test_a_document_without_a_place_for_it_is_named() -> None:
    with pytest.raises(SystemExit, match="no place"):
        table.filled("nothing", {"date": "2026-01-01", "clients": []})


def test_figures_of_lm_eval_count_documents() -> None:
    assert lm_eval._accuracies({"acc,none": 0.5, "perplexity,none": 2.0, "exact_match,strict": 1.0}) == {
        "acc,none": 0.5, "exact_match,strict": 1.0
    }  # fmt: skip


def test_the_router_reads_what_the_model_is_taught() -> None:
    form = ReplyFormat.of(CHAT_TEMPLATE)
    assert form == ReplyFormat(CallFormat.HERMES, ReasoningFormat.QWEN3)
    examples = Examples(seed=5)
    drawn = [examples.draw() for _ in range(200)]
    by_kind = {example.kind: example for example in drawn if example.kind != "recalled"}
    assert by_kind.keys() == {"call", "told", "answer", "json", "extracted"}
    call = by_kind["call"]
    assert call.prompt.endswith("<|assistant|><think>\n\n</think>\n\n")
    ids = iter(f"call-{i}" for i in range(9))
    parser = ReplyParser(
        calls=form.calls, reasoning=form.reasoning, prompt_end=call.prompt, tools=[Tool(TOOL)], new_id=ids.__next__
    )
    deltas = [*parser.push(call.answer.removesuffix("<|eos|>")), *parser.close()]
    assert [delta.name for delta in deltas if isinstance(delta, CallBegin)] == [TOOL]
    arguments = "".join(delta.text for delta in deltas if isinstance(delta, CallArguments))
    assert json.loads(arguments).keys() == {"person"}
    assert not any(isinstance(delta, ContentText) for delta in deltas)


def test_reasoning_is_taught_where_a_request_turns_it_on() -> None:
    examples = Examples(seed=6)
    drawn = [examples.draw() for _ in range(200)]
    thinking = [example for example in drawn if example.prompt.endswith(THINKS) and example.kind == "answer"]
    assert thinking
    assert all("\n</think>\n\n" in example.answer for example in thinking)
