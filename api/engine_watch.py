"""Knows whether the engine serves, which models, and what protects people from bulk work in there.

Asked in the background, so that no request waits for it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from api.errors import ApiError
from api.keys import Key
from engine import log
from engine.client import EngineClient, EngineModels, Model
from engine.errors import EngineError, EngineUnreachable
from engine.protection import EngineProtection, Protection

_INTERVAL_UP = 5.0
_INTERVAL_DOWN = 1.0
_FRESH_SECONDS = 1.0
_PROTECTION_SECONDS = 5.0
"""Between two questions about the engine's protection, which seldom changes."""
_PREFIXES = ("vllm/", "openai/")
"""Provider prefixes under which app builders ask for a model."""

_MEANING = {
    Protection.SCHEDULER: "velocity's scheduler in the engine keeps bulk work from slowing people down",
    Protection.PRIORITY: "the engine lets people's requests wait least, but bulk work that runs slows them down; "
    "`velocity engine serve` starts it with velocity's scheduler",
    Protection.NONE: "the engine serves bulk work and people alike, so that chat may wait for bulk; start it with "
    "`velocity engine serve`, or with --scheduling-policy priority and say so with VELOCITY_ENGINE_POLICY=priority",
}

logger = log.get(__name__)


class EngineWatch:
    """The engine's last known state. `run()` keeps it fresh."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._models = EngineModels(())
        self._checked = 0.0
        self._refreshing = asyncio.Lock()
        self._protection: EngineProtection | None = None
        self._ask_again = 0.0
        self.up = False

    @property
    def protection(self) -> EngineProtection | None:
        """What protects people from bulk work in the engine; None while it is down, or has not told yet."""
        return self._protection

    @property
    def models(self) -> tuple[Model, ...]:
        """Every name that may be published. OpenAI-minded clients take ids that begin with "o" for reasoning models."""
        return tuple(model for model in self._models.models if not model.id.startswith("o"))

    async def run(self) -> None:
        """Ask every few seconds until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(_INTERVAL_UP if self.up else _INTERVAL_DOWN)

    async def refresh(self) -> None:
        """Ask now, unless the last answer is younger than a second."""
        async with self._refreshing:
            if time.monotonic() - self._checked < _FRESH_SECONDS:
                return
            was_up = self.up
            try:
                self._models = await self._client.models()
                self.up = await self._client.healthy()
            except EngineError as error:
                self.up = False
                if was_up:
                    logger.warning("engine_down", reason=str(error))
            if self.up and not was_up:
                logger.info("engine_up", models=[model.id for model in self._models.models])
            await self._ask_protection()
            self._checked = time.monotonic()

    async def _ask_protection(self) -> None:
        """Every few seconds, and at once when the engine has come up. One that does not answer keeps what it had."""
        if not self.up:
            self._protection, self._ask_again = None, 0.0
            return
        if time.monotonic() < self._ask_again:
            return
        before = self._protection
        with suppress(EngineError):
            self._protection = await self._client.protection()
        self._ask_again = time.monotonic() + _PROTECTION_SECONDS
        now = self._protection
        if now and (before is None or before.protection is not now.protection):
            tell = logger.warning if now.protection is Protection.NONE else logger.info
            tell("engine_protection", protection=now.protection.value, meaning=_MEANING[now.protection])

    async def resolve(self, name: object, key: Key) -> Model:
        """The model behind the name that a client sent. Raises ApiError 400, 403 or 404, EngineUnreachable."""
        if not isinstance(name, str) or not name:
            raise ApiError(400, "'model' must be the name of a model.", param="model")
        found = self._find(name)
        if found is None:  # the engine may have come up, or got a model, since it was asked
            await self.refresh()
            found = self._find(name)
        if found is None and not self._models.models:
            raise EngineUnreachable("The engine is not up (yet). Try again in a few seconds.")
        if found is None:
            known = ", ".join(model.id for model in self.models)
            raise ApiError(
                404, f"The model {name!r} does not exist. There is: {known}.", code="model_not_found", param="model"
            )
        if key.models is not None and not key.may_use(name, _bare(name), found.id):
            raise ApiError(
                403, f"This API key may not use the model {name!r}.", code="model_not_allowed", param="model"
            )
        return found

    def _find(self, name: str) -> Model | None:
        return self._models.find(name) or self._models.find(_bare(name))


def _bare(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
