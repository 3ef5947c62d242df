"""`/v1/responses`: reads bodies with the conversation that they continue, and keeps the responses that ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from router.api.endpoint import Asked, Endpoint
from router.api.items import Item, joined, turn_of
from router.frontend.frontend import Frontend
from router.frontend.generation import Accepted
from router.frontend.request import Caller
from router.openai.neutral import UnknownFields
from router.openai.request import parse
from router.responses.request import ResponsesBody, echoed
from router.responses.response import Heading, ResponseForm
from router.responses.store import StoredResponses


def endpoint(frontend: Frontend, unknown: UnknownFields, store: StoredResponses) -> Endpoint:
    def read(content: bytes, caller: Caller) -> Asked:
        body = parse(ResponsesBody, content, unknown)
        turns = body.turns(lambda item_id, param: store.item(caller.client, item_id, param))
        request = body.request(caller, store.history(caller.client, body.previous_response_id), turns)
        is_stored = body.store is not False and store.keeps
        echo, previous_id = echoed(body, is_stored=is_stored), body.previous_response_id

        def form(accepted: Accepted) -> ResponseForm:
            generation = accepted.generations[0]
            sampling = generation.active.flow.sampling
            heading = Heading(
                frontend.new_id(), int(time.time()), accepted.model, len(generation.prompt_token_ids),
                sampling.temperature, sampling.top_p, echo,
            )  # fmt: skip

            def keep(response: str, items: Sequence[Item]) -> None:
                said = [turn_of([item]) for item in items]
                store.put(caller.client, heading.response_id, previous_id, [*turns, joined(said)], response, said)

            return ResponseForm(heading, keep if is_stored else None)

        return Asked(request, bool(body.stream), form)

    return read
