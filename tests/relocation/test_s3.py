"""s3:// against moto's S3 server over HTTP: what is pinned is what arrives, and what keeps it out is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import RetryableError, UserError
from jobs.relocation import connection, download, sources
from tests.hub_server import nowhere
from tests.relocation.conftest import CONTENT, SHA256
from tests.s3_server import S3, serve


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serve() as s3:
        s3.put("private/data.jsonl", CONTENT)
        yield s3


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server, named and with credentials as the environment has them, and short pauses between attempts."""
    monkeypatch.setattr(connection, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(connection, "ATTEMPTS", 3)
    for name in ("AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
                        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    server.seen.clear()
    server.drop_after = None
    return server


def source(key: str = "private/data.jsonl", sha256: str | None = SHA256) -> Source:
    return Source(source=f"s3://data/{key}", sha256=sha256)


def test_an_object_with_the_right_pin_arrives(s3: S3, here: Loaded, draft: Path) -> None:
    download.fetch(sources.listing(here, source()), draft)
    assert [(path.name, path.read_bytes()) for path in draft.iterdir()] == [("data.jsonl", CONTENT)]


def test_an_object_with_another_pin_names_both_digests_and_leaves_nothing(s3: S3, here: Loaded, draft: Path) -> None:
    with pytest.raises(UserError, match=f"s3://data/private/data.jsonl: .*{'0' * 64}.*{SHA256}.*jobs pin"):
        download.fetch(sources.listing(here, source(sha256="0" * 64)), draft)
    assert list(draft.iterdir()) == []


@pytest.mark.parametrize("key", ["private/date.jsonl", "../other-bucket/data.jsonl"])
def test_an_object_that_is_not_there_is_named(s3: S3, here: Loaded, draft: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"s3://data/{key}: not found \(404\)"):
        download.fetch(sources.listing(here, source(key)), draft)


@pytest.mark.parametrize("name", ["n" * 241, "..", "é" * 121])
def test_an_object_whose_name_no_file_can_have_is_refused(here: Loaded, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a file"):
        sources.listing(here, source(f"private/{name}"))


def test_a_bucket_with_a_name_that_there_cannot_be_is_refused(s3: S3, here: Loaded, draft: Path) -> None:
    with pytest.raises(UserError, match=r"s3://B B/data.jsonl: not the name of an object \(Parameter valid"):
        download.fetch(sources.listing(here, Source(source="s3://B B/data.jsonl", sha256=SHA256)), draft)


def test_missing_credentials_say_where_they_come_from(s3: S3, here: Loaded, draft: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="s3://data/private/data.jsonl: no credentials.*AWS_ACCESS_KEY_ID"):
        download.fetch(sources.listing(here, source()), draft)
    assert s3.seen == []


def test_credentials_that_are_not_good_enough_say_where_they_come_from(s3: S3, here: Loaded, draft: Path) -> None:
    s3.require_known_credentials(True)
    try:
        with pytest.raises(UserError, match=r"s3://data/private/data.jsonl: not allowed \(403\).*AWS_ACCESS_KEY_ID"):
            download.fetch(sources.listing(here, source()), draft)
    finally:
        s3.require_known_credentials(False)


def test_what_an_earlier_run_left_is_continued(s3: S3, here: Loaded, draft: Path) -> None:
    (draft / "data.jsonl.partial").write_bytes(CONTENT[:123_456])
    download.fetch(sources.listing(here, source()), draft)
    assert (draft / "data.jsonl").read_bytes() == CONTENT
    assert [int(each.removeprefix("bytes=").partition("-")[0]) for each in s3.ranges()] == [123_456]


def test_a_connection_that_breaks_is_tried_again(s3: S3, here: Loaded, draft: Path) -> None:
    s3.drop_after = 150_000
    download.fetch(sources.listing(here, source()), draft)
    assert s3.drop_after is None
    assert len(s3.ranges()) > 1
    assert (draft / "data.jsonl").read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_worth_a_retry(s3: S3, here: Loaded, draft: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere())
    with pytest.raises(RetryableError, match="s3://data/private/data.jsonl: gave up after 3"):
        download.fetch(sources.listing(here, source()), draft)


def test_a_store_with_an_authority_of_its_own_says_which_variable_names_it() -> None:
    from botocore.exceptions import SSLError

    error = SSLError(endpoint_url="https://minio", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    assert isinstance(connection.classify_error(error, "s3://data/x", ""), UserError)
    assert "AWS_CA_BUNDLE" in str(connection.classify_error(error, "s3://data/x", ""))


def test_pin_reads_the_content(s3: S3, here: Loaded) -> None:
    assert sources.find_pin(here, source(sha256=None)) == SHA256
