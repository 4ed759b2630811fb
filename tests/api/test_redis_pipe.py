"""The shared connection to Redis: order, scripts, refusals, and a Redis that is slow, gone, or back."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.redis_pipe import RedisPipe, Script, Word
from engine.ports import free_port
from tests.conftest import REDIS_7, redis_server
from workers.errors import LedgerFull, LedgerUnavailable

ECHO = Script("return {ARGV[1], #ARGV}")


@pytest.fixture
def server() -> Iterator[tuple[str, Popen[bytes]]]:
    """A Redis that may be treated badly."""
    with redis_server() as (url, process):
        yield url, process


@pytest.fixture
async def pipe(server: tuple[str, Popen[bytes]]) -> AsyncIterator[RedisPipe]:
    pipe = RedisPipe(server[0], 5)
    yield pipe
    await pipe.aclose()


async def test_many_at_once_each_get_their_own_answer(pipe: RedisPipe) -> None:
    async def one(number: int) -> bool:
        if number % 3:
            return bool(await pipe.run(ECHO, f"a{number}", 2.5) == [b"a%d" % number, 2])
        return bool(await pipe.call("ECHO", number) == b"%d" % number)

    assert all(await asyncio.gather(*(one(number) for number in range(1000))))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.one_of(st.text(), st.binary(max_size=5000), st.integers(-(2**63), 2**63 - 1)), min_size=1))
async def test_what_is_sent_arrives_as_it_is(pipe: RedisPipe, words: list[Word]) -> None:
    expected = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    assert await pipe.run(Script("return ARGV"), *words) == expected


async def test_a_script_that_redis_has_forgotten_is_given_to_it_anew(pipe: RedisPipe) -> None:
    assert await pipe.run(ECHO, "a") == [b"a", 1]
    await pipe.call("SCRIPT", "FLUSH")
    assert await asyncio.gather(*(pipe.run(ECHO, n) for n in range(3))) == [[b"%d" % n, 1] for n in range(3)]


async def test_a_refusal_concerns_its_own_call_alone(pipe: RedisPipe) -> None:
    await pipe.call("SET", "text", "x")
    calls = [pipe.call("ECHO", "before"), pipe.call("INCR", "text"), pipe.call("ECHO", "after")]
    results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    assert results[0::2] == [b"before", b"after"]
    assert isinstance(results[1], LedgerUnavailable)
    assert "not an integer" in str(results[1])


async def test_a_full_redis_says_so(pipe: RedisPipe) -> None:
    await pipe.call("CONFIG", "SET", "maxmemory", 1)
    with pytest.raises(LedgerFull):
        await pipe.call("SET", "a", "b")
    with pytest.raises(LedgerFull):
        await pipe.run(Script("return redis.call('SET', 'a', 'b')"))


async def test_who_gives_up_does_not_shift_the_answers(pipe: RedisPipe) -> None:
    await pipe.call("PING")
    given_up = asyncio.create_task(pipe.call("ECHO", "one"))
    await asyncio.sleep(0)
    given_up.cancel()
    assert await pipe.call("ECHO", "two") == b"two"


async def test_a_frozen_redis_fails_what_waits_and_is_found_again(server: tuple[str, Popen[bytes]]) -> None:
    pipe = RedisPipe(server[0], 0.2)
    await pipe.call("PING")
    server[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    results = await asyncio.gather(*(pipe.call("PING") for _ in range(5)), return_exceptions=True)
    assert all(isinstance(result, LedgerUnavailable) for result in results)
    assert time.monotonic() - began >= 0.2
    server[1].send_signal(signal.SIGCONT)
    async with asyncio.timeout(30):
        while True:
            try:
                assert await pipe.call("ECHO", "back") == b"back"
                break
            except LedgerUnavailable:
                await asyncio.sleep(0.01)
    await pipe.aclose()


async def test_a_loop_that_was_busy_is_not_taken_for_a_slow_redis(server: tuple[str, Popen[bytes]]) -> None:
    pipe = RedisPipe(server[0], 0.2)
    await pipe.call("PING")
    waiting = asyncio.create_task(pipe.call("PING"))
    for _ in range(3):  # until it has left
        await asyncio.sleep(0)
    time.sleep(0.5)  # on purpose
    assert await waiting == b"PONG"
    await pipe.aclose()


async def test_a_connection_that_was_cut_is_made_anew(pipe: RedisPipe) -> None:
    await pipe.call("PING")
    assert await pipe.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no") == 1
    await asyncio.sleep(0.1)
    assert await pipe.call("PING") == b"PONG"


async def test_no_redis_at_all() -> None:
    pipe = RedisPipe(f"redis://127.0.0.1:{free_port()}/0", 1)
    results = await asyncio.gather(pipe.call("PING"), pipe.run(ECHO, 1), return_exceptions=True)
    assert [type(result) for result in results] == [LedgerUnavailable, LedgerUnavailable]
    await pipe.aclose()


async def test_something_else_that_answers_there() -> None:
    async def greets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greets, "127.0.0.1", 0) as other:
        pipe = RedisPipe(f"redis://127.0.0.1:{other.sockets[0].getsockname()[1]}/0", 1)
        with pytest.raises(LedgerUnavailable):
            await pipe.call("PING")
        await pipe.aclose()


@pytest.mark.parametrize("user", ["", "someone"])
async def test_password_user_and_database(pipe: RedisPipe, server: tuple[str, Popen[bytes]], user: str) -> None:
    if user:
        await pipe.call("ACL", "SETUSER", user, "on", ">secret", "~*", "+@all")
    else:
        await pipe.call("CONFIG", "SET", "requirepass", "secret")
    address = server[0].removeprefix("unix://")
    mine = RedisPipe(f"unix://{user}:secret@{address}?db=3", 5)
    assert b"db=3" in await mine.call("CLIENT", "LIST")
    await mine.aclose()
    wrong = RedisPipe(f"unix://{user}:wrong@{address}", 5)
    with pytest.raises(LedgerUnavailable, match="WRONGPASS"):
        await wrong.call("PING")
    await wrong.aclose()


@pytest.mark.skipif(not REDIS_7.exists(), reason="the embedded Redis speaks no TLS")
async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    port = free_port()
    config = (
        f"tls-port {port}\ntls-cert-file {tmp_path}/cert.pem\ntls-key-file {tmp_path}/key.pem\n"
        f"tls-ca-cert-file {tmp_path}/ca.pem\ntls-auth-clients no"
    )
    with redis_server(binary=REDIS_7, config=config):
        pipe = RedisPipe(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}/ca.pem", 5)
        assert await pipe.call("PING") == b"PONG"
        await pipe.aclose()
        stranger = RedisPipe(f"rediss://127.0.0.1:{port}/0", 5)
        with pytest.raises(LedgerUnavailable, match="certificate"):
            await stranger.call("PING")
        await stranger.aclose()
