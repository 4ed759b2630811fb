"""One stream through velocity and one straight at vLLM, in turns: tokens per second, TTFT, and their ratios.

    python -m bench.single_stream --url http://127.0.0.1:8001 --key vk_… --engine-url http://127.0.0.1:8000

`velocity up` names the engine's address in DATA/up.json. Prompts never repeat, so that no arm profits from the prefix
cache of another.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Run:
    """One streamed answer: seconds to the first token, and tokens per second after it."""

    ttft: float
    rate: float


def stream(url: str, key: str, model: str, tokens: int) -> Run:
    """Stream one answer of exactly `tokens` tokens and time it."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=300)
    content = f"{uuid.uuid4()} Write a React component."
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "ignore_eos": True,
        "temperature": 0, "stream": True,
    }  # fmt: skip
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{url} answered {response.status}: {response.read().decode()}")
    arrivals = [
        time.perf_counter()
        for line in response
        if line.startswith(b"data: {") and b'"content":' in line and b'"role"' not in line
    ]
    connection.close()
    return Run(arrivals[0] - began, (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]))


def main() -> None:
    """Run both arms in turns and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8001")
    parser.add_argument("--key", default="none")
    parser.add_argument("--engine-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="velocity-30b")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    arms = {"direct": options.engine_url, "velocity": options.url}
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for number in range(options.rounds + 1):
        order = list(arms) if number % 2 else list(reversed(arms))
        for name in order:
            run = stream(arms[name], options.key, options.model, options.tokens)
            if number:  # the first round warms up
                runs[name].append(run)
    for name, found in runs.items():
        rate, ttft = (statistics.median(values) for values in ([r.rate for r in found], [r.ttft for r in found]))
        print(f"{name:9} {rate:7.2f} tokens/s   TTFT {ttft * 1000:7.1f} ms   (medians of {len(found)})")
    pairs = list(zip(runs["velocity"], runs["direct"], strict=True))
    print(f"velocity / direct, median of pairs: tokens/s {statistics.median(v.rate / d.rate for v, d in pairs):.4f}, "
          f"TTFT {statistics.median(v.ttft / d.ttft for v, d in pairs):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
