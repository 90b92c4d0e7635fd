"""Promises about sources that mean no good, or are broken: one line that says so, no secret in it, and no wait."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from jobs.core import command, retries
from jobs.core.declarations import Loaded, Source
from jobs.core.errors import RetryableError, UserError
from jobs.core.registry import Credentials, Reference, Registry
from jobs.relocation import download, sources, transfer
from jobs.relocation.connection import shown
from jobs.relocation.sources import interface
from jobs.relocation.sources.interface import Item
from tests.hub_server import Fault, Hub, _Handler
from tests.relocation.conftest import CONTENT, SHA256, url_item
from tests.relocation.test_hf import hub_source

HUGE = "9" * 5000  # Python makes no number of so many digits


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A URL whose server answers each connection in this way."""
    def accept() -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/data.bin"


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["\u00b2", HUGE, "-1", "1e3"])
def test_a_length_that_is_no_number_is_none(hub: Hub, draft: Path, number: str) -> None:
    hub.lengths = False
    hub.versions["data.bin"] = f'"v"\r\nContent-Length: {number}'
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("content_range", [f"bytes 150000-299999/{HUGE}", f"bytes {HUGE}-299999/300000",
                                           "bytes \u00b2-299999/300000"])
def test_a_range_that_is_no_range_is_none(hub: Hub, draft: Path, content_range: str) -> None:
    (draft / "data.bin.partial").write_bytes(CONTENT[:150_000])
    hub.faults.append(Fault("data.bin", content_range=content_range))
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(("value", "seconds"), [
    ("\u00b2", None), ("Jan 0 24:60:61  01 999999999999999999999999999999 EST", None), (HUGE, float("inf")), ("3", 3)])
def test_a_pause_that_is_no_number_is_none(value: str, seconds: float | None) -> None:
    assert retries.retry_after({"Retry-After": value}) == seconds


@pytest.mark.parametrize("pause_s", [0, 60])
def test_a_redirect_whose_text_does_not_end_is_followed(hub: Hub, draft: Path, pause_s: float) -> None:
    done = threading.Event()

    def endless(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {hub.url}/files/data.bin\r\n\r\nx".encode())
        while not done.wait(pause_s):
            connection.sendall(b"x" * 65536)

    with serving(endless) as url:
        thread = threading.Thread(target=download.fetch, args=([Item("data.bin", url, sha256=SHA256)], draft),
                                  daemon=True)
        thread.start()
        thread.join(30)
        done.set()
        assert not thread.is_alive()
    assert (draft / "data.bin").read_bytes() == CONTENT


def test_a_connection_that_trickles_is_replaced_also_if_there_is_no_other(
        hub: Hub, draft: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """At that rate the file would take an hour."""
    monkeypatch.setattr(transfer, "SLOW_S", 0.3)
    monkeypatch.setattr(transfer, "TICK_S", 0.05)
    hub.faults.append(Fault("data.bin", bytes_per_second=80))
    caplog.set_level("INFO", "jobs")
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    assert "a connection brings" in caplog.text and "replacing it" in caplog.text


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_headers_that_are_none_put_no_secret_into_the_log(hub: Hub, draft: Path, caplog: pytest.LogCaptureFixture
                                                         ) -> None:
    """urllib3 has a warning about them, with the URL."""
    level = logging.getLogger("urllib3").level
    try:
        command.log_to_stderr()
        hub.lengths, hub.versions["data.bin"] = False, '"v"\r\nno header'
        with suppress(UserError, RetryableError):
            download.fetch([Item("data.bin", f"{hub.url}/files/data.bin?signature=hush", sha256=SHA256)], draft)
        assert hub.seen and "hush" not in caplog.text
    finally:
        logging.getLogger("urllib3").setLevel(level)


def test_user_and_password_in_a_url_are_for_its_host(hub: Hub, draft: Path) -> None:
    hub.faults += [Fault("first", status=302, location=f"{hub.url}/files/second"),
                   Fault("second", status=302, location=f"{hub.cdn}/files/data.bin")]
    url = f"{hub.url}/files/first".replace("://", "://me%40home:h%2Fsh\u00e9@")
    download.fetch([Item("data.bin", url, sha256=SHA256)], draft)
    first, second, elsewhere = (seen.headers.get("authorization") for seen in hub.seen)
    assert first == second == "Basic bWVAaG9tZTpoL3Now6k=", "me@home:h/shé"
    assert elsewhere is None


@pytest.mark.parametrize("url", ["https://me:hu/sh@example.org/a.jsonl", "https://me:hu?sh@example.org/a.jsonl",
                                 "https://me:hu#sh@example.org/a.jsonl"])
def test_a_password_that_is_not_written_as_in_a_url_is_in_no_message(hub: Hub, draft: Path, url: str) -> None:
    with pytest.raises((UserError, RetryableError)) as error:
        download.fetch([Item("a.jsonl", url, sha256=SHA256)], draft)
    assert not {"hu", "sh"} & {*str(error.value).replace("/", " ").replace(":", " ").split()}
    assert "hu" not in shown(url) and "sh" not in shown(url)


# --- listings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [
    [""], ["."], ["a/"], ["./a"], ["a//b"], ["/a"], ["../a"], ["a/../b"], ["a\0"], ["a\nb"], ["\x1b[2J"], ["\ud800"],
    ["a" * 300], ["a/" * 600 + "a"], ["a", "a"], ["a", "a/b"], ["a", "a.partial"], ["a", "a.partial.ranges"],
    ["a", "a.partial/b"]], ids=ascii)
def test_names_that_cannot_be_those_of_files_in_one_folder_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match=r"^s3://data/folder/: '.*' (cannot be|is) ") as error:
        interface.check_names(Source(source="s3://data/folder/"), names)
    assert str(error.value).isprintable()


def test_other_names_are_taken() -> None:
    names = ["a", "b/a", "b/c/\u00e9 d?.jsonl", ".hidden", "x.partial"]
    interface.check_names(Source(source="s3://data/folder/"), names)


@pytest.mark.parametrize("changes", [
    {"size": "300"}, {"size": -1}, {"size": 2.5}, {"size": [1]}, {"size": True}, {"rfilename": 5}, {"rfilename": None},
    {"rfilename": ["a"]}, {"rfilename": "\ud800"}], ids=ascii)
def test_a_hub_whose_list_of_files_is_none_is_named(hub: Hub, here: Loaded, monkeypatch: pytest.MonkeyPatch,
                                                    changes: dict[str, Any]) -> None:
    source, respond = hub_source(hub), _Handler.respond

    def changed(self: _Handler, status: int, body: bytes, *more: Any) -> None:
        if "/api/" in self.path:
            info = json.loads(body)
            info["siblings"][0] |= changes
            body = json.dumps(info).encode()
        respond(self, status, body, *more)

    monkeypatch.setattr(_Handler, "respond", changed)
    with pytest.raises(UserError, match="does not answer as a hub does|cannot be the name of a file"):
        sources.listing(here, source)


# --- registries ------------------------------------------------------------------------------------------------------


def test_a_token_is_not_sent_on_to_where_the_token_service_redirects() -> None:
    received: list[bytes] = []

    def elsewhere(connection: socket.socket) -> None:
        received.append(b"a request")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\nConnection: close\r\n\r\n{\"token\": \"x\"}")

    with serving(elsewhere) as target:
        def redirect(connection: socket.socket) -> None:
            connection.sendall(f"HTTP/1.1 307 Elsewhere\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close"
                               "\r\n\r\n".encode())

        with serving(redirect) as realm, pytest.raises(UserError, match="307"):
            Registry(Reference("127.0.0.1:1", "a"))._token({"realm": realm}, Credentials("me", identity_token="hush"),
                                                           "it")
    assert not received
