"""/admin/keys: API keys made, changed and ended by whoever has a key of the scope `admin`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api import shape
from api.asgi import read_body
from api.errors import ApiError
from api.gateway import Gateway
from api.key_store import Keys, checked
from api.keys import Key, Terms

router = APIRouter(prefix="/admin/keys")

KeyId = Annotated[str, Path(pattern=r"^[0-9a-f]{12}$")]
_BODY_MOST = 64 * 1024


class NewKey(Terms):
    """Body of POST /admin/keys."""

    tenant: str | None = Field(default=None, pattern=r"^tenant_[0-9a-f]{32}$")
    """An existing owner; without it the key gets a tenant of its own."""


class Rotation(BaseModel):
    """Body of POST /admin/keys/{id}/rotate."""

    model_config = ConfigDict(extra="forbid")

    grace_seconds: int = Field(default=0, ge=0, le=30 * 86400)
    """For how long the old text is still accepted."""


@router.post("", status_code=201)
async def create(request: Request, response: Response) -> dict[str, Any]:
    """Make a key. Its text is in `key`, this once."""
    given = checked(NewKey, await _body(request))
    terms = Terms(**given.model_dump(exclude={"tenant"}))
    key, text = await _keys(request).create(terms, given.tenant)
    response.headers["cache-control"] = "no-store"
    return {"key": text, **key_view(key)}


@router.get("")
async def list_keys(request: Request) -> dict[str, Any]:
    """Every key, oldest first."""
    return {"object": "list", "data": [key_view(key) for key in await _keys(request).all()]}


@router.get("/{key_id}")
async def show(request: Request, key_id: KeyId) -> dict[str, Any]:
    """One key."""
    return key_view(await _keys(request).get(key_id))


@router.patch("/{key_id}")
async def update(request: Request, key_id: KeyId) -> dict[str, Any]:
    """Change some of a key's terms; null takes a limit away."""
    changes = await _body(request)
    unknown = next((name for name in changes if name not in Terms.model_fields), None)
    if unknown is not None:
        raise ApiError(400, f"A key has no {unknown!r}.", param=unknown)
    return key_view(await _keys(request).update(key_id, **changes))


@router.post("/{key_id}/revoke")
async def revoke(request: Request, key_id: KeyId) -> dict[str, Any]:
    """End a key for good; its streams are ended within seconds, its tenant's jobs go on."""
    return key_view(await _keys(request).revoke(key_id))


@router.post("/{key_id}/rotate")
async def rotate(request: Request, key_id: KeyId, response: Response) -> dict[str, Any]:
    """A new text for the key, in `key`, this once. Limits, usage and tenant stay."""
    given = checked(Rotation, await _body(request, empty={}))
    key, text = await _keys(request).rotate(key_id, given.grace_seconds)
    response.headers["cache-control"] = "no-store"
    return {"key": text, **key_view(key)}


def key_view(key: Key) -> dict[str, Any]:
    """A key as operators see it: nothing that opens anything."""
    hidden = {"hash", "former_hash", "version"}
    return {"object": "key", **key.model_dump(mode="json", exclude=hidden), "usable": key.usable}


async def _body(request: Request, empty: dict[str, Any] | None = None) -> dict[str, Any]:
    gateway: Gateway = request.app.state.gateway
    raw = await read_body(request.receive, _BODY_MOST, gateway.settings.body_timeout)
    return empty if empty is not None and not raw else shape.parse(raw)


def _keys(request: Request) -> Keys:
    gateway: Gateway = request.app.state.gateway
    return gateway.keys
