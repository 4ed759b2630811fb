"""`velocity jobs …`: submit, watch and read bulk jobs."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.markup import escape
from rich.table import Table

from api.cli.client import VelocityClient
from api.cli.progress import watch
from api.cli.terminal import ApiKey, Url, client_of, err, errors_for_people, fail, out

app = typer.Typer(no_args_is_help=True, help="Bulk jobs.")
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, job_…")]


@app.command()
def submit(
    file: Annotated[
        Path,
        typer.Argument(
            help="The body of POST /jobs as JSON (- for standard input); *.ndjson: the job, then an item a line."
        ),
    ],
    once: Annotated[
        str, typer.Option(metavar="KEY", help="Idempotency-Key: submitting again with the same one gives the same job.")
    ] = "",
    follow: Annotated[bool, typer.Option("--watch", help="Show progress until the job is over.")] = False,
    url: Url = None,
    key: ApiKey = "",
) -> None:
    """Submit a job; prints its id."""

    async def run() -> None:
        async with client_of(url, key) as client:
            headers = {"content-type": kind, **({"idempotency-key": once} if once else {})}
            job = await client.json("POST", "/jobs", content=body, headers=headers)
            out.print(job["id"])
            over = await _follow(client, job["id"]) if follow else None
        if over and not over["counts"]["completed"]:
            fail(f"No item of the job succeeded; it is {over['status']}.")

    kind = "application/x-ndjson" if file.suffix in {".ndjson", ".jsonl"} else "application/json"
    with errors_for_people():
        try:
            body = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        except OSError as error:
            fail(f"{file}: {error.strerror}.")
        asyncio.run(run())


@app.command("list")
def list_jobs(limit: int = 20, url: Url = None, key: ApiKey = "") -> None:
    """Your jobs, newest first."""

    async def run() -> None:
        async with client_of(url, key) as client:
            page = await client.json("GET", "/jobs", params={"limit": limit})
        table = Table("job", "name", "status", "done", "failed", "total", box=None)
        for job in page["data"]:
            counts = job["counts"]
            numbers = (str(counts[name]) for name in ("completed", "failed", "total"))
            table.add_row(job["id"], escape(job["name"] or ""), job["status"], *numbers)
        out.print(table)

    with errors_for_people():
        asyncio.run(run())


@app.command()
def show(
    job: JobId,
    follow: Annotated[bool, typer.Option("--watch", help="Show progress until the job is over.")] = False,
    url: Url = None,
    key: ApiKey = "",
) -> None:
    """One job as JSON."""

    async def run() -> None:
        async with client_of(url, key) as client:
            state = await _follow(client, job) if follow else await client.json("GET", f"/jobs/{job}")
        out.print_json(data=state)

    with errors_for_people():
        asyncio.run(run())


@app.command()
def results(
    job: JobId,
    after: Annotated[int, typer.Option(help="Only items after this input index.")] = -1,
    url: Url = None,
    key: ApiKey = "",
) -> None:
    """Finished items as NDJSON, in input order; also while the job runs."""

    async def run() -> None:
        async with client_of(url, key) as client:
            async for line in client.results(job, after):
                sys.stdout.buffer.write(orjson.dumps(line) + b"\n")

    with errors_for_people():
        asyncio.run(run())


@app.command()
def cancel(job: JobId, url: Url = None, key: ApiKey = "") -> None:
    """Stop a job; finished items are kept."""

    async def run() -> None:
        async with client_of(url, key) as client:
            state = await client.json("POST", f"/jobs/{job}/cancel")
        out.print(f"{state['id']} is {state['status']}")

    with errors_for_people():
        asyncio.run(run())


@app.command()
def retry(
    job: JobId,
    follow: Annotated[bool, typer.Option("--watch", help="Show progress until the new job is over.")] = False,
    url: Url = None,
    key: ApiKey = "",
) -> None:
    """Run the items that did not complete again, as another job; prints its id."""

    async def run() -> None:
        async with client_of(url, key) as client:
            made = await client.json("POST", f"/jobs/{job}/retry")
            out.print(made["id"])
            if follow:
                await _follow(client, made["id"])

    with errors_for_people():
        asyncio.run(run())


@app.command()
def delete(job: JobId, url: Url = None, key: ApiKey = "") -> None:
    """Delete a job that is over, with its input and results."""

    async def run() -> None:
        async with client_of(url, key) as client:
            await client.json("DELETE", f"/jobs/{job}")
        out.print(f"{job} is deleted")

    with errors_for_people():
        asyncio.run(run())


async def _follow(client: VelocityClient, job: str) -> dict[str, Any]:
    """Watch a job, say how to look again when that is broken off, and where its errors are."""
    try:
        over = await watch(client, job, err)
    except asyncio.CancelledError:
        err.print(f"The job goes on. To look again: velocity jobs show {job} --watch", soft_wrap=True)
        raise
    if over["counts"]["failed"]:
        err.print(
            f"{over['counts']['failed']} failed; the reasons: velocity jobs results {job}; "
            f"again: velocity jobs retry {job}",
            soft_wrap=True,
        )
    return over
