"""The OpenAPI document of the HTTP API: the paths that are served, and the bodies that they take."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from baton import __version__
from router.messages.request import MessagesBody
from router.openai.embeddings import EmbeddingBody
from router.openai.neutral import neutral_fields
from router.openai.request import ChatBody, CompletionBody
from router.openai.tokenize import DetokenizeBody, TokenizeBody, TokenizeChatBody
from router.responses.request import ResponsesBody

_SCHEMA = "#/components/schemas/{model}"
_JSON, _EVENTS = "application/json", "text/event-stream"


# A test fails for a path that is not here.
_BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": MessagesBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def document(posts: Sequence[str], others: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """``posts``: paths that take a body. ``others``: the methods of each of the other paths."""
    models: list[type[BaseModel]] = list(dict.fromkeys([*_BODIES.values(), TokenizeChatBody]))
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_SCHEMA)
    components = schemas.get("$defs", {})
    for model in models:
        components[model.__name__]["properties"] |= _neutral(model)
    paths: dict[str, Any] = {}
    for path, methods in others.items():
        shown = path.replace(":path}", "}")
        names = re.findall(r"{(\w+)}", shown)
        parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
        operation = {"responses": _responses(), "parameters": parameters}
        # HEAD is where GET is.
        paths[shown] = {method.lower(): operation for method in methods if method != "HEAD"}
    for path in posts:
        # /tokenize takes either.
        bodies = [body for body in (_BODIES.get(path), TokenizeChatBody if path == "/tokenize" else None) if body]
        schema: dict[str, Any] = {"anyOf": [{"$ref": _SCHEMA.format(model=body.__name__)} for body in bodies]}
        wanted = {"required": True, "content": {_JSON: {"schema": schema}}}
        paths[path] = {"post": {"requestBody": wanted, "responses": _responses(_JSON, _EVENTS)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # A router without API keys asks for none.
        "security": [{"key": []}, {}],
    }


def _neutral(model: type[BaseModel]) -> dict[str, Any]:
    """Fields that are taken with a value that asks for nothing."""
    if not issubclass(model, ChatBody | CompletionBody):
        return {}
    fields = neutral_fields(is_chat=issubclass(model, ChatBody))
    return {name: {"enum": [None, *values], "description": why} for name, (values, why) in fields.items()}


def _responses(*kinds: str) -> dict[str, Any]:
    content: dict[str, Any] = {"content": {kind: {} for kind in kinds}} if kinds else {}
    return {"200": {"description": "Success"} | content, "default": {"description": "An error, in the API's form"}}
