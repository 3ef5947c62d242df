"""Answers as a cluster would give them that takes ``factor`` times as long as a simulated run."""

from __future__ import annotations

from loadgen.client import Answer
from loadgen.load import Load
from loadgen.run import Outcome
from planner.results import Run


def replayed(load: Load, run: Run, factor: float = 1.0, late_s: float = 0.0) -> Outcome:
    """``late_s``: of the generator, in which the cluster has done nothing."""
    answers = []
    for number, (request, served) in enumerate(zip(load.requests, run.served, strict=True)):
        assert served.first_token_s is not None
        assert served.ended_s is not None
        sent_s, arrival_s = request.due_s + late_s, served.request.arrival_s
        first_s, last_s = (sent_s + factor * (at_s - arrival_s) for at_s in (served.first_token_s, served.ended_s))
        gap_s = (last_s - first_s) / max(1, request.output_tokens - 1)
        stamps_s = tuple(first_s + i * gap_s for i in range(request.output_tokens))
        answers.append(Answer(number, request, request.due_s, sent_s, stamps_s[-1], stamps_s, 200))
    return Outcome(load, tuple(answers), max(answer.ended_s for answer in answers))
