"""Run an overlay without a cluster: every workload's containers as local processes, on the real manifests.

All pods start together and wait for their inputs, as in a cluster. A failed Job is retried as its manifest describes.
When a Job of an adapter has failed for good, the other Jobs of this adapter are stopped, the others continue, and the
run ends with that Job's last lines. Any other failure stops everything at once. When the Jobs are done, the verdict on
each adapter is printed; with `--ask`, the base model and every adapter that passed answer a question through the
OpenAI-compatible endpoint. Then the servers keep running until Ctrl-C, unless `--exit` is given. A tool for developers,
not an orchestrator.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.core.errors import RetryableError, UserError

if TYPE_CHECKING:
    from jobs.tools.overlay import Overlay
    from jobs.tools.pods import Container, Pod

log = logging.getLogger("jobs")

TAIL_LINES = 20
LONGEST_LINE = 2**24  # bytes of a log line that is still shown whole
COLOURS = (36, 33, 35, 32, 34, 96, 93, 95)  # ANSI foregrounds that read on dark and on light
DEPLOYMENT_RESTARTS = 3
INFERENCE, TENSORBOARD = "model-inference", "tensorboard"  # the Deployments whose addresses people want


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--state", type=Path, metavar="DIR",
                        help="where volumes and logs are kept (default: .local/NAME beside the checkout's README)")
    parser.add_argument("--ask", metavar="QUESTION", help="ask the base model and every adapter this question")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME",
                        help="run the Jobs of this adapter only, and ask it only; can be repeated (default: all)")
    parser.add_argument("--exit", action="store_true", help="exit when the Jobs are done (and --ask is answered)")
    parser.add_argument("--port-offset", type=int, default=0, metavar="N", help="add N to every port of the manifests")
    parser.add_argument("--verbose", action="store_true", help="show the servers' logs too (always in STATE/logs)")


class PodFailed(Exception):
    """A pod failed for good."""

    def __init__(self, pod: Pod, code: int, tail: list[str]) -> None:
        self.pod, self.code, self.tail = pod, code, tail
        super().__init__(f"{pod.title} failed with exit code {code}")


def run(args: argparse.Namespace) -> None:
    """Run the overlay.

    Raises:
        UserError: the overlay is invalid, a port is taken, or a Job failed with exit code 2.
        RetryableError: a Job failed otherwise, after its retries.
    """
    from jobs.tools import overlay, pods

    names = overlay.find(args.overlay).names
    if unknown := [name for name in args.adapter if name not in names]:
        raise UserError(f"--adapter {unknown[0]}: {args.overlay} has no such adapter; it has "
                        f"{', '.join(names) or 'none'}")
    loaded = overlay.load(args.overlay, only=args.adapter)
    manifests = pods.render(args.overlay)
    state = (args.state or pods.CHECKOUT / ".local" / args.overlay.resolve().name).resolve()
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--state {state}: cannot be used as a folder: {error.strerror}. Name another one") from None
    with ExitStack() as stack:
        try:
            own(state, stack)
            chosen = [pod for pod in pods.pods(manifests, state, args.port_offset)
                      if not args.adapter or pod.adapter is None or pod.adapter in args.adapter]
            runner = Runner(chosen, state, args.verbose)
        except OSError as error:
            raise UserError(f"--state {state}: {error.filename}: {error.strerror}. Name another folder, or correct the "
                            "name or path in the overlay") from None
        runner.check_ports()
        if args.ask and runner.pod(INFERENCE) is None:
            raise UserError(f"--ask: this overlay has no Deployment {INFERENCE} to ask")
        log.info("running %s with its state in %s", args.overlay, state)
        try:
            asyncio.run(_session(runner, loaded, args))
        except PodFailed as failure:
            failures = [*runner.failures, *([] if failure in runner.failures else [failure])]
            message = "\n".join(_last_lines(failure, runner) for failure in failures)
            fatal = any(failure.code == UserError.exit_code for failure in failures)
            raise (UserError if fatal else RetryableError)(message) from None


def _last_lines(failure: PodFailed, runner: Runner) -> str:
    tail = "\n".join(f"    {line}" for line in failure.tail)
    return f"{failure}. Its last lines (all: {runner.log_file(failure.pod)}):\n{tail}"


async def _session(runner: Runner, overlay: Overlay, args: argparse.Namespace) -> None:
    """Run every pod until the session's work is done, a pod fails, or a signal arrives; then stop them all."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = runner.start(group)
            main = group.create_task(_present(runner, overlay, args))
            interrupt = group.create_task(stopped.wait())
            await asyncio.wait([main, interrupt], return_when=asyncio.FIRST_COMPLETED)
            if stopped.is_set():
                log.info("stopping")
            for task in (*tasks, main, interrupt):
                if not task.done():
                    task.cancel()
    except* (PodFailed, UserError, RetryableError) as failures:
        raise failures.exceptions[0] from None
    finally:
        await runner.stop()


async def _present(runner: Runner, overlay: Overlay, args: argparse.Namespace) -> None:
    """When the Jobs are done: show the verdicts, ask the models, print the addresses, and keep serving.

    Raises:
        PodFailed: a Job of an adapter failed; the others were presented.
    """
    from jobs.tools import summary

    await runner.jobs_done()
    volumes, endpoint = runner.state / "volumes", runner.url(INFERENCE)
    ran = {pod.adapter for pod in runner.pods} - {failure.pod.adapter for failure in runner.failures}
    results = summary.results([loaded.pipeline for name, loaded in overlay.adapters.items() if name in ran], volumes)
    if results:
        print(summary.verdicts(results), flush=True)
    passed = any(result.passed for result in results)
    stays = not args.exit and not runner.failures
    if endpoint and (stays or (args.ask and passed)):
        log.info("waiting for %s to be ready; its log: %s", INFERENCE, runner.state / "logs" / f"{INFERENCE}.log")
        await runner.ready(INFERENCE)
    if args.ask and passed and endpoint:
        print(await asyncio.to_thread(summary.ask, results, volumes, endpoint, args.ask), flush=True)
    elif args.ask:
        print("No answer to --ask: no adapter passed its gate, so none is served." if results else
              "No answer to --ask: no Job of this overlay evaluated an adapter, so none is served.", flush=True)
    urls = (None, None) if runner.failures else (endpoint, runner.url(TENSORBOARD))
    print(summary.places(overlay.environment.environment, results, volumes, *urls, args.ask or "Hello!",
                         serving=stays), flush=True)
    if runner.failures:  # stop the servers, and end with the reason
        raise runner.failures[0]
    if stays:
        await asyncio.Event().wait()


def own(state: Path, stack: ExitStack) -> None:
    """Lock the state: two runners would conflict over its ports and pods."""
    handle = os.open(state / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{state} is in use by another `jobs local`. Stop it, or give this one its own --state and "
                        "--port-offset") from None


@dataclass
class Runner:
    """The pods and their processes."""

    pods: list[Pod]
    state: Path
    verbose: bool
    failures: list[PodFailed] = field(default_factory=list)  # of adapters' Jobs; the other adapters continue
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # by the pod's name
    _processes: dict[asyncio.subprocess.Process, Pod] = field(default_factory=dict)
    _tails: dict[str, collections.deque[str]] = field(default_factory=dict)
    _done: dict[str, asyncio.Event] = field(default_factory=dict)
    _ready: dict[str, asyncio.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.state / "logs").mkdir(exist_ok=True)
        for pod in self.pods:
            self._tails[pod.name] = collections.deque(maxlen=TAIL_LINES)
            self._done[pod.name], self._ready[pod.name] = asyncio.Event(), asyncio.Event()
            self.log_file(pod).unlink(missing_ok=True)

    def log_file(self, pod: Pod) -> Path:
        return self.state / "logs" / f"{pod.title}.log"

    def check_ports(self) -> None:
        """Refuse to start when a port is taken, before anything runs."""
        for pod in self.pods:
            for port in (port for container in pod.containers for port in container.ports.values()):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        probe.bind(("127.0.0.1", port))
                    except OSError as error:
                        raise UserError(f"port {port}, which {pod.title} needs, is not available: {error.strerror}. "
                                        "Stop what listens there, or shift all ports with --port-offset 1000") from None

    def pod(self, title: str) -> Pod | None:
        """The pod with this title; None when the overlay has none."""
        return next((pod for pod in self.pods if pod.title == title), None)

    def url(self, title: str) -> str | None:
        """The address of a Deployment's first port; None when the overlay has no such Deployment, or it no port."""
        pod = self.pod(title)
        port = next((port for container in pod.containers for port in container.ports.values()), None) if pod else None
        return f"http://127.0.0.1:{port}" if port else None

    def start(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Start every pod; returns their tasks."""
        self._tasks = {pod.name: group.create_task(self._run_or_give_up(pod)) for pod in self.pods}
        return list(self._tasks.values())

    async def _run_or_give_up(self, pod: Pod) -> None:
        """Run a pod to its end. When a Job of an adapter fails for good, stop what waits for it: the adapter's Jobs."""
        try:
            await self.run_pod(pod)
        except PodFailed as failure:
            if pod.adapter is None:
                raise
            self.failures.append(failure)
            others = [other for other in self.pods if other.adapter == pod.adapter and other is not pod]
            log.error("%s. The other Jobs of %s are stopped; other adapters continue", failure, pod.adapter)
            for other in others:
                self._tasks[other.name].cancel()
            # Only when no task reads a process's output any more, `stop` can.
            await asyncio.gather(*(self._tasks[other.name] for other in others), return_exceptions=True)
            await self.stop(others)
            for stopped in (pod, *others):
                self._done[stopped.name].set()

    async def jobs_done(self) -> None:
        """Wait until every Job is done, has failed, or was stopped because a Job of its adapter failed."""
        await asyncio.gather(*(self._done[pod.name].wait() for pod in self.pods if pod.kind == "Job"))

    async def ready(self, title: str) -> None:
        await asyncio.gather(*(self._ready[pod.name].wait() for pod in self.pods if pod.title == title))

    async def run_pod(self, pod: Pod) -> None:
        """Run a pod to its end: a Job until it succeeds or has failed for good, a Deployment until it failed
        DEPLOYMENT_RESTARTS times more than once: without a cluster a person is watching."""
        limit = pod.backoff_limit if pod.kind == "Job" else DEPLOYMENT_RESTARTS
        failures = 0
        while True:
            code = await self._run_containers(pod)
            if code == 0 and pod.kind == "Job":
                self._done[pod.name].set()
                return
            log.warning("%s ended with exit code %d", pod.title, code)
            failures += code != 0  # serving ends with 0 to be started again, with another base model for example
            if failures > limit or code in pod.fatal_exit_codes or (
                    pod.kind == "Deployment" and code == UserError.exit_code):
                raise PodFailed(pod, code, list(self._tails[pod.name]))
            pause = min(60, 2**failures)
            what = f"attempt {failures + 1} of {limit + 1}" if failures else "again"
            log.info("%s: %s in %d s", pod.title, what, pause)
            await asyncio.sleep(pause)

    async def _run_containers(self, pod: Pod) -> int:
        self._ready[pod.name].clear()
        for container in pod.init_containers:
            code = await self._run_container(pod, container)
            if code:
                return code
        watch = asyncio.create_task(self._watch_ready(pod))
        try:
            codes = await asyncio.gather(*(self._run_container(pod, container) for container in pod.containers))
        finally:
            watch.cancel()
        return next((code for code in codes if code), 0)

    async def _run_container(self, pod: Pod, container: Container) -> int:
        try:
            process = await asyncio.create_subprocess_exec(
                *container.argv, cwd=self.state, env=container.env, stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, limit=LONGEST_LINE,
                start_new_session=True, preexec_fn=_die_with_parent)
        except (OSError, ValueError, TypeError) as error:  # no program; a NUL, or what is no text
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{pod.title}: the container {container.name} cannot start {container.argv[0]}: "
                            f"{reason}. Install it on this machine, or correct `command`") from None
        self._processes[process] = pod
        assert process.stdout
        with self.log_file(pod).open("a", encoding="utf-8") as file:
            while line := await _read_line(process.stdout):
                file.write(line + "\n")
                file.flush()
                self._tails[pod.name].append(line)
                if pod.kind == "Job" or self.verbose:
                    self._show(pod, line)
        code = await process.wait()
        del self._processes[process]
        return code if code >= 0 else 128 - code

    def _show(self, pod: Pod, line: str) -> None:
        title = f"{pod.title:<{max(len(p.title) for p in self.pods)}} |"
        if sys.stdout.isatty():
            title = f"\033[{COLOURS[self.pods.index(pod) % len(COLOURS)]}m{title}\033[0m"
        print(f"{title} {line}", flush=True)

    async def _watch_ready(self, pod: Pod) -> None:
        urls = [container.ready_url for container in pod.containers if container.ready_url]
        for url in urls:
            while not await asyncio.to_thread(_answers, url):
                await asyncio.sleep(0.5)
        if urls:
            log.info("%s is ready: %s", pod.title, self.url(pod.title))
        self._ready[pod.name].set()

    async def stop(self, pods: Collection[Pod] | None = None) -> None:
        """SIGTERM to the process groups of these pods (None: of all), SIGKILL to those that outlive their grace
        period."""
        processes = {process: pod for process, pod in self._processes.items() if pods is None or pod in pods}
        for process in processes:
            del self._processes[process]
            _signal(process, signal.SIGTERM)
        # communicate, not wait: a process blocks while its last output is not read
        waits = [asyncio.wait_for(process.communicate(), pod.grace_seconds) for process, pod in processes.items()]
        for (process, pod), outcome in zip(processes.items(), await asyncio.gather(*waits, return_exceptions=True),
                                           strict=True):
            if isinstance(outcome, BaseException):
                log.warning("%s did not stop in time: killed", pod.title)
            _signal(process, signal.SIGKILL)  # also what the process left in its group


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _die_with_parent() -> None:
    """In the child: get SIGTERM when the runner dies, even by SIGKILL, so that no server is left behind (Linux)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


async def _read_line(stream: asyncio.StreamReader) -> str:
    """The next line, without its end but never empty; "" at the end of the stream.

    Of a line beyond LONGEST_LINE a part is lost.
    """
    try:
        raw = await stream.readline()
    except ValueError:
        raw = await stream.read(2**16)
    return (raw.decode(errors="replace").rstrip("\r\n") or " ") if raw else ""


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
