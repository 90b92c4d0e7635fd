"""moto's S3 server on 127.0.0.1, behind a proxy that records requests and can break connections.

    with serve() as s3:
        s3.put("data.jsonl", b"...")          # s3://data/data.jsonl
        s3.drop_after = 100_000               # the next answer breaks off after so many bytes
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
"""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

BUCKET = "data"


@dataclass
class S3:
    upstream: tuple[str, int]
    url: str = ""
    drop_after: int | None = None
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # status, code; by a pattern of "GET /data/KEY"
    seen: list[str] = field(default_factory=list)  # "GET /data/KEY bytes=0-1048575"

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        self.send("PUT", f"/{BUCKET}/{key}", content)

    def require_known_credentials(self, required: bool) -> None:
        """Whether credentials must be known to the server; those that tests have are not."""
        self.send("POST", "/moto-api/reset-auth", b"0" if required else b"inf")

    def ranges(self) -> list[str]:
        """The ranges that were read, in their order."""
        return [line.rpartition(" ")[2] for line in self.seen if line.startswith("GET ") and "bytes=" in line]

    def delete(self, key: str) -> None:
        """Delete an object."""
        self.send("DELETE", f"/{BUCKET}/{key}")

    def add_user_with(self, *actions: str) -> dict[str, str]:
        """The environment of a user who may do only `actions`; only known users are let in from now on."""
        import boto3

        host, port = self.upstream
        iam = boto3.client("iam", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
                           aws_access_key_id="test", aws_secret_access_key="test")
        name = f"user-{len(iam.list_users()['Users'])}"
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=json.dumps({
            "Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": list(actions), "Resource": "*"}]}))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        self.require_known_credentials(True)
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def refusal(self, request: bytes) -> bytes | None:
        """The answer to a request that is to be refused."""
        head = b" ".join(request.split()[:2]).decode(errors="replace")
        for pattern, (status, code) in self.refused.items():
            if re.match(pattern, head):
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                body = b"" if head.startswith("HEAD ") else text
                return (f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
                        .encode() + body)
        return None

    def send(self, method: str, path: str, content: bytes = b"") -> None:
        """Send a request past the proxy."""
        host, port = self.upstream
        request = urllib.request.Request(f"http://{host}:{port}{path}", data=content, method=method, headers={
            "Content-Type": "application/octet-stream",
            # moto takes any signature, but wants to see for which service it is.
            "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, Signature=test"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            answer.read()


@contextmanager
def serve() -> Iterator[S3]:
    """The server with an empty bucket `data`, until the block ends."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3 = S3((host, port))
    s3.send("POST", "/moto-api/reset")
    s3.send("PUT", f"/{BUCKET}")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        s3.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=_accept, args=(s3, listener), daemon=True).start()
        try:
            yield s3
        finally:
            server.stop()


def _accept(s3: S3, listener: socket.socket) -> None:
    with suppress(OSError):  # the block ended
        while True:
            client, _ = listener.accept()
            upstream = socket.create_connection(s3.upstream)
            for args in ((client, upstream, True), (upstream, client, False)):
                threading.Thread(target=_pump, args=(s3, *args), daemon=True).start()


def _pump(s3: S3, source: socket.socket, sink: socket.socket, requests: bool) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            if requests:
                for head in re.findall(rb"(?:GET|HEAD) [^ ]+ HTTP.*?\r\n\r\n", data, re.DOTALL):
                    wanted = re.search(rb"(?i)^range: *(\S+)", head, re.MULTILINE)
                    s3.seen.append(b" ".join([*head.split()[:2], wanted[1] if wanted else b"-"]).decode())
                if refusal := s3.refusal(data):
                    source.sendall(refusal)
                    continue
            elif s3.drop_after is not None:
                s3.drop_after -= len(data)
                if s3.drop_after <= 0:
                    s3.drop_after = None
                    break
            sink.sendall(data)
    for side in (source, sink):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
