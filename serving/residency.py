"""Which adapters have a LoRA slot in vLLM and which are in its memory, when there are more adapters than slots.

vLLM computes with at most --max-loras adapters at once, each in a slot on the GPU, and keeps up to --max-cpu-loras in
main memory. Left alone, vLLM 0.32 serves more adapters than slots correctly but badly (v1/core/sched/scheduler.py,
lora/worker_manager.py):

1. A request for an adapter beyond the slots waits until no request of some other adapter is left. Under steady load
   that is never.
2. Any step may put other adapters into slots. With 16 busy adapters on 8 slots, the engine does little else.
3. A request for an adapter that is not in memory reads its files in the engine's loop, while all others wait.

So at most as many versions as there are slots have requests in the engine. Requests for other versions wait here, first
come, first served, until a version without requests gives up its slot; the least recently used one first. If all are
busy for too long, one of them gets no new requests until its last one has ended. While clients' requests are computed,
switching takes a limited share of the engine's time. What is read is the verified private copy, which stays as long as
the version; so whatever vLLM evicts by itself, a reply is never computed with other weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from jobs.core.proof import Proof
from serving import events
from serving.engine import Engine
from serving.refusal import NotYet

log = logging.getLogger("serving")

HOLD_SECONDS = 60.0  # how long a request waits for a slot at most
MOST_HELD = 1024  # requests that wait; the next one is turned away at once
PATIENCE_SECONDS = 0.5  # how long a request waits while all slots are busy, before one of them gets no new requests
CLOSED_SECONDS = 10.0  # after that, another one gets no new requests: this one may have a very long reply
# Of the engine's time while it computes clients' requests, as measured from outside: much of it is the end of the step
# that the engine is in.
SHARE = 0.25
LONGEST_PAUSE_SECONDS = 1.0  # between two switches; one that took long may have waited for a long step of the engine


class NoSlot(NotYet):
    """All LoRA slots are busy with requests to other adapters."""


@dataclass(eq=False)
class Version:
    """One adapter in vLLM. It is unloaded when no alias points to it and its last request has ended."""

    name: str
    digest: str
    folder: Path | None = None  # its verified private copy; None: it needs no slot, as the model that vLLM runs itself
    size: int = 0  # bytes of its weights
    proof: Proof | None = None  # what it answers; None: evaluated before there were proofs
    requests: int = 0  # that use it or wait for its slot
    running: int = 0  # of these, the requests in the engine
    idle_since: float = 0.0  # when its last request ended (monotonic)
    closed_at: float = 0.0  # when it last got no new requests (monotonic)
    removing: bool = False  # its removal began; vLLM may have forgotten its name already

    @property
    def model(self) -> str:
        """The model name inside vLLM."""
        return f"{self.name}@{self.digest}"

    @contextmanager
    def request(self) -> Iterator[None]:
        """Keeps the version loaded while a request uses it."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1
            self.idle_since = time.monotonic()


@dataclass
class _Waiting:
    """The requests that wait for the slot of one version."""

    since: float
    futures: list[asyncio.Future[None]] = field(default_factory=list)


class Residency:
    """Gives slots to versions. Lives on vLLM's event loop.

    Args:
        memory: bytes for adapters in main memory; those in slots stay there in any case.
        reserved: slots that are taken for good.
    """

    def __init__(self, engine: Engine, memory: int, reserved: int = 0) -> None:
        self._engine = engine
        self._limit = memory
        self._reserved = reserved
        self._slotted: dict[Version, None] = {}
        self._memory: dict[Version, None] = {}  # the least recently used first
        self._waiting: dict[Version, _Waiting] = {}
        self._closed: Version | None = None  # has a slot, but gets no new requests
        self._clients = 0  # requests of clients in the engine
        self._next_switch = 0.0  # not before (monotonic), while clients' requests are computed
        self._changed = asyncio.Event()
        self._lock = asyncio.Lock()  # one change of the engine's adapters at a time
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to give slots. Call it when vLLM is up."""
        self._task = asyncio.get_running_loop().create_task(self._forever())

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def slots(self) -> int:
        """How many versions can have requests in the engine at once."""
        return self._engine.slots - self._reserved

    def place(self, version: Version) -> str:
        """Where the version is: `slot`, `memory` or `disk`."""
        return "slot" if version in self._slotted else "memory" if version in self._memory else "disk"

    def neighbours(self) -> list[Version]:
        """The versions whose requests enter the engine at once, the busiest first."""
        return sorted((v for v in self._slotted if v is not self._closed and v not in self._waiting),
                      key=lambda version: -version.running)

    @asynccontextmanager
    async def request(self, version: Version | None, *, client: bool = True) -> AsyncIterator[None]:
        """Let a request use a version, once that has a slot.

        Args:
            version: None for the base model itself.
            client: False for the server's own requests, on which nobody waits.
        Raises:
            NoSlot: the slots are too busy.
            Refused: with reason `load`, when vLLM cannot load it.
        """
        with version.request() if version else nullcontext():
            if version and version.folder:
                await self._enter(version)
            elif version:
                version.running += 1
            self._clients += client
            try:
                yield
            finally:
                self._clients -= client
                if version:
                    version.running -= 1
                    version.idle_since = time.monotonic()
                if self._waiting:
                    self._changed.set()

    async def forget(self, version: Version) -> None:
        """Remove a version from vLLM; no request may use it any more."""
        async with self._lock:
            await self._engine.remove(version.model)
            self._slotted.pop(version, None)
            self._memory.pop(version, None)
            if self._closed is version:
                self._closed = None
            events.resident(version.name, version.digest, None)
        self._changed.set()

    async def _enter(self, version: Version) -> None:
        """Count the request as running in the engine, at once or when the version gets a slot."""
        if version in self._slotted and version is not self._closed and version not in self._waiting:
            version.running += 1
            return
        if sum(len(each.futures) for each in self._waiting.values()) >= MOST_HELD:
            raise NoSlot("too many requests wait for a LoRA slot")
        started = time.monotonic()
        waiting = self._waiting.setdefault(version, _Waiting(started))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.futures.append(future)
        self._changed.set()
        events.HELD.inc()
        try:
            async with asyncio.timeout(HOLD_SECONDS):
                await future
            events.SLOT_WAIT.observe(time.monotonic() - started)
        except BaseException as error:
            if future.done() and not future.cancelled() and not future.exception():
                version.running -= 1  # it got its slot in the moment in which it gave up
                self._changed.set()
            elif future in waiting.futures:
                waiting.futures.remove(future)
                if not waiting.futures:
                    self._waiting.pop(version, None)
            if isinstance(error, TimeoutError):
                raise NoSlot(f"all {self.slots} LoRA slots are busy") from None
            raise
        finally:
            events.HELD.dec()

    async def _forever(self) -> None:
        while True:
            try:
                pause = await self._advance()
            except Exception:  # nobody would get a slot any more
                log.exception("cannot give LoRA slots; trying again")
                pause = PATIENCE_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()
            self._changed.clear()

    async def _advance(self) -> float | None:
        """Give slots to those who wait. Returns after how many seconds to try again; None: when something changes."""
        while self._waiting:
            for version in [v for v in self._waiting if v in self._slotted and v is not self._closed]:
                self._admit(version)
            first = next((version for version in self._waiting if version not in self._slotted), None)
            if first is None:
                self._closed = None  # nobody waits for its slot any more
                continue
            now = time.monotonic()
            if self._clients and now < self._next_switch:
                return self._next_switch - now
            if len(self._slotted) >= self.slots and not self._vacate(self._waiting[first].since):
                return PATIENCE_SECONDS
            await self._bring_in(first)
        return None

    def _admit(self, version: Version) -> None:
        """Let the waiting requests of a version into the engine."""
        for future in self._waiting.pop(version).futures:
            if not future.done():
                future.set_result(None)
                version.running += 1

    def _vacate(self, since: float) -> bool:
        """Free the slot of a version without requests; returns whether there was one.

        Args:
            since: how long (monotonic) somebody has been waiting.
        """
        idle = [version for version in self._slotted if not version.running]
        if idle:
            victim = min(idle, key=lambda version: version.idle_since)
            del self._slotted[victim]
            if victim in self._memory:  # it was used until now
                self._memory[victim] = self._memory.pop(victim)
            if self._closed is victim:
                self._closed = None
            events.resident(victim.name, victim.digest, self.place(victim))
            return True
        now = time.monotonic()
        if now - since >= PATIENCE_SECONDS and (
                self._closed is None or now - self._closed.closed_at >= CLOSED_SECONDS):
            self._closed = min(self._slotted, key=lambda version: (version.closed_at, version.running), default=None)
            if self._closed:
                self._closed.closed_at = now
        return False

    async def _bring_in(self, version: Version) -> None:
        """Put a version into a slot, and let its requests into the engine."""
        async with self._lock:
            if version not in self._waiting:
                return  # they all gave up
            started, source = time.monotonic(), self.place(version)
            try:
                await self._make_room(version)
                assert version.folder
                await self._engine.activate(version.model, version.folder)
            except Exception as error:
                log.warning("%s cannot be put into a LoRA slot: %s", version.model, error)
                for future in self._waiting.pop(version).futures if version in self._waiting else ():
                    if not future.done():
                        future.set_exception(error)
                return
            self._slotted[version] = None
            self._memory.pop(version, None)
            self._memory[version] = None
        ended = time.monotonic()
        self._next_switch = ended + min((ended - started) * (1 / SHARE - 1), LONGEST_PAUSE_SECONDS)
        events.SWITCHES.labels(source).inc()
        events.resident(version.name, version.digest, "slot")
        if version in self._waiting:
            self._admit(version)

    async def _make_room(self, version: Version) -> None:
        """Evict from memory what was not used for the longest time, if there is no room for a version."""
        if version in self._memory:
            return
        most = self._engine.most_in_memory - self._reserved
        while len(self._memory) >= most or sum(v.size for v in self._memory) + version.size > self._limit:
            victim = next((v for v in self._memory if v not in self._slotted), None)
            if victim is None:
                break
            await self._engine.evict(victim.model)
            del self._memory[victim]
            events.resident(victim.name, victim.digest, "disk")
