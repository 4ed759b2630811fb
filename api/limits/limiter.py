"""The limiter: one Redis round trip before the first byte, one after the last."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from api.errors import ApiError, Header
from api.fast_redis import FastRedis
from api.key_store import Keys, require_usable
from api.keys import Key
from api.limits.leases import Admission, LeaseBook, State
from api.limits.lines import Lines
from api.limits.outage import LocalShare
from api.limits.rates import Rates, Standing
from api.limits.refusals import refusal
from api.metrics import Metrics, Refusal
from api.settings import ApiSettings
from engine import log
from engine.errors import VelocityError
from workers.errors import LedgerUnavailable, StorageError

LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
_SIGN_SECONDS = 1.0
_RENEW_MOST = 1000
_LAST_SETTLES = 2.0
_LEASE_US = int(LEASE_SECONDS * 1e6)

logger = log.get(__name__)


@dataclass(slots=True)
class Used:
    """What a request used, as far as it is known."""

    tokens: int | None
    """Tokens that count against the limits; None leaves the whole reservation spent."""
    input: int = 0
    output: int = 0
    ran: bool = True
    """False if it never got a slot: then it counts nowhere."""
    refused: bool = False


class KeyChanged(VelocityError):
    """The key's record is another now: whether it opens this must be found out anew."""


class Limiter:
    """Admits interactive requests, lets them wait for a slot, and settles what they used."""

    def __init__(self, redis: FastRedis, keys: Keys, settings: ApiSettings, metrics: Metrics) -> None:
        self._redis = redis
        self._keys = keys
        self._settings = settings
        self._metrics = metrics
        self._all = Rates(settings.global_rpm, settings.global_rpm, settings.global_tpm, settings.global_concurrency)
        self._book = LeaseBook()
        self._lines = Lines()
        self._local = LocalShare()
        self._unrecorded = True
        """Whether Redis may not know of a request that runs here: it is told of all before it hears from us again."""
        self._processes = 1
        self._name = secrets.token_hex(8)
        self._settling: set[asyncio.Future[Any]] = set()
        reservation = settings.total_timeout + settings.queue_wait + 60
        self._reservation_ms = int(reservation * 1000)
        metrics.observe_gauges(lambda: self._book.leased, lambda: self._book.waiting)

    async def admit(self, key: Key, request: str, cost: int) -> Admission:
        """Let a request of `cost` tokens in, with a slot or with a place in the line for one.

        Raises ApiError 429 or 503 with a Retry-After that is true, KeyChanged when `key` is not as it was,
        LedgerUnavailable when nothing can be decided.
        """
        try:
            return await self._admit(key, request, cost)
        except LedgerUnavailable:
            return self._admit_locally(key, request, cost)

    async def _admit(self, key: Key, request: str, cost: int) -> Admission:
        rates = Rates.of(key)
        answer = await self._ask(key, request, cost, rates)
        if answer[0] == b"stale":
            self._keys.forget(key)
            raise KeyChanged("The key's record has changed.")
        verdict, reason, wait = answer[0].decode(), answer[1].decode(), int(answer[2])
        standing = Standing.of(answer[4:8])
        if verdict == "refused":
            self._metrics.refused(Refusal(reason))
            raise refusal(reason, wait, rates, self._all, standing, cost)
        state = State.LEASED if verdict == "admitted" else State.WAITING
        admission = Admission(request, key, cost, state, standing.headers(rates), arrived=int(answer[3]))
        self._local.prune()
        self._book.add(admission)
        return admission

    async def _fresh(self, key: Key) -> Key:
        """The key as it is now. Raises ApiError 401 if it opens nothing any more."""
        fresh = await self._keys.reload(key.id)
        if fresh is None:
            raise ApiError(401, "This API key is not valid.", code="invalid_api_key")
        require_usable(fresh)
        return fresh

    async def _ask(self, key: Key, request: str, cost: int, rates: Rates) -> Sequence[bytes]:
        may_wait = int(self._settings.queue_wait > 0)
        version = key.version or ""  # open mode has no record that could change
        answer: Sequence[bytes] = await self._redis.run(
            "admit", request, key.id, version, cost, may_wait, _LEASE_US, self._reservation_ms,
            self._settings.max_waiting, *rates.args, *self._all.args,
        )  # fmt: skip
        return answer

    @property
    def decides(self) -> bool:
        """Whether requests can be admitted: with Redis, or without it for a while (without limits for good)."""
        down_since = self._redis.down_since
        unlimited = self._settings.open and not any(self._all.args)
        return down_since is None or unlimited or time.monotonic() - down_since <= self._settings.outage_seconds

    def _admit_locally(self, key: Key, request: str, cost: int) -> Admission:
        if not self.decides:
            self._metrics.refused(Refusal.REDIS)
            raise LedgerUnavailable("Redis has not answered for too long: limits can't be kept without it.")
        try:
            standing = self._local.admit(key, self._all, cost, self._processes, self._book.running(key.id))
        except ApiError:
            self._metrics.local(admitted=False)
            raise
        self._metrics.local(admitted=True)
        admission = Admission(request, key, cost, State.LEASED, standing.headers(Rates.of(key)), local=True)
        self._book.add(admission)
        self._unrecorded = True
        return admission

    async def slot(self, admission: Admission) -> None:
        """Wait until it is the request's turn. Raises ApiError 401, 429 or 503 after VELOCITY_QUEUE_WAIT."""
        answer: Sequence[bytes] = ()
        try:
            async with asyncio.timeout(self._settings.queue_wait):
                with self._lines.standing(admission.key.id, admission.arrived, admission.request) as place:
                    while True:
                        await place.turn()
                        answer = await self._ask_again(admission) or answer
                        if admission.state is State.LEASED:
                            return
        except TimeoutError:
            self._metrics.refused(Refusal.QUEUE_WAIT)
            raise self._waited(admission, answer) from None

    async def _ask_again(self, admission: Admission) -> Sequence[bytes]:
        try:
            answer = await self._ask(admission.key, admission.request, admission.cost, Rates.of(admission.key))
        except LedgerUnavailable:
            return ()  # the place is kept for a while, and so is the patience
        if answer[0] == b"stale":
            with suppress(LedgerUnavailable):
                admission.key = await self._fresh(admission.key)
            return ()
        if answer[0] == b"refused":  # Redis has lost the place, and there is no other
            raise self._waited(admission, answer)
        if answer[0] == b"admitted":
            admission.state = State.LEASED
        return answer

    def _waited(self, admission: Admission, answer: Sequence[bytes]) -> ApiError:
        reason = answer[1].decode() if answer else ""
        wait = int(answer[2]) if answer else 0
        standing = Standing.of(answer[4:8]) if answer else Standing(0, 0, 0, 0)
        return refusal(reason or "concurrency", wait, Rates.of(admission.key), self._all, standing, admission.cost)

    def settle(self, admission: Admission, used: Used) -> None:
        """Give slot and reservation back for what was used, once; nobody waits for it.

        Whom this process asks Redis to admit after this finds them given back.
        """
        if not self._book.remove(admission):
            return
        tokens = admission.cost if used.tokens is None else used.tokens
        self._metrics.tokens(used.input, used.output)
        if admission.local:
            self._local.give_back(admission.key, self._all, admission.cost - tokens, self._processes)
        settling = self._redis.post(  # if it fails the lease runs out by itself, and the reservation stays spent
            "settle", admission.request, admission.key.id, tokens, int(not used.ran), used.input, used.output,
            int(used.refused),
        )  # fmt: skip
        if settling is None:
            self._lines.next(admission.key.id)
            return
        self._settling.add(settling)
        settling.add_done_callback(partial(self._settled_one, admission.key.id))

    def _settled_one(self, key_id: str, settling: asyncio.Future[Any]) -> None:
        self._settling.discard(settling)
        self._lines.next(key_id)

    async def headers(self, key: Key) -> tuple[Header, ...]:
        """How the key stands, for answers that were not admitted by `admit`; none if Redis does not say."""
        rates = Rates.of(key)
        if not (rates.rpm or rates.tpm):
            return ()
        try:
            answer = await self._redis.run("peek", key.id, rates.rpm, rates.burst, rates.tpm)
        except LedgerUnavailable:
            return ()
        return Standing.of(answer).headers(rates)

    async def run(self) -> None:
        """Renew leases and places, and end the requests of keys that were ended, until cancelled.

        In between, say once a second that requests are recorded: bulk workers stand back for those.
        """
        renewed = 0.0
        while True:
            whole = self._unrecorded or time.monotonic() - renewed >= RENEW_SECONDS
            self._unrecorded = False
            try:
                await self._renew(whole=whole)
            except LedgerUnavailable:
                self._unrecorded = True
            else:
                renewed = time.monotonic() if whole else renewed
            await asyncio.sleep(_SIGN_SECONDS)

    async def aclose(self) -> None:
        """Wait for what is being settled, and for the requests that the server has cancelled and not waited for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SETTLES):
                while self._book.all():
                    await asyncio.sleep(0.01)
        await self._settled()

    async def _settled(self) -> None:
        if self._settling:
            await asyncio.wait(set(self._settling))

    async def _renew(self, *, whole: bool = True) -> None:
        admissions = self._book.all() if whole else []
        for start in range(0, max(1, len(admissions)), _RENEW_MOST):
            batch = admissions[start : start + _RENEW_MOST]
            held = [part for one in batch for part in (one.request, one.key.id, one.state.value)]
            keys = {one.key.id: one.key.version for one in batch if one.key.version}
            answer = await self._redis.run(
                "renew", self._name, _LEASE_US, len(batch), *held, *(part for pair in keys.items() for part in pair)
            )
            self._processes = max(1, int(answer[0]))
            await self._settled()
            for one in batch:
                if one.request not in self._book:  # settled while it was renewed: only the lease came back
                    await self._redis.run("settle", one.request, one.key.id, one.cost, 0, 0, 0, 0)
            for key_id in answer[1:]:
                await self._changed(key_id.decode(), batch)

    async def _changed(self, key_id: str, admissions: list[Admission]) -> None:
        try:
            key = await self._keys.reload(key_id)
        except StorageError as error:  # asked again at the next renewal
            logger.warning("key_unreadable", key=key_id, reason=str(error))
            return
        for admission in admissions:
            if admission.key.id == key_id:
                if key is not None and key.usable:
                    admission.key = key
                else:
                    admission.end()
