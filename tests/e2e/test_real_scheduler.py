"""velocity's scheduler in the real vLLM changes when tokens are computed, never which."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu.equality import compare
from bench.gpu.model import make_model

TIGHT = ["--max-model-len", "256", "--num-gpu-blocks-override", "14", "--block-size", "32"]


def test_answers_are_the_stock_schedulers_under_churn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, in float32, with so few KV blocks that bulk is parked and preempted while people come and go."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    found = compare(make_model(tmp_path / "model", "tiny"), tmp_path / "out", count=12, flags=TIGHT, dummy=True)
    assert len({stock for stock, _ in found["pairs"]}) > 12  # different prompts, different answers
    assert all(stock == velocity for stock, velocity in found["pairs"])
    assert not any(stock.startswith("failed") for stock, _ in found["pairs"])
    assert found["report"]["steps"]["interactive"] > 0
    assert found["report"]["preemptions"] > 0
