"""The aliases: which adapter version answers under which name, kept up to date without hurting a request.

vLLM knows an adapter as NAME@DIGEST; clients say NAME. A task looks twice a second at the pipeline files and
promotions. A new version is verified, loaded beside the old one, proven by a probe, and only then does the alias move,
between two requests. Requests under way keep the version they began with; the old version is unloaded after the last of
them. Whatever goes wrong, the version before keeps serving; an alias without a version is never answered by the base
model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from jobs import pipeline
from jobs.errors import UserError
from jobs.pipeline import Pipeline
from serving import adapters
from serving.adapters import NotYet, Refused, Served, Wanted

log = logging.getLogger("serving")

POLL_SECONDS = 0.5  # a promotion is to be live within two seconds
BACKOFF_SECONDS = 5.0  # after something unforeseen, such as an unreadable volume
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


class Aliases:
    """Every alias of this server and what it points to. Lives on vLLM's event loop; disk work is done in threads."""

    def __init__(self, served: Served, vllm: ASGIApp) -> None:
        self.served = served
        self.current: dict[str, Alias] = {}
        self._vllm = vllm
        self._volumes = Path(served.volumes)
        self._loaded: list[Version] = []
        self._pipelines: dict[Path, tuple[tuple[int, int], Pipeline | None]] = {}  # file: its stamp, what it says
        self._proven: set[tuple[str, Wanted]] = set()
        self._refusals: dict[str, tuple[adapters.Signature, Refused]] = {}
        self._modules: adapters.Modules | None = None
        self._said: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._forever())

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _forever(self) -> None:
        while True:
            try:
                await self.poll()
                self._said.pop("poll", None)
                pause = POLL_SECONDS
            except Exception as error:  # serving goes on with what there is
                self._say("poll", f"cannot look for adapters: {error!r}; trying again", logging.ERROR)
                pause = BACKOFF_SECONDS
            await asyncio.sleep(pause)

    async def poll(self) -> None:
        """Look once: bring every alias to the best version there is, and unload what nobody uses."""
        named = await asyncio.to_thread(self._read_pipelines)
        for name in self.current.keys() - named.keys():
            log.info("%s: no pipeline file names it any more", name)
            del self.current[name]
        for name in named:
            self.current.setdefault(name, Alias())
        failures: list[Exception] = []
        for name, wish in named.items():
            try:
                await self._update(self.current[name], wish)
            except Exception as error:  # one alias's trouble is not the others'
                self.current[name].why = "its adapter could not be loaded; the server tries again"
                failures.append(error)
        await self._unload_unused()
        if failures:
            raise failures[0]

    def _read_pipelines(self) -> dict[str, Pipeline]:
        """The pipelines by alias. A file that became invalid counts as it was before; so does one that vanished."""
        for file in adapters.pipeline_files(Path(self.served.pipelines)):
            try:
                stat = file.stat()  # follows the links by which Kubernetes swaps a ConfigMap's files
            except OSError:
                continue  # an editor is replacing it
            stamp, before = (stat.st_mtime_ns, stat.st_ino), self._pipelines.get(file)
            if before and before[0] == stamp:
                continue
            try:
                self._pipelines[file] = (stamp, pipeline.load(file).pipeline)
            except UserError as error:
                log.error("%s; what it said before stays in force", error)
                self._pipelines[file] = (stamp, before[1] if before else None)
        named: dict[str, Pipeline] = {}
        for file, (_, wish) in self._pipelines.items():
            if wish is not None and named.setdefault(wish.adapter, wish) is not wish:
                self._say(str(file), f"{file}: another pipeline file has the adapter name {wish.adapter}; this one is "
                                     "ignored", logging.ERROR)
        return named

    async def _update(self, alias: Alias, wish: Pipeline) -> None:
        """Point the alias to the first of: what the pipeline file asks for, what was promoted last."""
        name, reasons = wish.adapter, list[str]()
        for by, find in (("pipeline file", adapters.asked), ("last promotion", adapters.promoted)):
            try:
                wanted = await asyncio.to_thread(find, wish, self._volumes)
                version = await self._prepare(name, wanted)
            except NotYet as reason:
                reasons.append(str(reason))
                continue
            except Refused as refused:  # the log has the whole message; clients need not learn about paths
                reasons.append(f"the adapter of the {by} was refused: {refused.reason}")
                continue
            if version is not alias.version:
                before = alias.version.digest if alias.version else "none"
                alias.version = version  # from the next request on
                log.info("%s: serving %s (%s), before: %s", name, version.digest, by, before)
            break
        alias.why = "; ".join(dict.fromkeys(reasons))
        if reasons:
            serving = f"still serving {alias.version.digest}" if alias.version else "not served"
            self._say(name, f"{name}: {serving}: {alias.why}")
        else:
            self._said.pop(name, None)

    async def _prepare(self, name: str, wanted: Wanted) -> Version:
        """The wanted adapter's version in vLLM, which gets it unless it has it: gate, verification, load, probe."""
        if (name, wanted) not in self._proven:
            evaluation = adapters.evaluation_folder(wanted.evaluation, self._volumes)
            check = partial(asyncio.to_thread, adapters.check_gate, wanted, name, self._volumes)
            await self._unless_refused(f"evaluation {wanted.evaluation} of {name}@{wanted.adapter}", evaluation, check)
            self._proven.add((name, wanted))
        for version in self._loaded:
            if (version.name, version.digest) == (name, wanted.adapter):
                return version
        version = Version(name, wanted.adapter)
        folder = adapters.adapter_folder(wanted.adapter, self._volumes)
        await self._unless_refused(f"adapter {version.model}", folder, partial(self._admit, version))
        return version

    async def _unless_refused(self, what: str, folder: Path, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work, unless it was refused before for the very same files. A refusal is logged, once."""
        signature = await asyncio.to_thread(adapters.signature, folder)
        known = self._refusals.get(what)
        if known and known[0] == signature:
            raise known[1]
        try:
            await work()
        except Refused as refused:
            self._refusals[what] = (signature, refused)
            log.error("%s refused (%s): %s", what, refused.reason, refused)
            raise

    async def _admit(self, version: Version) -> None:
        """Verify a version, load it into vLLM and prove that it has an effect. A failure leaves nothing of it."""
        self.current[version.name].why = "its adapter is being verified and loaded"
        copy = await asyncio.to_thread(adapters.take, version.name, version.digest, self.served, self._base_modules)
        try:
            status, reply = await self._call("POST", "/v1/load_lora_adapter",
                                             {"lora_name": version.model, "lora_path": str(copy)})
            if status != 200:
                raise Refused("load", f"vLLM cannot load it: {reply}")
            await self._probe(version)
        except Exception:
            await self._unload(version)
            raise
        self._loaded.append(version)

    def _base_modules(self) -> adapters.Modules:
        if self._modules is None:
            self._modules = adapters.linear_modules(Path(self.served.base_folder))
        return self._modules

    async def _probe(self, version: Version) -> None:
        """Raise `Refused` unless the version's probabilities are finite and differ from the base model's."""
        base = await self._logprobs(self.served.base_name)
        if base is None:
            raise RuntimeError("vLLM does not answer from the base model")
        adapted = await self._logprobs(version.model)
        if adapted is None:
            raise Refused("values", "vLLM cannot compute finite probabilities with it")
        if base.keys() == adapted.keys() and all(abs(base[t] - adapted[t]) <= PROBE_TOLERANCE for t in base):
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
        for version in [v for v in self._loaded if v not in used and not v.requests]:
            await self._unload(version)
            self._loaded.remove(version)

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

    def _say(self, about: str, message: str, level: int = logging.WARNING) -> None:
        """Log a state when it changes, not at every look."""
        if self._said.get(about) != message:
            self._said[about] = message
            log.log(level, "%s", message)
