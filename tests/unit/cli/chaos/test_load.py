"""What a chaos run asks: the same for one seed, of every kind, by clients of which some behave badly."""

from __future__ import annotations

import json
from collections import Counter

from cli.chaos.load import Manner, behaviour, demo_questions, own_questions


def test_every_kind_of_request_is_among_them() -> None:
    found = demo_questions(3, 12)
    assert found == demo_questions(3, 12) != demo_questions(4, 12)
    assert Counter(q.kind for q in found) == {"recall": 4, "long": 2, "sampled": 2, "json": 2, "tools": 2}
    assert all((q.expected is not None) == (q.kind == "recall") for q in found)
    assert all("seed" in q.body for q in found if q.body["temperature"])
    assert len({json.dumps(q.body) for q in found}) == 12


def test_a_body_has_its_model_and_id() -> None:
    (question,) = own_questions(1, 1)
    body = json.loads(question.bytes_of("m", "chaos-7"))
    assert (body["model"], body["request_id"], body["stream"], body["return_token_ids"]) == ("m", "chaos-7", True, True)
    assert len(body["prompt"]) == 64


def test_some_clients_leave_and_some_read_slowly() -> None:
    found = [behaviour(1, number) for number in range(2000)]
    counts = Counter(each.manner for each in found)
    assert counts[Manner.READS] > 1600
    assert counts[Manner.LEAVES] > 100
    assert counts[Manner.DAWDLES] > 60
    assert found == [behaviour(1, number) for number in range(2000)] != [behaviour(2, number) for number in range(2000)]
    assert all(0.01 <= each.pause_s <= 0.1 for each in found if each.manner is Manner.DAWDLES)
