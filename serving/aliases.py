"""The aliases: which adapter version is served under which name. Swaps do not fail or mix a request.

vLLM knows an adapter as NAME@DIGEST; clients send NAME. A task reads the pipeline files and the promotions twice a
second. A new version is verified, loaded beside the old one and proven; then the alias switches, between two requests.
Requests in progress finish on the version they began with; the old version is unloaded after the last of them. If any
step fails, the old version stays in service. The base model never answers for an alias. A change that a running server
cannot follow, such as another base model, needs a restart (serving/base.py).
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.types import ASGIApp

from jobs.core import promotion
from jobs.core.imported import Adapter
from jobs.core.plan import FINE_TUNED_VOLUME
from serving import base, candidates, cpu_shield, events, lora, proof, untrusted, verification
from serving.candidates import Candidate
from serving.engine import Engine
from serving.files import ENVIRONMENT, Declared, Files
from serving.refusal import NotYet, Refused
from serving.residency import NoSlot, Residency
from serving.residency import Version as Version
from serving.served import Served

log = logging.getLogger("serving")

Found = TypeVar("Found")
POLL_SECONDS = 0.5  # a promotion is to be live within two seconds
BACKOFF_SECONDS = 5.0  # after an unexpected error, such as an unreadable volume; doubled three times at most
FAILURES_UNTIL_READY = 3  # after so many failed attempts on one alias, `first_look_done` does not wait for it
RETRY_SECONDS = 60.0  # until an adapter that vLLM did not load is tried again: vLLM may have been out of memory
# Where promotions and artifacts appear on the volume of fine-tuned models: by a rename, which changes a folder's time.
WATCHED = (promotion.FOLDER, "adapter", "evaluation", "merged-model", "imported-adapter")
# For so long after a change, another one may have the same time, which has the resolution of the file system.
RECENT_SECONDS = 2.0
FOLLOW_PAUSES = 50  # a look for a new base model takes one part of so many and one
WAITING_AT_A_TIME = 8  # aliases without the desired adapter that one look covers if nothing seems to have changed
# From the end of a version's last request to its removal. If a client disconnects, its request ends here first and in
# the engine a moment later. Without its weights, the engine would try to read them from the disk, and fail.
SETTLE_SECONDS = 1.0
# Between two runs of one model in float32, log-probabilities differ by less; with an adapter, by far more.
PROBE_TOLERANCE = 1e-6


@dataclass
class Alias:
    version: Version | None = None
    why: str = "the server has not looked for its adapter yet"  # why there is no version, or not the desired one
    promotion: Candidate | None = None  # the last one that was seen
    looked_at: float = 0.0  # when (monotonic) the last look began
    looked: bool = False  # whether one look was completed: the adapter is served, refused or not there yet
    settled: bool = False  # whether the last look left nothing to wait for: the desired adapter is served
    failures: int = 0  # failed looks in a row, for example because of an unreadable volume


@dataclass(frozen=True)
class KnownRefusal:
    """What was refused for the files in this state, and until when (monotonic) it is not checked again."""

    state: tuple[untrusted.State, ...]
    refused: Refused
    until: float


class Aliases:
    """Every alias of this server and what it points to. Lives on vLLM's event loop; disk work is done in threads.

    Args:
        vllm: the ASGI application that the guard wraps.
        restart: called with the reason when only a restart can follow the pipeline files.
    """

    def __init__(self, served: Served, vllm: ASGIApp, restart: Callable[[str], None]) -> None:
        self.served = served
        self.current: dict[str, Alias] = {}
        # Set after the first look for the adapters of all aliases. The server is ready from then on.
        self.first_look_done = asyncio.Event()
        self.engine = Engine(vllm)
        self.residency = Residency(self.engine, served.adapter_memory, cpu_shield.slots(served))
        self._restart = restart
        self._restarting = False
        self._turns: dict[str, tuple[str, float]] = {}  # by subject: why the server restarts, and when (Unix time)
        self._volumes = Path(served.volumes)
        self._loaded: dict[str, Version] = {}  # by their names inside vLLM
        self._files = Files(Path(served.pipelines))
        self._declared = Declared()
        self._seen: tuple[int, ...] = ()  # when something last appeared on the volume
        self._proven: set[tuple[str, Candidate]] = set()
        self._refusals: dict[str, KnownRefusal] = {}
        self._modules: lora.Modules | None = None
        self.base: Version | None = None  # serves requests to the base model in place of it, if not None
        self._logged: dict[str, str] = {}  # the last message by subject
        self._follow_at = 0.0  # when (monotonic) to look again whether the server can restart on the desired base
        self._follow_again = False  # something changed while that was looked for
        self._updates: dict[str, asyncio.Task[None]] = {}  # by alias; under "" what concerns the base model
        self._started = time.time()
        self._task: asyncio.Task[None] | None = None

    def request(self, version: Version | None) -> AbstractAsyncContextManager[None]:
        """Let a client's request use a version, once that has a LoRA slot; None: the base model itself.

        Raises:
            NotYet, Refused: it cannot be served at the moment; the client may try again.
        """
        return self.residency.request(version)

    def start(self, state: Any) -> None:
        """Look for adapters from now on.

        Args:
            state: of vLLM's application.
        """
        self.engine.attach(state)
        self.residency.start()
        self._task = asyncio.get_running_loop().create_task(self._forever())

    async def stop(self) -> None:
        tasks = [*self._updates.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.residency.stop()

    async def _forever(self) -> None:
        prepared = False
        while True:
            try:
                if not prepared:
                    await self._prepare_base()
                    prepared = True
                with events.LOOK.time():
                    await self.poll()
                self._logged.pop("poll", None)
                pause = POLL_SECONDS
            except Exception as error:  # what is served stays in service
                self._log_change("poll", f"cannot look for adapters: {error!r}; trying again", log.error)
                pause = BACKOFF_SECONDS
            await asyncio.sleep(pause)

    async def poll(self) -> None:
        """Look once: point every alias to the best version that may be served, and unload unused versions."""
        if self._restarting:
            return
        before, seen = self._declared, self._seen
        self._declared, self._seen = await asyncio.to_thread(self._look_around)
        if self._declared is not before:
            self._report_problems(before)
            if self._declared.trusted_keys != before.trusted_keys:
                self._forget_checks()
        named = self._declared.adapters
        for name in self.current.keys() - named.keys():
            gone = self.current.pop(name)
            events.removed(name, gone.version.digest if gone.version else None)
        for name in named:
            self.current.setdefault(name, Alias())
        everything = self._declared is not before or self._seen != seen or _is_recent(self._seen)
        self._updates = _unfinished(self._updates)
        # One task for each: the others do not wait for the verification of a large adapter or a new base model.
        work: dict[str, Callable[[], Awaitable[None]]] = {
            name: partial(self._update, name, self.current[name], named[name])
            for name in (named if everything else self._take_turns())}
        following = "" in self._updates
        to_follow = following or "base" in self._logged or base.changed(self._declared, self.served)
        if self._follow_again or (to_follow and (everything or time.monotonic() >= self._follow_at)):
            work[""] = self._follow_base
            self._follow_again = following and (everything or self._follow_again)
        for name in work.keys() - self._updates.keys():
            self._updates[name] = asyncio.create_task(self._attempt(name, work[name]))
        if self._updates:
            await asyncio.wait(self._updates.values(), timeout=POLL_SECONDS)
        self._updates = _unfinished(self._updates)
        if all(alias.looked for alias in self.current.values()):
            self.first_look_done.set()
        await self._unload_unused()

    @property
    def _keys(self) -> tuple[str, ...]:
        """The public keys by one of which an adapter and its evaluation must be signed; empty: they need not be."""
        return self._declared.trusted_keys

    def _forget_checks(self) -> None:
        """Check everything again, because the trusted keys changed. What is in service stays so until a restart."""
        self._proven.clear()
        self._refusals.clear()

    def _look_around(self) -> tuple[Declared, tuple[int, ...]]:
        """The files, and when (ns) something last appeared in the folders of the volume. Runs in a thread."""
        times = []
        for folder in WATCHED:
            try:
                times.append((self._volumes / FINE_TUNED_VOLUME / folder).stat().st_mtime_ns)
            except OSError:
                times.append(0)
        return self._files.read(), tuple(times)

    def _take_turns(self) -> list[str]:
        """The aliases to look at though nothing seems to have changed: files can be replaced in place."""
        names = sorted(self.current, key=lambda name: self.current[name].looked_at)
        waiting = [name for name in names if not self.current[name].settled]
        settled = [name for name in names if self.current[name].settled]
        return [*waiting[:WAITING_AT_A_TIME], *settled[:1]]

    def _report_problems(self, before: Declared) -> None:
        """Report the files that are invalid now, and those that are valid again."""
        for stem in before.problems.keys() - self._declared.problems.keys():
            self._logged.pop(f"file {stem}", None)
        for stem, problem in self._declared.problems.items():
            self._report_refusal(stem, f"file {stem}", Refused(
                problem.reason, f"{problem}; its last valid content stays in force"))

    async def _follow_base(self) -> None:
        """Restart if the environment file needs it and no served adapter is lost by it.

        Until then, for example while an adapter for a new base model is trained, the server continues unchanged.
        """
        environment = self._declared.environment
        reason = base.changed(self._declared, self.served)
        if environment is None or reason is None:
            self._logged.pop("base", None)
            self._turns.pop("base", None)
            return
        serving = [name for name, alias in self.current.items() if alias.version]
        started = time.monotonic()
        try:
            if not self._has_turn("base", reason):
                await self._unless_refused(ENVIRONMENT, reason, base.of(environment).folders(self._volumes), partial(
                    asyncio.to_thread, base.check_restart, self._declared, self.served, serving))
        except NotYet as missing:
            self._log_change("base", f"{reason}, but {missing}; until then the server continues unchanged")
        except Refused as refused:
            self._log_change("base", f"{reason}, but it was refused: {refused.reason}; the server continues unchanged")
        else:
            self._restart_in_turn("base", reason)
        # With hundreds of adapters, one look reads thousands of files, and a new base model may take hours.
        self._follow_at = time.monotonic() + FOLLOW_PAUSES * (time.monotonic() - started)

    def _has_turn(self, subject: str, reason: str) -> bool:
        """Whether all checks passed and the server only waits for its time slot to restart."""
        return subject in self._turns and self._turns[subject][0] == reason

    def _restart_in_turn(self, subject: str, reason: str) -> None:
        """Restart now or, if there are several replicas, in this one's time slot. Call it until that happens."""
        if not self._has_turn(subject, reason):
            turn = base.next_turn(time.time(), self.served.restart_slot_seconds, socket.gethostname())
            self._turns[subject] = reason, turn
        _, turn = self._turns[subject]
        if time.time() < turn:
            at = time.strftime("%H:%M:%S", time.localtime(turn))
            self._log_change(subject, f"{reason}; this replica restarts at {at}, in its turn")
            return
        self._restarting = True  # from now on `poll` does nothing
        self._restart(reason)

    async def _attempt(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        alias = self.current.get(name) or Alias()
        alias.looked_at = time.monotonic()
        try:
            await work()
            self._logged.pop(f"attempt {name}", None)
            alias.looked, alias.failures = True, 0
        except Exception as error:  # an unreadable volume or an overloaded engine, for example
            alias.failures, alias.settled = alias.failures + 1, False
            if alias.version is None:
                alias.why = "its adapter could not be loaded; the server tries again"
            # One alias that fails must not keep the whole server from being ready.
            alias.looked |= alias.failures >= FAILURES_UNTIL_READY
            self._log_change(f"attempt {name}", f"{name or 'base model'}: {error!r}; trying again", log.error)
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** min(alias.failures - 1, 3))

    async def _update(self, name: str, alias: Alias, pipeline: Adapter | None) -> None:
        """Point the alias to the first adapter that may be served: the desired one, else the last promotion.

        If the alias has no version, as after a restart, earlier promotions follow.
        """
        reasons, failure, refusals = list[str](), None, 0
        found: list[tuple[str, Candidate | NotYet | Refused]]
        found = [("pipeline file", await self._look(name, "pipeline file", partial(self._desired, pipeline))),
                 ("last promotion", await self._look(name, "last promotion", partial(self._promoted, name)))]
        self._notice(name, alias, found[1][1])
        if alias.version is None:
            earlier = await self._look(name, "history", partial(candidates.earlier, name, self._volumes))
            found += [("earlier promotion", each) for each in (earlier if isinstance(earlier, list) else [earlier])]
        tried: set[Candidate] = set()
        for by, candidate in found:
            if isinstance(candidate, Candidate) and candidate in tried:
                continue
            try:
                if not isinstance(candidate, Candidate):
                    raise candidate
                tried.add(candidate)
                version = await self._prepare(name, candidate)
            except NotYet as reason:
                reasons.append(str(reason))
                if isinstance(reason, NoSlot) and alias.version:
                    break  # a short wait: do not switch to another adapter meanwhile
                continue
            except Refused as refused:  # the log has the whole message; clients do not see paths
                refusals += 1
                reasons.append(f"the adapter of the {by} was refused: {refused.reason}")
                continue
            except Exception as error:
                if alias.version:
                    raise  # what is served stays in service
                reasons.append(f"the adapter of the {by} could not be loaded; the server tries again")
                failure = failure or error
                continue
            if self.current.get(name) is not alias:
                return  # the alias was removed meanwhile; the version will be unloaded
            if version is not alias.version:
                before, alias.version = alias.version, version  # from the next request on
                events.swapped(name, version.digest, before.digest if before else None, by,
                               await asyncio.to_thread(self._seconds_since_proof, name, candidate))
            break
        alias.why = "; ".join(dict.fromkeys(reasons))
        alias.settled = not reasons
        if self.current.get(name) is alias:
            events.state(name, "current" if not reasons else "previous" if alias.version else
                         "refused" if refusals else "waiting")
        if reasons:
            self._log_change(name, alias.why,
                             partial(events.waiting, name, alias.version.digest if alias.version else None))
        else:
            self._logged.pop(name, None)
        if failure:
            raise failure  # the caller tries again; meanwhile the next best is served

    async def _look(self, name: str, where: str, find: Callable[[], Found]) -> Found | NotYet | Refused:
        """The result of `find`. A refusal is reported and returned, as is `NotYet`."""
        what = f"the {where} of {name}"
        try:
            found = await asyncio.to_thread(find)
        except Refused as refused:
            self._report_refusal(name, what, refused)
            return refused
        except NotYet as reason:
            self._logged.pop(what, None)
            return reason
        self._logged.pop(what, None)
        return found

    def _desired(self, pipeline: Adapter | None) -> Candidate:
        if pipeline is None:
            raise NotYet("its pipeline file is invalid")
        if base.of(pipeline.environment) != base.running(self.served):
            raise NotYet("the server has to restart with another base model, mode or chat template first")
        return candidates.desired(pipeline, self._volumes)

    def _promoted(self, name: str) -> Candidate:
        candidate, following = candidates.promoted(name, self._volumes), self._next_base()
        if following and base.is_for(candidate.adapter, following, self._volumes) and not base.is_for(
                candidate.adapter, base.running(self.served), self._volumes):
            raise NotYet("its last promotion is for the base model with which the server restarts")
        return candidate

    def _next_base(self) -> base.Base | None:
        """The desired base, if this server runs on another one."""
        environment = self._declared.environment
        desired = base.of(environment) if environment else None
        return desired if desired != base.running(self.served) else None

    def _notice(self, name: str, alias: Alias, promoted: Candidate | NotYet | Refused) -> None:
        """Report a new promotion."""
        if isinstance(promoted, Candidate) and promoted != alias.promotion:
            alias.promotion = promoted
            events.promotion_seen(name, promoted.adapter, promoted.evaluation)

    def _seconds_since_proof(self, name: str, candidate: Candidate) -> float | None:
        """Seconds since the adapter could be served, or since the pipeline file desired it if that was later.

        None if both were before this server started.
        """
        try:
            proved = candidates.proved_at(name, candidate, self._volumes)
        except (OSError, NotYet, Refused):
            return None
        desired = self._declared.changed.get(name, 0.0)
        since = max(proved, desired)
        return max(0.0, time.time() - since) if since >= self._started else None

    async def _prepare(self, name: str, candidate: Candidate) -> Version:
        """The candidate's version in vLLM. If it is not loaded yet: check the gate, verify, load and prove it."""
        try:
            evaluation, folder = self._folders(candidate)
        except Refused as refused:
            self._report_refusal(name, f"candidate {candidate.adapter!r} of {name}", refused)
            raise
        if (name, candidate) not in self._proven:
            await self._check_gate(name, candidate, evaluation)
            self._proven.add((name, candidate))
        version = Version(name, candidate.adapter)
        if loaded := self._loaded.get(version.model):
            if not loaded.removing:
                return loaded
            await self._unload(loaded)  # the first attempt to remove it failed; vLLM can load it after this one
        await self._unless_refused(name, f"adapter {version.model} of evaluation {candidate.evaluation}",
                                   [folder, evaluation], partial(self._admit, version, evaluation))
        return version

    def _folders(self, candidate: Candidate) -> tuple[Path, Path]:
        """The folders of the candidate's evaluation and of what is verified. Raises `Refused` for invalid digests."""
        return (candidates.evaluation_folder(candidate.evaluation, self._volumes),
                candidates.adapter_folder(candidate.adapter, self._volumes))

    async def _check_gate(self, name: str, candidate: Candidate, evaluation: Path) -> None:
        what = f"{name}@{candidate.adapter}"
        check = partial(asyncio.to_thread, verification.check_gate, candidate, name, self._volumes, self._keys)
        try:
            await self._unless_refused(name, f"evaluation {candidate.evaluation} of {what}", [evaluation], check)
        except NotYet as missing:
            if not await asyncio.to_thread(candidates.adapter_folder(candidate.adapter, self._volumes).is_dir):
                raise
            refused = Refused("not promoted", f"it is there, but {missing}")
            self._report_refusal(name, f"adapter {what}", refused)
            raise refused from None

    async def _unless_refused(self, alias: str, what: str, folders: list[Path],
                              work: Callable[[], Awaitable[None]]) -> None:
        """Do the work, unless it was refused for the same files. A refusal is reported once."""
        state = await asyncio.to_thread(lambda: tuple(untrusted.state_of(folder) for folder in folders))
        known = self._refusals.get(what)
        if known and known.state == state and time.monotonic() < known.until:
            raise known.refused
        if known and known.state != state:  # other files: another refusal, even for the same reason
            self._logged.pop(what, None)
        try:
            await work()
        except Refused as refused:
            pause = RETRY_SECONDS if refused.reason == "load" else math.inf
            self._refusals[what] = KnownRefusal(state, refused, time.monotonic() + pause)
            self._report_refusal(alias, what, refused)
            raise
        self._refusals.pop(what, None)
        self._logged.pop(what, None)

    async def _admit(self, version: Version, evaluation: Path) -> None:
        """Verify a version, load it into vLLM and prove it. If a step fails, the version is removed again."""
        if version.name in self.current:
            self.current[version.name].why = "its adapter is being verified and loaded"
        version.proof = await asyncio.to_thread(verification.read_proof, evaluation, self._keys)
        version.folder = await asyncio.to_thread(verification.copy_verified, version.name, version.digest, self.served,
                                                 self._base_modules, self._keys)
        version.size = (version.folder / lora.WEIGHTS).stat().st_size
        neighbour = asyncio.create_task(self._prove_neighbour())
        try:
            async with self.residency.request(version, client=False):
                await self._prove(version)
            await neighbour
        except Exception:
            await self._remove(version)
            raise
        finally:
            neighbour.cancel()
            await asyncio.gather(neighbour, return_exceptions=True)
        self._loaded[version.model] = version

    async def _prepare_base(self) -> None:
        """Before the first adapter: read the base model's layers; on a CPU, load the shield's adapter of zeros."""
        modules = await asyncio.to_thread(self._base_modules)
        if self.served.cpu_shield:
            version = Version(self.served.base_name, cpu_shield.ZERO)
            folder = await asyncio.to_thread(cpu_shield.write_zero, modules, self.served)
            await self.engine.load(version.model, folder)
            self.base = version

    def _base_modules(self) -> lora.Modules:
        if self._modules is None:
            self._modules = lora.linear_modules(Path(self.served.base_folder))
        return self._modules

    async def _prove(self, version: Version) -> None:
        """Raise `Refused` unless vLLM answers with the version, and beside it with the base model, as was evaluated.

        Raises:
            RuntimeError: when vLLM does not answer, which is no fault of the adapter.
        """
        claims = self._claims(version)
        if not claims:
            why = ("no prompt of its proof fits into --max-model-len" if version.proof else
                   "it was evaluated before evaluations had a proof")
            self._log_change(f"proof of {version.model}",
                             f"{version.model}: {why}; the server only checks that its probabilities make sense")
            await self._probe(version)
            return
        # vLLM answers with an internal error where a probability is not a finite number, except in a stream.
        for result in await asyncio.gather(self.engine.logprobs(version.model), proof.check(self.engine, claims),
                                           return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _claims(self, version: Version) -> list[proof.Claim]:
        if version.proof is None:
            return []
        base_model = None if self.served.merged else self.base.model if self.base else self.served.base_name
        return proof.claims(version.proof, version.model, base_model, self.engine, self.served.proof_tolerance)

    async def _prove_neighbour(self) -> None:
        """Prove an adapter that is served, while another one is loaded. Does nothing if none has a slot.

        Raises:
            Refused: it answers otherwise than it was evaluated.
            RuntimeError: vLLM does not answer.
        """
        version = next((v for v in self.residency.neighbours() if v.proof and not v.removing), None)
        if version is None or self.residency.slots < 2:
            return
        async with self.residency.request(version, client=False):
            try:
                await proof.check(self.engine, [claim.as_tokens() for claim in self._claims(version)[:1]])
            except Refused as refused:
                raise Refused(refused.reason, f"while it was loaded, another adapter answered otherwise: {refused}"
                              ) from None

    async def _probe(self, version: Version) -> None:
        """Raise `Refused` unless the version's probabilities are finite and differ from the base model's.

        Raises:
            RuntimeError: when vLLM does not answer, which is no fault of the adapter.
        """
        # Concurrently: both are computed under the same conditions, and in the time of one.
        plain = self.base.model if self.base else self.served.base_name
        base_model, adapted = await asyncio.gather(
            self.engine.logprobs(plain), self.engine.logprobs(version.model), return_exceptions=True)
        if isinstance(base_model, BaseException):
            raise RuntimeError(f"vLLM does not answer from the base model: {base_model}")
        if isinstance(adapted, BaseException):
            raise adapted
        if base_model.keys() == adapted.keys() and all(
                abs(value - adapted[token]) <= PROBE_TOLERANCE for token, value in base_model.items()):
            raise Refused("no effect", "the probabilities are the same as the base model's")

    async def _unload_unused(self) -> None:
        used = {alias.version for alias in self.current.values()}
        settled = time.monotonic() - SETTLE_SECONDS
        # Not while its alias is being updated: the update may point back to it.
        for version in [v for v in self._loaded.values() if v not in used and not v.requests and v.idle_since <= settled
                        and v.name not in self._updates]:
            await self._unload(version)

    async def _unload(self, version: Version) -> None:
        version.removing = True
        await self._remove(version)
        del self._loaded[version.model]
        events.unloaded(version.name, version.digest)

    async def _remove(self, version: Version) -> None:
        await self.residency.forget(version)
        await asyncio.to_thread(shutil.rmtree, verification.private_copy(version.name, version.digest, self.served),
                                ignore_errors=True)

    def _report_refusal(self, alias: str, what: str, refused: Refused) -> None:
        """Log and count a refusal, once until the same subject is accepted."""
        self._log_change(what, str(refused), partial(events.refused, alias, what, refused.reason))

    def _log_change(self, about: str, message: str, report: Callable[[str], object] = log.warning) -> None:
        """Report a state only when it changes."""
        if self._logged.get(about) != message:
            self._logged[about] = message
            report(message)


def _unfinished(tasks: Mapping[str, asyncio.Task[None]]) -> dict[str, asyncio.Task[None]]:
    return {name: task for name, task in tasks.items() if not task.done()}


def _is_recent(times: tuple[int, ...]) -> bool:
    """Whether one of these times (ns) is so recent that another change could have the same."""
    now = time.time()
    return any(abs(now - each / 1e9) < RECENT_SECONDS for each in times)
