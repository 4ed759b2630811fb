"""A proxy as most people write it first: FastAPI, httpx, uvicorn. `python -m bench.gateway.plain ENGINE_URL PORT`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


def build(engine_url: str) -> FastAPI:
    """No keys, no limits, no accounting. Only the pool is not httpx's own, which ends at 100 connections."""
    limits = httpx.Limits(max_keepalive_connections=1000)
    client = httpx.AsyncClient(base_url=engine_url, timeout=600, limits=limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        if not body.get("stream"):
            answer = await client.post("/v1/chat/completions", json=body)
            return JSONResponse(answer.json(), answer.status_code)

        async def events() -> AsyncIterator[bytes]:
            async with client.stream("POST", "/v1/chat/completions", json=body) as upstream:
                async for chunk in upstream.aiter_bytes():
                    yield chunk

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def main() -> None:
    """Serve until a signal comes."""
    uvicorn.run(build(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")


if __name__ == "__main__":
    main()
