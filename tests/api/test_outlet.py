"""ASGI's coroutines run by hand: what leaves at once, what waits, and who has gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.asgi import Begun, Departure, Message
from api.outlet import AsgiOutlet


class Client:
    """ASGI's `send` of a client that takes nothing while its `gate` is shut."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def send(self, message: Message) -> None:
        await self.gate.wait()
        self.got.append(message.get("body", message.get("status")))

    async def receive(self) -> Message:
        return {"type": "http.disconnect"}

    def outlet(self) -> AsgiOutlet:
        return AsgiOutlet(self.receive, self.send)


async def test_everything_leaves_at_once_for_a_client_that_keeps_up() -> None:
    client = Client()
    outlet = client.outlet()
    assert outlet.start(200, [])
    assert outlet.write(b"a")
    assert outlet.write(b"b")
    assert outlet.end()
    assert client.got == [200, b"a", b"b", b""]
    await outlet.drained()


async def test_for_a_slow_one_it_leaves_in_order_when_there_is_room() -> None:
    client = Client()
    outlet = client.outlet()
    outlet.start(200, [])
    client.gate.clear()
    assert not outlet.write(b"a")
    blocked = [outlet.blocked]
    assert not outlet.write(b"b")
    draining = asyncio.create_task(outlet.drained())
    await asyncio.sleep(0)
    blocked.append(outlet.blocked)
    assert client.got == [200]
    client.gate.set()
    await draining
    assert [*blocked, outlet.blocked] == [True, True, False]
    assert outlet.write(b"c")
    assert client.got == [200, b"a", b"b", b"c"]


async def test_who_gives_up_waiting_ends_the_send() -> None:
    client = Client()
    outlet = client.outlet()
    client.gate.clear()
    outlet.write(b"a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await outlet.drained()
    client.gate.set()
    assert outlet.write(b"b")
    assert client.got == [b"b"]


async def test_a_fault_of_send_is_raised_where_it_shows() -> None:
    async def broken(message: Message) -> None:
        if message["body"] == b"later":
            await asyncio.sleep(0)
        raise RuntimeError

    outlet = AsgiOutlet(Client().receive, broken)
    with pytest.raises(RuntimeError):
        outlet.write(b"at once")
    assert not outlet.write(b"later")
    with pytest.raises(RuntimeError):
        await outlet.drained()


async def test_a_coroutine_begun_by_hand_goes_on_through_several_waits() -> None:
    async def waits(times: int) -> int:
        for _ in range(times):
            await asyncio.sleep(0.001)
            await asyncio.sleep(0)
        return times

    assert Begun(waits(0)).value == 0
    begun = Begun(waits(3))
    assert not begun.done
    assert await begun == 3


async def test_a_cancellation_reaches_a_coroutine_begun_by_hand() -> None:
    seen: list[str] = []

    async def tidies() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
            seen.append("tidied")
        return "over"

    async def waits() -> str:
        return await Begun(tidies())

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "over"
    assert seen == ["cancelled", "tidied"]


@pytest.mark.parametrize("before", [0, 2])
async def test_a_client_that_leaves_is_told_of(before: int) -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    for _ in range(before):
        messages.put_nowait({"type": "http.request"})
    left: list[str] = []
    departure = Departure(messages.get, lambda: left.append("left"))
    await asyncio.sleep(0)
    messages.put_nowait({"type": "http.request"})
    await asyncio.sleep(0.001)
    assert not left
    messages.put_nowait({"type": "http.disconnect"})
    await asyncio.sleep(0.001)
    assert left == ["left"]
    departure.close()


async def test_nobody_is_told_after_the_end() -> None:
    messages: asyncio.Queue[Message] = asyncio.Queue()
    left: list[str] = []
    departure = Departure(messages.get, lambda: left.append("left"))
    departure.close()
    messages.put_nowait({"type": "http.disconnect"})
    await asyncio.sleep(0.001)
    assert not left
