"""What the OpenAPI document is put together from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Json = dict[str, Any]

JSON = "application/json"
BODY = (408, 413)
"""Errors of every route that reads a body."""

TEXT: Json = {"type": "string"}
NULLABLE_TEXT: Json = {"type": ["string", "null"]}
NUMBER: Json = {"type": "integer"}
OBJECT: Json = {"type": "object", "additionalProperties": True}
MODEL: Json = {**TEXT, "minLength": 1, "description": "A name from /v1/models; `vllm/` or `openai/` may precede it."}
SECONDS: Json = {"type": ["integer", "null"], "description": "Unix seconds."}


@dataclass(frozen=True, slots=True)
class Own:
    """What FastAPI can't see in one of its routes."""

    answer: str
    """Name of the schema of a good answer."""
    errors: tuple[int, ...] = ()
    """Beyond those of every route."""
    bodies: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """The request's body, which the route reads by hand: the name of its schema by media type."""
    body_required: bool = True
    media_type: str = JSON
    """Of a good answer."""
    idempotent: bool = False
    """Whether it takes an Idempotency-Key."""


def ref(name: str) -> Json:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def shape(properties: Json, *, required: bool = True) -> Json:
    """An object with just these properties, all of them there unless not `required`."""
    content: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**content, "required": list(properties)} if required else content


def numbers(*names: str) -> Json:
    """An object of counts."""
    return shape({name: {**NUMBER, "minimum": 0} for name in names})


def listed(of: str, more: Json | None = None) -> Json:
    """A list of these, with `more` beside it."""
    return shape({"object": {"const": "list"}, "data": {"type": "array", "items": ref(of)}, **(more or {})})


def deleted(kind: str) -> Json:
    """The answer to a deletion."""
    return shape({"id": TEXT, "object": {"const": kind}, "deleted": {"const": True}})
