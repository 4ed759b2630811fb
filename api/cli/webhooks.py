"""`velocity webhooks …`: the secret that receivers check signatures with, and a test event."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from api.cli.terminal import ApiKey, Url, client_of, errors_for_people, fail, out

app = typer.Typer(no_args_is_help=True, help="Webhooks: how you hear that a job is over.")


@app.command()
def secret(url: Url = None, key: ApiKey = "") -> None:
    """Print the secret that receivers check signatures with."""

    async def run() -> str:
        async with client_of(url, key) as client:
            return str((await client.json("GET", "/webhooks/secret"))["secret"])

    with errors_for_people():
        out.print(asyncio.run(run()), soft_wrap=True)


@app.command("test")
def send_test(
    target: Annotated[str, typer.Argument(metavar="ADDRESS", help="Where to send the event: https://…")],
    url: Url = None,
    key: ApiKey = "",
) -> None:
    """Have velocity send one signed test event now; fails if it was not delivered."""

    async def run() -> None:
        async with client_of(url, key) as client:
            result = await client.json("POST", "/webhooks/test", json={"url": target})
        if not result["delivered"]:
            fail(f"Not delivered after {result['seconds']:.2f} s: {result['error']}")
        out.print(f"Delivered in {result['seconds']:.2f} s: the receiver answered {result['status_code']}.")

    with errors_for_people():
        asyncio.run(run())
