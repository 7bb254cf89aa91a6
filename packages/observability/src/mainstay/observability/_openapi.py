"""The problems in an application's OpenAPI: each operation shows what it answers where it fails."""

from __future__ import annotations

import json
from typing import Any, cast

from fastapi import FastAPI

from mainstay.observability.errors import MEDIA_TYPE

_NAME = "MainstayProblem"
_REF = {"$ref": f"#/components/schemas/{_NAME}"}
_CONTENT = {MEDIA_TYPE: {"schema": _REF}}
_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
_REPLACED = "#/components/schemas/HTTPValidationError"
_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "What went wrong (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "correlation_id"],
    "properties": {
        "type": {"type": "string", "format": "uri", "description": "Names the kind of problem; made of the code."},
        "title": {"type": "string", "description": "The kind of problem in a few words."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "This problem in a sentence, for people."},
        "instance": {
            "type": "string",
            "format": "uri",
            "description": "Names this problem; made of the correlation id.",
        },
        "code": {
            "type": "string",
            "pattern": "^(AUTH|VAL|RES|SYS|EXT|RATE|BIZ)_[A-Z0-9_]+$",
            "description": "Stable identifier of the kind of problem.",
        },
        "correlation_id": {
            "type": ["string", "null"],
            "description": "Names the request in logs and traces; the header x-correlation-id has it, too.",
        },
        "retry_after_seconds": {"type": "number", "minimum": 0},
        "errors": {
            "type": "array",
            "description": "What is wrong with the request.",
            "items": {
                "type": "object",
                "required": ["location", "message", "type"],
                "properties": {
                    "location": {
                        "type": "array",
                        "description": "From the outside in; a name that the caller has chosen is `*`.",
                        "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                    },
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                },
            },
        },
        "details": {"description": "More for programs."},
    },
}


def show_problems(api: FastAPI) -> None:
    """Put the problem in place of FastAPI's 422, and where an operation says nothing of its errors."""
    made = api.openapi
    if getattr(made, "shows_problems", False):
        return

    def openapi() -> dict[str, Any]:
        schema = made()
        if _NAME not in schema.setdefault("components", {}).setdefault("schemas", {}):  # made() remembers its schema
            _show(schema)
        return schema

    openapi.shows_problems = True  # type: ignore[attr-defined]  # a mark of ours on a function
    api.openapi = openapi  # type: ignore[method-assign]  # as FastAPI has it done


def _show(schema: dict[str, Any]) -> None:
    for path in cast("dict[str, dict[str, Any]]", schema.get("paths", {})).values():
        for method in _METHODS:
            if method in path:
                responses: dict[str, Any] = path[method].setdefault("responses", {})
                for status, response in responses.items():
                    if status[:1] in {"4", "5"} and "$ref" not in response and _says_nothing(response):
                        response["content"] = _CONTENT
                responses.setdefault("default", {"description": "Problem", "content": _CONTENT})
    schemas = schema["components"]["schemas"]
    schemas[_NAME] = _SCHEMA
    if _REPLACED not in json.dumps(schema["paths"]):
        schemas.pop("HTTPValidationError", None)
        if "#/components/schemas/ValidationError" not in json.dumps(schema):
            schemas.pop("ValidationError", None)


def _says_nothing(response: dict[str, Any]) -> bool:
    content: dict[str, Any] = response.get("content") or {}
    return not content or content.get("application/json", {}).get("schema", {}).get("$ref") == _REPLACED
