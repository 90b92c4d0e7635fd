"""Promises of residency: no more adapters in the engine than slots, nobody waits for ever, and the busy ones go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving import events, residency
from serving.refusal import Refused
from serving.residency import NoSlot, Residency, Version


class Engine:
    """Counts what is asked of vLLM."""

    def __init__(self, slots: int, most_in_memory: int = 100) -> None:
        self.slots, self.most_in_memory = slots, most_in_memory
        self.calls: list[str] = []
        self.memory: set[str] = set()
        self.fails = False
        self.seconds = 0.0

    async def activate(self, model: str, folder: Path) -> None:
        assert folder == Path("/x")
        self.calls.append(("activate " if model in self.memory else "load ") + model.partition("@")[0])
        await asyncio.sleep(self.seconds)
        if self.fails:
            raise Refused("load", "no room")
        self.memory.add(model)
        assert len(self.memory) <= self.most_in_memory, "vLLM would evict by itself"

    async def evict(self, model: str) -> None:
        self.calls.append("evict " + model.partition("@")[0])
        self.memory.discard(model)

    remove = evict


class Setting:
    """A `Residency` over a counted engine, versions by name, and requests that last until they are ended."""

    def __init__(self, slots: int, memory: int = 100, most_in_memory: int = 100, reserved: int = 0) -> None:
        self.engine = Engine(slots, most_in_memory)
        self.residency = Residency(self.engine, memory, reserved)  # type: ignore[arg-type]
        self.versions: dict[str, Version] = {}
        self.most = 0  # versions that had requests in the engine at once
        self.order: list[str] = []

    def version(self, name: str, size: int = 1) -> Version:
        return self.versions.setdefault(name, Version(name, "1", Path("/x"), size))

    async def ask(self, name: str, end: asyncio.Event | None = None) -> None:
        async with self.residency.request(self.version(name)):
            self.order.append(name)
            self.most = max(self.most, sum(v.running > 0 for v in self.versions.values()))
            await (end.wait() if end else asyncio.sleep(0))


    async def admitted(self, name: str) -> None:
        """Wait until a request of this name has a slot."""
        while name not in self.order:
            await asyncio.sleep(0.001)


def run(setting: Setting, work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        setting.residency.start()
        try:
            async with asyncio.timeout(20):
                await work()
        finally:
            await setting.residency.stop()
        assert setting.residency._task
        assert setting.residency._task.done()
        assert not any(v.running or v.requests for v in setting.versions.values())
        assert not setting.residency._waiting

    asyncio.run(main())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PATIENCE_SECONDS", 0.05), ("CLOSED_SECONDS", 0.3), ("LONGEST_PAUSE_SECONDS", 0.0)):
        monkeypatch.setattr(residency, name, value)


def test_enough_slots_are_filled_once_and_then_no_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(3)

    waits: list[float] = []
    monkeypatch.setattr(events, "SLOT_WAIT", SimpleNamespace(observe=waits.append))

    async def work() -> None:
        await asyncio.gather(*(setting.ask(name) for name in "abcabcabc"))
        assert len(waits) == 9
        await asyncio.gather(*(setting.ask(name) for name in "cba"))

    run(setting, work)
    assert sorted(setting.engine.calls) == ["load a", "load b", "load c"]
    assert len(waits) == 9 and all(0 <= seconds < 20 for seconds in waits)


def test_more_adapters_than_slots_take_turns_and_each_is_loaded_once() -> None:
    setting = Setting(2)

    async def work() -> None:
        await asyncio.gather(*(setting.ask(name) for name in "abcdef" * 20))

    run(setting, work)
    assert setting.most <= 2
    assert sorted(call for call in setting.engine.calls if call.startswith("load")) == [f"load {n}" for n in "abcdef"]
    assert not any(call.startswith("evict") for call in setting.engine.calls)
    assert len(setting.order) == 120


def test_a_reserved_slot_is_not_given_away() -> None:
    setting = Setting(2, reserved=1)

    async def work() -> None:
        await asyncio.gather(*(setting.ask(name) for name in "abab"))

    run(setting, work)
    assert setting.most == setting.residency.slots == 1
    assert Residency(setting.engine, 100).slots == 2  # type: ignore[arg-type]


def test_what_is_reserved_is_not_counted_as_memory_for_others() -> None:
    setting = Setting(2, most_in_memory=3, reserved=1)

    async def work() -> None:
        for name in "abc":
            await setting.ask(name)

    run(setting, work)
    assert setting.engine.calls == ["load a", "load b", "evict a", "load c"]


def test_metrics_tell_where_each_adapter_is_and_from_where_it_came_into_its_slot(
        monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[str, str, str | None]] = []
    sources: list[str] = []
    monkeypatch.setattr(events, "resident", lambda *place: places.append(place))
    monkeypatch.setattr(events, "SWITCHES", SimpleNamespace(labels=lambda source: SimpleNamespace(
        inc=lambda: sources.append(source))))
    setting = Setting(1, memory=2)

    async def work() -> None:
        for name in "abac":
            await setting.ask(name)
        await setting.residency.forget(setting.version("c"))

    run(setting, work)
    assert places == [("a", "1", "slot"), ("a", "1", "memory"), ("b", "1", "slot"), ("b", "1", "memory"),
                      ("a", "1", "slot"), ("a", "1", "memory"), ("b", "1", "disk"), ("c", "1", "slot"),
                      ("c", "1", None)]
    assert sources == ["disk", "disk", "memory", "disk"]


def test_an_adapter_that_was_used_in_its_slot_stays_longer_in_memory_than_one_that_was_not() -> None:
    setting = Setting(2, memory=3)

    async def work() -> None:
        for name in "abacd":
            await setting.ask(name)

    run(setting, work)
    assert setting.engine.calls == ["load a", "load b", "load c", "evict b", "load d"]


def test_the_engine_switches_for_a_quarter_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(residency, "LONGEST_PAUSE_SECONDS", 10.0)
    monkeypatch.setattr(residency, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    setting = Setting(1)

    async def work() -> None:
        async def activate(*_: object) -> None:
            clock[0] += 2.0

        monkeypatch.setattr(setting.engine, "activate", activate)
        await setting.ask("a")
        assert setting.residency._next_switch == 102.0 + 6.0

    run(setting, work)


def test_the_least_recently_used_adapter_gives_up_its_slot() -> None:
    setting = Setting(2)

    async def work() -> None:
        for name in "abac":
            await setting.ask(name)
        assert [setting.residency.place(setting.version(n)) for n in "abc"] == ["slot", "memory", "slot"]

    run(setting, work)


def test_an_adapter_that_waits_gets_a_slot_though_the_others_are_never_idle() -> None:
    """What vLLM's own scheduler does not promise."""
    setting, stop, answered = Setting(2), asyncio.Event(), [0]

    async def busy(name: str) -> None:
        while not stop.is_set():
            async with setting.residency.request(setting.version(name)):
                await asyncio.sleep(0.02)
                answered[0] += 1

    async def work() -> None:
        hot = [asyncio.create_task(busy(name)) for name in "aabb" for _ in range(2)]
        while not answered[0]:
            await asyncio.sleep(0.01)
        before = answered[0]
        await setting.ask("c")
        others = answered[0] - before
        stop.set()
        await asyncio.gather(*hot)
        assert others < 400, f"{others} others were answered first"  # in a second, if the machine keeps up

    run(setting, work)
    assert setting.most <= 2


def test_while_one_adapter_waits_the_other_busy_ones_go_on_and_a_very_long_reply_keeps_no_slot_closed() -> None:
    setting, long, stop = Setting(2), asyncio.Event(), asyncio.Event()
    counts = {"a": 0, "b": 0}

    async def busy(name: str) -> None:
        while not stop.is_set():
            async with setting.residency.request(setting.version(name)):
                await asyncio.sleep(0.01)
                counts[name] += 1

    async def work() -> None:
        endless = asyncio.create_task(setting.ask("a", long))
        hot = [asyncio.create_task(busy(name)) for name in "aabb"]
        await asyncio.sleep(0.05)
        await setting.ask("c")  # a was closed first or b was; both replies go on
        before = dict(counts)
        while not all(counts[name] > before[name] for name in counts):  # nobody is closed for ever
            await asyncio.sleep(0.01)
        stop.set()
        long.set()
        await asyncio.gather(endless, *hot)

    run(setting, work)


def test_a_request_waits_for_a_limited_time_and_only_so_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "HOLD_SECONDS", 0.2)
    monkeypatch.setattr(residency, "MOST_HELD", 2)
    setting, end = Setting(1), asyncio.Event()

    async def work() -> None:
        first = asyncio.create_task(setting.ask("a", end))
        await setting.admitted("a")
        waiting = [asyncio.create_task(setting.ask("b")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(NoSlot, match="too many requests wait"):
            await setting.ask("c")
        for each in waiting:
            with pytest.raises(NoSlot, match="all 1 LoRA slots are busy"):
                await each
        end.set()
        await first
        await setting.ask("b")

    run(setting, work)


def test_a_client_that_gives_up_keeps_nothing() -> None:
    setting, end = Setting(1), asyncio.Event()

    async def work() -> None:
        first = asyncio.create_task(setting.ask("a", end))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(setting.ask("b"))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        end.set()
        await first
        # In the moment in which it gets its slot.
        setting.engine.seconds = 0.05
        gone = asyncio.create_task(setting.ask("b"))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await asyncio.gather(setting.ask("a"), setting.ask("b"))

    run(setting, work)


def test_for_requests_that_all_gave_up_nothing_is_loaded_and_the_other_one_is_served() -> None:
    setting, end = Setting(1), asyncio.Event()

    async def give_up(*tasks: asyncio.Task[None]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def work() -> None:
        first = asyncio.create_task(setting.ask("a", end))
        await asyncio.sleep(0.02)
        b, c, other = (asyncio.create_task(setting.ask(name)) for name in "bcc")
        await asyncio.sleep(0.02)
        await give_up(b, c)
        end.set()
        await asyncio.gather(first, other)
        await asyncio.sleep(0.02)

    run(setting, work)
    assert setting.engine.calls == ["load a", "load c"]


def test_a_request_that_gives_up_in_the_moment_in_which_it_is_admitted_counts_no_more() -> None:
    setting, end = Setting(1), asyncio.Event()

    async def work() -> None:
        first = asyncio.create_task(setting.ask("a", end))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(setting.ask("b"))
        await asyncio.sleep(0)
        setting.residency._admit(setting.version("b"))
        assert setting.version("b").running == 1
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert setting.version("b").running == 0
        end.set()
        await first

    run(setting, work)


@pytest.mark.parametrize("fails", [False, True])
def test_requests_that_give_up_while_their_adapter_is_loaded_disturb_nobody(
        fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    setting = Setting(1)
    setting.engine.seconds, setting.engine.fails = 0.05, fails

    async def work() -> None:
        gone = asyncio.create_task(setting.ask("b"))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await asyncio.sleep(0.1)
        setting.engine.fails = False
        await setting.ask("a")

    run(setting, work)
    assert "cannot give LoRA slots" not in caplog.text
    assert ("b@1 cannot be put into a LoRA slot: no room" in caplog.text) == fails


def test_after_an_error_that_nobody_thought_of_slots_are_given_again(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    setting, errors = Setting(1), [RuntimeError("unexpected")]
    bring_in = setting.residency._bring_in

    async def fails_once(version: Version) -> None:
        if errors:
            raise errors.pop()
        await bring_in(version)

    monkeypatch.setattr(setting.residency, "_bring_in", fails_once)

    async def work() -> None:
        await setting.ask("a")

    run(setting, work)
    assert "cannot give LoRA slots; trying again" in caplog.text


def test_only_after_some_patience_one_busy_slot_is_closed_and_it_stays_that_one_for_a_while() -> None:
    setting, end = Setting(3), asyncio.Event()

    async def work() -> None:
        busy = [asyncio.create_task(setting.ask(name, end)) for name in "ab"]
        await setting.ask("idle")
        held, now = setting.residency, time.monotonic()
        held._closed = setting.version("a")
        assert held._vacate(now), "an idle one gives up its slot"
        assert held._closed is setting.version("a")
        held._closed = None
        assert not held._vacate(now)
        assert held._closed is None
        for _ in range(2):
            assert not held._vacate(now - 2 * residency.PATIENCE_SECONDS)
            assert held._closed is setting.version("a")
        await held.forget(Version("never loaded", "1", Path("/x")))
        assert held._closed is setting.version("a")
        await setting.ask("a")  # nobody waits for its slot: it is opened again
        held._closed = setting.version("b")
        await held.forget(setting.version("b"))
        assert held._closed is None
        end.set()
        await asyncio.gather(*busy)

    run(setting, work)


def test_an_adapter_that_vllm_does_not_load_fails_its_own_requests_only() -> None:
    setting = Setting(2)

    async def work() -> None:
        await setting.ask("a")
        setting.engine.fails = True
        results = await asyncio.gather(setting.ask("b"), setting.ask("b"), setting.ask("a"), return_exceptions=True)
        assert [type(each) for each in results] == [Refused, Refused, type(None)]
        setting.engine.fails = False
        await setting.ask("b")

    run(setting, work)


@pytest.mark.parametrize(("memory", "most_in_memory"), [(3, 100), (100, 3)])
def test_what_does_not_fit_into_memory_is_evicted_by_last_use_and_read_again(memory: int, most_in_memory: int) -> None:
    setting = Setting(1, memory, most_in_memory)

    async def work() -> None:
        for name in "abcbd":
            await setting.ask(name)
        assert [setting.residency.place(setting.version(n)) for n in "abcd"] == ["disk", "memory", "memory", "slot"]
        await setting.ask("a")
        assert setting.residency.place(setting.version("c")) == "disk"

    run(setting, work)
    assert setting.engine.calls == ["load a", "load b", "load c", "activate b", "evict a", "load d", "evict c",
                                    "load a"]


def test_slots_always_fit_whatever_the_memory() -> None:
    setting = Setting(2, memory=0)

    async def work() -> None:
        for name in "abcabc":
            await setting.ask(name)

    run(setting, work)
    assert len(setting.engine.memory) <= 2


def test_a_removed_version_frees_its_slot_for_whoever_waits() -> None:
    setting = Setting(1)

    async def work() -> None:
        await setting.ask("a")
        await setting.residency.forget(setting.version("a"))
        assert setting.residency.place(setting.version("a")) == "disk"
        await setting.ask("b")

    run(setting, work)
    assert setting.engine.calls == ["load a", "evict a", "load b"]


def test_switching_takes_a_limited_share_of_the_engines_time_while_clients_wait_for_it(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "LONGEST_PAUSE_SECONDS", 10.0)
    setting, end = Setting(2), asyncio.Event()
    setting.engine.seconds = 0.01
    pauses: list[float | None] = []
    advance = setting.residency._advance

    async def recorded() -> float | None:
        pauses.append(await advance())
        return pauses[-1]

    monkeypatch.setattr(setting.residency, "_advance", recorded)

    async def work() -> None:
        client = asyncio.create_task(setting.ask("a", end))
        await setting.admitted("a")
        started = time.monotonic()
        for name in "bcdefg":
            await setting.ask(name)
        switching, took = 6 * 0.01, time.monotonic() - started
        end.set()
        await client
        assert switching / took < 1.3 * residency.SHARE
        assert any(pauses)
        pauses.clear()
        for name in "hijklm":  # nobody else waits
            await setting.ask(name)
        assert not any(pauses)

    run(setting, work)


def test_the_servers_own_requests_and_what_needs_no_slot_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(1)
    model = Version("base", "zero")

    async def work() -> None:
        async with setting.residency.request(model), setting.residency.request(None):
            assert setting.residency._clients == 2
            await setting.ask("a")
        async with setting.residency.request(setting.version("a"), client=False):
            assert setting.residency._clients == 0

    run(setting, work)
    assert setting.engine.calls == ["load a"]
