"""kubectl as the tools and the end-to-end tests use it: with deadlines, errors on one line, and tunnels to services."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.core.errors import RetryableError, UserError
from jobs.tools.pods import Manifest, error_in
from jobs.tools.waiting import Late, wait_until

ROLLOUT_SECONDS = 600.0  # with pulling an image
TUNNEL_SECONDS = 30.0


class KubectlError(RetryableError):
    """kubectl failed, or did not end in time; with its error message."""


@dataclass
class Tunnel:
    """A running `kubectl port-forward`. It ends with its pod."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int  # on this machine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass(frozen=True)
class Kubectl:
    """kubectl for one cluster: the one of a context, by default the one that KUBECONFIG names."""

    context: str | None = None

    def argv(self, *arguments: str) -> list[str]:
        return ["kubectl", *(["--context", self.context] if self.context else []), *arguments]

    def __call__(self, *arguments: str, stdin: str | None = None, seconds: float = 60
                 ) -> subprocess.CompletedProcess[str]:
        """Run kubectl and return what it wrote; the API server's warnings are on stderr.

        Raises:
            KubectlError: when it fails or takes longer than `seconds`.
        """
        shown = " ".join(self.argv(*arguments))
        try:
            # Always some stdin: without credentials kubectl would ask the terminal for a user name.
            done = subprocess.run(self.argv(*arguments), input=stdin or "", capture_output=True, text=True,
                                  timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            raise KubectlError(f"{shown}: no end after {seconds:.0f} s") from None
        if done.returncode:
            raise KubectlError(f"{shown}: {error_in(done.stderr)}")
        return done

    def get(self, namespace: str, kinds: str, *arguments: str) -> list[Manifest]:
        """The objects of one or several kinds (`jobs,pods`) in a namespace."""
        found = self("-n", namespace, "get", kinds, "-o", "json", *arguments).stdout
        items: list[Manifest] = json.loads(found)["items"]
        return items

    def wait_for_rollout(self, namespace: str, workload: str) -> None:
        self("-n", namespace, "rollout", "status", workload, seconds=ROLLOUT_SECONDS)

    @contextmanager
    def forward(self, namespace: str, target: str, port: int, local: int = 0) -> Iterator[Tunnel]:
        """Make the port of a pod or service (`service/NAME`) a port of this machine (0: a free one), until the context
        ends.

        Raises:
            UserError: the local port is taken.
            KubectlError: there is no pod to reach.
        """
        command = self.argv("-n", namespace, "port-forward", "--address", "127.0.0.1", target, f"{local or ''}:{port}")
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            with log.open("wb") as stream:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
            tunnel = Tunnel(process, log, local)
            try:
                tunnel.port = self._opened(tunnel, " ".join(command), local)
                yield tunnel
            finally:
                process.terminate()
                process.wait()

    def _opened(self, tunnel: Tunnel, command: str, local: int) -> int:
        """The tunnel's port on this machine, once it is open."""
        def look() -> re.Match[str] | bool:
            return re.search(r"Forwarding from 127\.0\.0\.1:(\d+) ->", tunnel.output) or not tunnel.alive

        try:
            found = wait_until(lambda: command, look, TUNNEL_SECONDS, every=0.1)
        except Late:
            found = False
        if isinstance(found, re.Match):
            return int(found[1])
        if "unable to listen" in tunnel.output.lower():
            raise UserError(f"port {local} is taken. Stop what listens there, or choose another with --port")
        raise KubectlError(f"{command}: {error_in(tunnel.output)}")
