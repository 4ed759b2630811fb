"""Chat on the real vLLM through a real `velocity up`: official clients, tools, schemas, the engine's refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from tests.e2e.conftest import Up

pytestmark = pytest.mark.vllm
MODEL = "velocity-30b"
TRUE_NAME = "SmolLM2-135M-Instruct"
NODE = Path(__file__).parent / "node"
PROMPT = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def client(real: Up) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real.url}/v1", api_key=real.key, max_retries=0)


def test_the_sample_request_works_verbatim(real: Up) -> None:
    body = {"model": MODEL, "messages": PROMPT, "max_tokens": 8192, "stream": True}
    pieces = 0
    with real.client() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = orjson.loads(line[6:])
                assert chunk["model"] == TRUE_NAME
                assert "usage" not in chunk or chunk["usage"] is None
                pieces += bool(chunk["choices"][0]["delta"].get("content"))
            if pieces > 20:  # the model may ramble; what it streams is what counts
                break
    assert pieces > 1


def test_the_openai_client_streams_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hello."}], max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text
    assert chunks[-1].usage
    assert 0 < chunks[-1].usage.completion_tokens <= 24
    assert chunks[0].model == TRUE_NAME


def test_the_openai_client_without_stream_and_completions_and_responses(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=8)
    assert chat.choices[0].message.content
    assert client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8).choices[0].text
    response = client.responses.create(model=MODEL, input="Hi", max_output_tokens=16)
    assert response.output_text
    assert response.usage
    events = [
        event.type for event in client.responses.create(model=MODEL, input="Hi", max_output_tokens=8, stream=True)
    ]
    assert events[-1] in {"response.completed", "response.incomplete"}


def test_a_required_tool_is_called_and_its_result_taken(client: openai.OpenAI) -> None:
    tool: Any = {  # plain dicts are what people send
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The time in a city.",
            "strict": True,  # without it vLLM asks for a call, but not for arguments that fit the schema
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    question: Any = {"role": "user", "content": "What time is it in Paris?"}
    first = client.chat.completions.create(
        model=MODEL,
        messages=[question],
        tools=[tool],
        tool_choice="required",
        max_tokens=200,
    )
    calls = first.choices[0].message.tool_calls
    assert calls
    assert calls[0].type == "function"
    assert calls[0].function.name == "get_time"
    assert orjson.loads(calls[0].function.arguments)["city"] in {"Paris", "Rome"}
    turn: Any = {"role": "assistant", "content": None, "tool_calls": [calls[0].model_dump()]}
    result: Any = {"role": "tool", "tool_call_id": calls[0].id, "content": "12:34"}
    second = client.chat.completions.create(
        model=MODEL,
        messages=[question, turn, result],
        tools=[tool],
        tool_choice="none",
        max_tokens=24,
    )
    assert second.choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_a_json_schema_is_kept_to(real: Up, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {
            "colour": {"type": "string", "enum": ["red", "green"]},
            "count": {"type": "integer", "maximum": 9},
        },
        "required": ["colour"],
        "additionalProperties": False,
    }
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": "A colour?"}], "max_tokens": 80, "stream": stream,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    }  # fmt: skip
    with real.client() as http:
        response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    if stream:
        events = [orjson.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    else:
        text = response.json()["choices"][0]["message"]["content"]
    assert orjson.loads(text)["colour"] in {"red", "green"}


def test_a_prompt_beyond_the_context_is_the_engines_400_in_our_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"
    assert "8192" in caught.value.message


def test_a_prompt_that_just_fits_is_not_refused_for_its_max_tokens(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "word " * 8100}], max_tokens=8192, stop=["e", "a", " "]
    )
    assert chat.usage
    assert chat.usage.total_tokens <= 8192


def test_unknown_models_embeddings_and_wrong_types(client: openai.OpenAI, real: Up) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as refused:  # this model has none
        client.embeddings.create(model=MODEL, input="Hi")
    assert 400 <= refused.value.status_code < 500
    with real.client() as http:
        response = http.post("/v1/chat/completions", json={"model": MODEL, "messages": "Hi", "max_tokens": "many"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_models_and_prefixes(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [TRUE_NAME, MODEL]
    assert client.models.retrieve("vllm/velocity-30b").id == TRUE_NAME
    chat = client.chat.completions.create(
        model="openai/velocity-30b", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
    )
    assert chat.model == TRUE_NAME


def test_the_official_node_clients_stream(real: Up) -> None:
    if not shutil.which("node") or not (NODE / "node_modules").is_dir():
        pytest.skip("Node or its packages are missing (see tests/tools.sh)")
    env = os.environ | {"BASE_URL": f"{real.url}/v1", "API_KEY": real.key, "MODEL": MODEL}
    ran = subprocess.run(
        ["node", "stream.mjs"], cwd=NODE, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr
    reports = {report["client"]: report for report in map(orjson.loads, ran.stdout.splitlines())}
    assert set(reports) == {"openai", "openai-responses", "ai-sdk-chat", "ai-sdk-responses", "ai-sdk-object"}
    for name in ("openai", "openai-responses", "ai-sdk-chat", "ai-sdk-responses"):
        assert reports[name]["text"], name
    assert reports["openai"]["pieces"] > 1
    assert reports["openai"]["usage"]["completion_tokens"] > 0
    assert reports["ai-sdk-chat"]["errors"] == reports["ai-sdk-responses"]["errors"] == []
    assert reports["ai-sdk-object"]["object"]["colour"] in {"red", "green", "blue"}


def test_the_chat_command_streams_to_the_terminal(real: Up) -> None:
    ran = real.velocity("chat", "Say hello.", "--max-tokens", "16")
    assert ran.stdout.strip()
    assert "first token after" in ran.stderr
    wrong = real.velocity("chat", "Hi", "--key", "vk_wrong", check=False)
    assert wrong.returncode == 1
    assert "not valid" in wrong.stderr


def test_health_is_ok(real: Up) -> None:
    assert httpx.get(f"{real.url}/health").json() == {"status": "ok"}
    with real.client() as http:
        health = http.get("/health")
    assert health.status_code == 200
    assert health.json() == {
        "status": "ok", "engine": "ok", "protection": "scheduler", "redis": "ok", "workers": "ok",
    }  # fmt: skip
