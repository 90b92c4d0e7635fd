"""The aliases: which adapter version answers under which name, kept up to date without hurting a request.

vLLM knows an adapter as NAME@DIGEST; clients say NAME. A task looks twice a second at the pipeline files and
promotions. A new version is verified, loaded beside the old one, proven by a probe, and only then does the alias move,
between two requests. Requests under way keep the version they began with; the old version is unloaded after the last of
them. Whatever goes wrong, the version before keeps serving; an alias without a version is never answered by the base
model. What a running server cannot follow, such as another base model, it follows by a restart (serving/base.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from serving import adapters, base, cpu_shield, events
from serving.adapters import NotYet, Refused, Served, Wanted

log = logging.getLogger("serving")

POLL_SECONDS = 0.5  # a promotion is to be live within two seconds
BACKOFF_SECONDS = 5.0  # after something unforeseen, such as an unreadable volume
RETRY_SECONDS = 60.0  # until an adapter that vLLM did not load is tried again: it may have been out of memory
INNER_SECONDS = 300.0  # for one call of vLLM by the guard itself; a probe queues behind clients' requests
PROBE_PROMPT = "Question: What is this about? Answer:"
# Probabilities of one and the same model differ by less between two runs in float32; an adapter's by far more.
PROBE_TOLERANCE = 1e-6


@dataclass(eq=False)
class Version:
    """One adapter in vLLM. It is unloaded once no alias points to it and its last request ended."""

    name: str
    digest: str
    requests: int = 0

    @property
    def model(self) -> str:
        """The model name inside vLLM."""
        return f"{self.name}@{self.digest}"

    @contextmanager
    def request(self) -> Iterator[None]:
        """Holds the version in vLLM while a request uses it."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1


@dataclass
class Alias:
    version: Version | None = None
    why: str = "it has not been looked for yet"  # why there is no version, or not the wanted one
    promotion: Wanted | None = None  # the last one that was seen


@dataclass(frozen=True)
class Refusal:
    """What was refused for the files with this signature, and until when (monotonic) it is not looked at again."""

    signature: tuple[adapters.Signature, ...]
    refused: Refused
    until: float


class Aliases:
    """Every alias of this server and what it points to. Lives on vLLM's event loop; disk work is done in threads.

    Args:
        vllm: the application that the guard stands before.
        restart: called with the reason when only a restart can follow the pipeline files.
    """

    def __init__(self, served: Served, vllm: ASGIApp, restart: Callable[[str], None]) -> None:
        self.served = served
        self.current: dict[str, Alias] = {}
        self._vllm = vllm
        self._restart = restart
        self._restarting = False
        self._turns: dict[str, tuple[str, float]] = {}  # by subject: why the server restarts, and when (Unix time)
        self._volumes = Path(served.volumes)
        self._loaded: list[Version] = []
        # By file: its stamp, and what it said when it was valid; None if it never was.
        self._pipelines: dict[Path, tuple[tuple[int, int], Pipeline | None]] = {}
        self._named: base.Named = {}
        self._proven: set[tuple[str, Wanted]] = set()
        self._refusals: dict[str, Refusal] = {}
        self._modules: adapters.Modules | None = None
        self.base: Version | None = None  # what base-model requests are given, if not the base model itself
        self._said: dict[str, str] = {}
        self._updates: dict[str, asyncio.Task[None]] = {}  # by alias; under "" what concerns the base model
        self._started = time.time()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._forever())

    async def stop(self) -> None:
        tasks = [*self._updates.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forever(self) -> None:
        prepared = False
        while True:
            try:
                if not prepared:
                    await self._prepare_base()
                    prepared = True
                await self.poll()
                self._said.pop("poll", None)
                pause = POLL_SECONDS
            except Exception as error:  # serving goes on with what there is
                self._say("poll", f"cannot look for adapters: {error!r}; trying again", log.error)
                pause = BACKOFF_SECONDS
            await asyncio.sleep(pause)

    async def poll(self) -> None:
        """Look once: bring every alias to the best version there is, and unload what nobody uses."""
        if self._restarting:
            return
        named = self._named = await asyncio.to_thread(self._read_pipelines)
        for name in self.current.keys() - named.keys():
            gone = self.current.pop(name)
            events.removed(name, gone.version.digest if gone.version else None)
        for name in named:
            self.current.setdefault(name, Alias())
        # Each by itself: a large adapter or a new base model that is being verified must not keep the others waiting.
        work: dict[str, Callable[[], Awaitable[None]]] = {"": self._follow_base}
        work |= {name: partial(self._update, name, self.current[name], wish) for name, wish in named.items()}
        for name in work.keys() - self._updates.keys():
            self._updates[name] = asyncio.create_task(self._attempt(name, work[name]))
        await asyncio.wait(self._updates.values(), timeout=POLL_SECONDS)
        self._updates = {name: task for name, task in self._updates.items() if not task.done()}
        await self._unload_unused()

    def _read_pipelines(self) -> base.Named:
        """The pipelines by alias. A file that became invalid counts as it was before; so does one that vanished."""
        files = adapters.pipeline_files(Path(self.served.pipelines))
        for file in files:
            try:
                stat = file.stat()  # follows the links by which Kubernetes swaps a ConfigMap's files
            except OSError:
                continue  # an editor is replacing it
            stamp, before = (stat.st_mtime_ns, stat.st_ino), self._pipelines.get(file)
            if before and before[0] == stamp:
                continue
            pipeline = before[1] if before else None
            try:
                self._pipelines[file] = (stamp, base.read(file))
                self._said.pop(str(file), None)
            except UserError as error:
                self._pipelines[file] = (stamp, pipeline)
                name = pipeline.adapter if pipeline else base.name_of_invalid(file, (), self._volumes,
                                                                              alone=len(files) == 1)
                self._refused(name or file.parent.name, str(file),
                              Refused("pipeline file", f"{error}; what it said before stays in force"))
        named = base.name_files({file: pipeline for file, (_, pipeline) in self._pipelines.items()}, self._volumes)
        for file, (_, pipeline) in self._pipelines.items():
            if pipeline is not None and named[pipeline.adapter] is not pipeline:
                self._refused(pipeline.adapter, str(file), Refused(
                    "name", f"another pipeline file has the adapter name {pipeline.adapter}; this one is ignored"))
        return named

    async def _follow_base(self) -> None:
        """Restart when the pipeline files ask for what a running server cannot change to, and no adapter is lost by it.

        Until then, while an adapter for a new base model is trained for example, the server goes on as it is.
        """
        pipeline = base.deciding(self._named)
        reason = base.changed(self._named, self.served)
        if pipeline is None or reason is None:
            self._said.pop("base", None)
            self._turns.pop("base", None)
            return
        serving = [name for name, alias in self.current.items() if alias.version]
        try:
            if not self._has_turn("base", reason):
                await self._unless_refused(pipeline.adapter, reason, base.of(pipeline).folders(self._volumes), partial(
                    asyncio.to_thread, base.check_restart, self._named, self.served, serving))
        except NotYet as missing:
            self._say("base", f"{reason}, but {missing}; until then the server goes on as it is")
        except Refused as refused:
            self._say("base", f"{reason}, but it was refused: {refused.reason}; the server goes on as it is")
        else:
            self._restart_in_turn("base", reason)

    def _has_turn(self, subject: str, reason: str) -> bool:
        """Whether everything was checked, and the server only waits for its turn to restart."""
        return subject in self._turns and self._turns[subject][0] == reason

    def _restart_in_turn(self, subject: str, reason: str) -> None:
        """Restart now, or at this replica's turn if there are several. To be called until it happens."""
        if not self._has_turn(subject, reason):
            turn = base.next_turn(time.time(), self.served.restart_slot_seconds, socket.gethostname())
            self._turns[subject] = reason, turn
        _, turn = self._turns[subject]
        if time.time() < turn:
            at = time.strftime("%H:%M:%S", time.localtime(turn))
            self._say(subject, f"{reason}; this replica restarts at {at}, in its turn")
            return
        self._restarting = True  # from now on nothing new is looked for
        self._restart(reason)

    async def _attempt(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
            self._said.pop(f"attempt {name}", None)
        except Exception as error:  # an unreadable volume, say
            if name in self.current:
                self.current[name].why = "its adapter could not be loaded; the server tries again"
            self._say(f"attempt {name}", f"{name or 'base model'}: {error!r}; trying again", log.error)
            await asyncio.sleep(BACKOFF_SECONDS)

    async def _update(self, name: str, alias: Alias, wish: Pipeline | None) -> None:
        """Point the alias to the first that may be served: what the pipeline file asks for, what was promoted last.

        If nothing is served, as after a restart, and both are unfit: what was promoted before.
        """
        reasons = list[str]()
        found = [("pipeline file", await self._look(name, partial(self._asked, wish))),
                 ("last promotion", await self._look(name, partial(self._promoted, name)))]
        self._notice(name, alias, found[1][1])
        if alias.version is None:
            found += [("earlier promotion", each)
                      for each in await asyncio.to_thread(adapters.earlier, name, self._volumes)]
        tried: set[Wanted] = set()
        for by, wanted in found:
            if isinstance(wanted, Wanted) and wanted in tried:
                continue
            try:
                if not isinstance(wanted, Wanted):
                    raise wanted
                tried.add(wanted)
                version = await self._prepare(name, wanted)
            except NotYet as reason:
                reasons.append(str(reason))
                continue
            except Refused as refused:  # the log has the whole message; clients need not learn about paths
                reasons.append(f"the adapter of the {by} was refused: {refused.reason}")
                continue
            if version is not alias.version:
                before, alias.version = alias.version, version  # from the next request on
                events.swapped(name, version.digest, before.digest if before else None, by,
                               await asyncio.to_thread(self._seconds_since_proof, name, wish, wanted))
            break
        alias.why = "; ".join(dict.fromkeys(reasons))
        if reasons:
            self._say(name, alias.why, partial(events.waiting, name, alias.version.digest if alias.version else None))
        else:
            self._said.pop(name, None)

    async def _look(self, name: str, find: Callable[[], Wanted]) -> Wanted | NotYet | Refused:
        try:
            return await asyncio.to_thread(find)
        except NotYet as reason:
            return reason
        except Refused as refused:
            self._refused(name, f"what {name} asks for", refused)
            return refused

    def _asked(self, pipeline: Pipeline | None) -> Wanted:
        if pipeline is None:
            raise NotYet("its pipeline file is invalid")
        try:
            base.check_fits(pipeline, self.served)
        except Refused:
            if base.of(pipeline) == self._next_base():
                raise NotYet("the server has to restart with another base model or mode first") from None
            raise
        return adapters.asked(pipeline, self._volumes)

    def _promoted(self, name: str) -> Wanted:
        wanted, following = adapters.promoted(name, self._volumes), self._next_base()
        if following and base.is_for(wanted.adapter, following, self._volumes) and not base.is_for(
                wanted.adapter, base.running(self.served), self._volumes):
            raise NotYet("its last promotion is for the base model with which the server restarts")
        return wanted

    def _next_base(self) -> base.Base | None:
        """The base that the pipeline files ask for, if this server runs on another one."""
        pipeline = base.deciding(self._named)
        desired = base.of(pipeline) if pipeline else None
        return desired if desired != base.running(self.served) else None

    def _notice(self, name: str, alias: Alias, promoted: Wanted | NotYet | Refused) -> None:
        """Report a promotion that was not seen before."""
        if isinstance(promoted, Wanted) and promoted != alias.promotion:
            alias.promotion = promoted
            events.promotion_seen(name, promoted.adapter, promoted.evaluation)

    def _seconds_since_proof(self, name: str, wish: Pipeline | None, wanted: Wanted) -> float | None:
        """Seconds since the adapter could be served, or since the pipeline file asked for it if that was later.

        None if both were before this server started.
        """
        try:
            proved = adapters.proved_at(name, wanted, self._volumes)
        except (OSError, UserError):
            return None
        asked = max((stamp[0] / 1e9 for stamp, said in self._pipelines.values() if wish and said is wish), default=0.0)
        since = max(proved, asked)
        return max(0.0, time.time() - since) if since >= self._started else None

    async def _prepare(self, name: str, wanted: Wanted) -> Version:
        """The wanted adapter's version in vLLM, which gets it unless it has it: gate, verification, load, probe."""
        if (name, wanted) not in self._proven:
            await self._check_gate(name, wanted)
            self._proven.add((name, wanted))
        for version in self._loaded:
            if (version.name, version.digest) == (name, wanted.adapter):
                return version
        version = Version(name, wanted.adapter)
        await self._unless_refused(name, f"adapter {version.model}", [self._folder(wanted.adapter)],
                                   partial(self._admit, version))
        return version

    def _folder(self, digest: str) -> Path:
        """What is verified before the adapter is served."""
        return adapters.adapter_folder(digest, self._volumes)

    async def _check_gate(self, name: str, wanted: Wanted) -> None:
        what = f"{name}@{wanted.adapter}"
        check = partial(asyncio.to_thread, adapters.check_gate, wanted, name, self._volumes)
        try:
            await self._unless_refused(name, f"evaluation {wanted.evaluation} of {what}",
                                       [adapters.evaluation_folder(wanted.evaluation, self._volumes)], check)
        except NotYet as missing:
            if not await asyncio.to_thread(adapters.adapter_folder(wanted.adapter, self._volumes).is_dir):
                raise
            refused = Refused("not promoted", f"it is there, but {missing}")
            self._refused(name, f"adapter {what}", refused)
            raise refused from None

    async def _unless_refused(self, alias: str, what: str, folders: list[Path],
                              work: Callable[[], Awaitable[None]]) -> None:
        """Do the work, unless it was refused before for the very same files. A refusal is logged, once."""
        signature = await asyncio.to_thread(lambda: tuple(adapters.signature(folder) for folder in folders))
        known = self._refusals.get(what)
        if known and known.signature == signature and time.monotonic() < known.until:
            raise known.refused
        try:
            await work()
        except Refused as refused:
            pause = RETRY_SECONDS if refused.reason == "load" else math.inf
            self._refusals[what] = Refusal(signature, refused, time.monotonic() + pause)
            self._refused(alias, what, refused)
            raise
        self._said.pop(what, None)

    async def _admit(self, version: Version) -> None:
        """Verify a version, load it into vLLM and prove that it has an effect. A failure leaves nothing of it."""
        if version.name in self.current:
            self.current[version.name].why = "its adapter is being verified and loaded"
        copy = await asyncio.to_thread(adapters.take, version.name, version.digest, self.served, self._base_modules)
        try:
            await self._load(version, copy)
            await self._probe(version)
        except Exception:
            await self._unload(version)
            raise
        self._loaded.append(version)

    async def _prepare_base(self) -> None:
        """Before the first adapter: read the base model's layers, and on a CPU load the shield's adapter of zeros."""
        modules = await asyncio.to_thread(self._base_modules)
        if self.served.cpu_shield:
            version = Version(self.served.base_name, cpu_shield.ZERO)
            folder = await asyncio.to_thread(cpu_shield.write_zero, modules, self.served)
            await self._load(version, folder)
            self.base = version

    async def _load(self, version: Version, folder: Path) -> None:
        status, reply = await self._call("POST", "/v1/load_lora_adapter",
                                         {"lora_name": version.model, "lora_path": str(folder)})
        if status != 200:
            raise Refused("load", f"vLLM cannot load it: {reply}")

    def _base_modules(self) -> adapters.Modules:
        if self._modules is None:
            self._modules = adapters.linear_modules(Path(self.served.base_folder))
        return self._modules

    async def _probe(self, version: Version) -> None:
        """Raise `Refused` unless the version's probabilities are finite and differ from the base model's."""
        # At once, so that both are computed under the same conditions and the probe costs the time of one.
        plain = self.base.model if self.base else self.served.base_name
        base_model, adapted = await asyncio.gather(self._logprobs(plain), self._logprobs(version.model))
        if base_model is None:
            raise RuntimeError("vLLM does not answer from the base model")
        if adapted is None:
            raise Refused("values", "vLLM cannot compute finite probabilities with it")
        if base_model.keys() == adapted.keys() and all(
                abs(value - adapted[token]) <= PROBE_TOLERANCE for token, value in base_model.items()):
            raise Refused("no effect", "with it the base model's probabilities stay the same, so it changes nothing")

    async def _logprobs(self, model: str) -> dict[tuple[int, str], float] | None:
        """The best tokens' log-probabilities, by position after a fixed prompt; None if vLLM has no finite ones."""
        status, reply = await self._call("POST", "/v1/completions", {
            "model": model, "prompt": PROBE_PROMPT, "max_tokens": 4, "temperature": 0, "logprobs": 5})
        if status != 200:
            log.warning("the probe of %s failed: %s", model, reply)
            return None
        tops = json.loads(reply)["choices"][0]["logprobs"]["top_logprobs"]
        found = {(i, token): float(value) for i, top in enumerate(tops) for token, value in top.items()}
        # vLLM writes -9999 for minus infinity
        return found if found and all(math.isfinite(v) and v > -9999 for v in found.values()) else None

    async def _unload_unused(self) -> None:
        used = [alias.version for alias in self.current.values()]
        # Not while its alias is being updated: the update may be about to point back to it.
        for version in [v for v in self._loaded
                        if v not in used and not v.requests and v.name not in self._updates]:
            await self._unload(version)
            self._loaded.remove(version)
            events.unloaded(version.name, version.digest)

    async def _unload(self, version: Version) -> None:
        status, reply = await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": version.model})
        if status not in (200, 404):  # 404: it was never loaded
            raise RuntimeError(f"vLLM does not unload {version.model}: {reply}")
        await asyncio.to_thread(shutil.rmtree, adapters.private_copy(version.name, version.digest, self.served),
                                ignore_errors=True)

    async def _call(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Call vLLM behind the guard, as a client that has the API key would."""
        transport = httpx.ASGITransport(app=self._vllm, raise_app_exceptions=False)
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        client = httpx.AsyncClient(transport=transport, base_url="http://vllm")
        async with asyncio.timeout(INNER_SECONDS), client:
            reply = await client.request(method, path, json=body, headers=headers)
        return reply.status_code, reply.text

    def _refused(self, alias: str, what: str, refused: Refused) -> None:
        """Report a refusal, once, until the same thing was accepted."""
        self._say(what, str(refused), partial(events.refused, alias, what, refused.reason))

    def _say(self, about: str, message: str, say: Callable[[str], object] = log.warning) -> None:
        """Say a state when it changes, not at every look."""
        if self._said.get(about) != message:
            self._said[about] = message
            say(message)
