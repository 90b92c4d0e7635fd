"""The registry client, against Debian's docker-registry and against a server with tokens and faults."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.core import registry
from jobs.core.errors import RetryableError, UserError
from jobs.core.registry import Reference, Registry, digest_of
from tests import registry_server
from tests.registry_server import Fault

ZEROS = "sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry_server.isolate(monkeypatch, tmp_path)


@pytest.fixture(params=["python", "docker-registry"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with registry_server.either(request.param, tmp_path) as name:
        yield name


@pytest.fixture
def server() -> Iterator[registry_server.Registry]:
    with registry_server.serve() as server:
        yield server


def client(host: str, *, push: bool = False) -> Registry:
    return Registry(Reference(host, "team/adapters/seville"), push=push)


def login(folder: Path, host: str, user: str = "ci", password: str = "secret") -> None:
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def manifest_of(*layers: tuple[str, bytes]) -> bytes:
    return json.dumps({
        "schemaVersion": 2, "mediaType": registry.OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2},
        "layers": [{"mediaType": "application/octet-stream", "digest": digest_of(content), "size": len(content),
                    "annotations": {registry.TITLE: path}} for path, content in layers]}).encode()


# --- what any registry does -------------------------------------------------------------------------------------------


def test_what_is_pushed_is_what_is_pulled(host: str, tmp_path: Path) -> None:
    weights = bytes(range(256)) * 20_000  # 5 MB: more than one read
    file = tmp_path / "weights"
    file.write_bytes(weights)
    content = manifest_of(("weights", weights), ("empty", b""))
    ours = client(host, push=True)
    assert [ours.push_blob(file, digest_of(weights), len(weights)), ours.push_blob(b"{}", digest_of(b"{}"), 2),
            ours.push_blob(b"", digest_of(b""), 0)] == [True] * 3
    assert ours.push_manifest(content, "v1") == digest_of(content)
    theirs = client(host)
    found = theirs.manifest("v1")
    assert (found.content, found.digest) == (content, digest_of(content)) == (
        theirs.manifest(found.digest).content, found.digest)
    assert [(layer.path, layer.size) for layer in found.layers()] == [("weights", len(weights)), ("empty", 0)]
    assert theirs.blob(digest_of(weights), len(weights)) == weights
    assert not ours.push_blob(file, digest_of(weights), len(weights)), "it is there, and is not uploaded again"


def test_content_that_is_not_what_its_digest_says_is_not_taken(host: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"changed since it was listed")
    with pytest.raises(UserError, match=r"team/adapters/seville: model\.safetensors: .*400 DIGEST_INVALID"):
        client(host, push=True).push_blob(file, ZEROS, 27)
    assert not client(host).has_blob(ZEROS)


def test_what_is_not_there_is_named(host: str) -> None:
    ours = client(host, push=True)
    ours.push_blob(b"{}", digest_of(b"{}"), 2)
    with pytest.raises(UserError, match=r"seville:v9: not found \(404\)"):
        ours.manifest("v9")
    with pytest.raises(UserError, match=rf"seville@{ZEROS}: not found \(404\)"):
        ours.manifest(ZEROS)
    with pytest.raises(UserError, match=rf"seville@{ZEROS}: the registry has no such blob"):
        ours.blob(ZEROS, 10)
    with pytest.raises(UserError, match=r"seville:v1: .*(400|404) MANIFEST_BLOB_UNKNOWN"):
        ours.push_manifest(manifest_of(("weights", b"never pushed")), "v1")
    assert not ours.has_manifest("v1")


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basic", [False, True])
def test_credentials_come_from_the_docker_config(server: registry_server.Registry, tmp_path: Path, basic: bool) -> None:
    server.push("team/adapters/seville", {"a": b"1"}, "v1")
    server.users, server.basic = {"ci": "secret"}, basic
    with pytest.raises(UserError, match=r"not allowed.*config\.json has no credentials for 127\.0\.0\.1"):
        client(server.host).manifest("v1")
    login(tmp_path, server.host, password="old")
    with pytest.raises(UserError, match=r"not allowed.*the credentials of ci for .* are wrong or expired") as error:
        client(server.host).manifest("v1")
    assert "old" not in str(error.value) and "\n" not in str(error.value)
    login(tmp_path, server.host)
    assert client(server.host).manifest("v1").layers()


def test_a_token_is_requested_for_this_repository_and_for_no_more_than_needed(server: registry_server.Registry,
                                                                               tmp_path: Path) -> None:
    server.push("team/adapters/seville", {"a": b"1"}, "v1")
    server.users = {"ci": "secret"}
    login(tmp_path, server.host)
    client(server.host).manifest("v1")
    client(server.host, push=True).push_blob(b"x", digest_of(b"x"), 1)
    assert [seen.path for seen in server.requests("GET", "/token")] == [
        "/token?scope=repository%3Ateam%2Fadapters%2Fseville%3Apull&service=registry",
        "/token?scope=repository%3Ateam%2Fadapters%2Fseville%3Apull%2Cpush&service=registry"]


def test_an_expired_token_is_requested_again_in_the_middle_of_an_upload(server: registry_server.Registry,
                                                                       tmp_path: Path) -> None:
    server.users = {"ci": "secret"}
    login(tmp_path, server.host)
    file = tmp_path / "weights"
    file.write_bytes(b"w" * 100_000)
    server.faults.append(Fault("uploads", method="PUT", expire=True))
    assert client(server.host, push=True).push_blob(file, digest_of(b"w" * 100_000), 100_000)
    assert server.blobs[digest_of(b"w" * 100_000)] == b"w" * 100_000
    assert len(server.requests("GET", "/token")) == 2


def test_a_user_who_may_only_pull_is_named(server: registry_server.Registry, tmp_path: Path) -> None:
    server.users, server.readers = {"ci": "secret"}, {"ci"}
    login(tmp_path, server.host)
    with pytest.raises(UserError, match=r"not allowed \(403 DENIED: as the registry puts it\): ci may not push to it"):
        client(server.host, push=True).push_blob(b"x", digest_of(b"x"), 1)


def test_an_identity_token_is_exchanged(server: registry_server.Registry, tmp_path: Path) -> None:
    server.push("team/adapters/seville", {"a": b"1"}, "v1")
    server.users = {"opaque": "-"}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {server.host: {
        "auth": base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode(), "identitytoken": "opaque"}}}))
    assert client(server.host).manifest("v1").layers()


def test_the_password_is_not_sent_to_a_token_service_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Registry(Reference("registry.example.com", "a"))
    with pytest.raises(UserError, match="no password is sent there"):
        ours._token({"realm": "http://tokens.example.com"}, None, "it")


@pytest.mark.parametrize(("key", "name"), [
    ("registry.example.com", "ci"), ("https://registry.example.com", "ci"), ("https://registry.example.com/v2/", "ci"),
    ("registry.example.com/team", "ci"), ("registry.example.com/team/adapters", "ci"),
    ("registry.example.com/te", None), ("example.com", None)])
def test_the_most_specific_entry_applies(tmp_path: Path, key: str, name: str | None) -> None:
    login(tmp_path, key)
    found = registry.credentials(Reference("registry.example.com", "team/adapters"))
    assert (found.name if found else None) == name
    assert "secret" not in repr(found)


def test_docker_hub_has_names_of_its_own(tmp_path: Path) -> None:
    login(tmp_path, "https://index.docker.io/v1/")
    where = Reference("docker.io", "library/model")
    assert registry.credentials(where) and Registry(where).blob_url(ZEROS) == (
        f"https://registry-1.docker.io/v2/library/model/blobs/{ZEROS}")


@pytest.mark.parametrize("content", ["", "[]", '{"auths": [1]}', '{"auths": {"h": {"auth": "%%"}}}',
                                     '{"auths": {"h": 1}}'])
def test_a_damaged_file_of_credentials_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: the registries' credentials cannot be read"):
        registry.credentials(Reference("h", "a"))


def test_plain_http_is_for_this_machine_and_for_hosts_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    url = lambda host: Registry(Reference(host, "a")).blob_url(ZEROS).partition("/v2")[0]  # noqa: E731
    assert url("localhost:5000") == "http://localhost:5000" and url("127.0.0.1") == "http://127.0.0.1"
    assert url("registry.svc:5000") == "https://registry.svc:5000"
    monkeypatch.setenv("REGISTRY_PLAIN_HTTP", "other:1, registry.svc:5000")
    assert url("registry.svc:5000") == "http://registry.svc:5000" and url("registry.svc") == "https://registry.svc"


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_busy_registry_gets_the_pause_that_it_requests(server: registry_server.Registry,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("jobs.core.retries.time.sleep", pauses.append)
    server.push("team/adapters/seville", {"a": b"1"}, "v1")
    server.faults += [Fault("manifests", status=429, retry_after="7"), Fault("manifests", status=503)]
    assert client(server.host).manifest("v1").layers()
    assert pauses == [7, 0.02]
    server.faults.append(Fault("manifests", times=9, status=429, code="TOOMANYREQUESTS"))
    with pytest.raises(RetryableError, match="gave up after 3 attempts in a row.*429 TOOMANYREQUESTS"):
        client(server.host).manifest("v1")


def test_an_upload_that_breaks_off_begins_again(server: registry_server.Registry, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    file = tmp_path / "weights"
    file.write_bytes(content)
    server.faults += [Fault("uploads", method="PUT", status=502),
                      Fault("uploads", method="PUT", drop_upload_after=100_000)]
    assert client(server.host, push=True).push_blob(file, digest_of(content), len(content))
    assert server.blobs[digest_of(content)] == content


def test_no_registry_is_a_reason_to_try_again_later() -> None:
    with pytest.raises(RetryableError, match=r"oci://127\.0\.0\.1:1/team/adapters/seville:v1: gave up") as error:
        client("127.0.0.1:1").manifest("v1")
    assert "\n" not in str(error.value)


def test_a_manifest_is_verified_against_its_digest(server: registry_server.Registry) -> None:
    digest = server.push("team/adapters/seville", {"a": b"1"}, "v1")
    server.faults.append(Fault("manifests", wrong_bytes=True))
    with pytest.raises(UserError, match="the registry answers with another manifest"):
        client(server.host).manifest(digest)


def test_a_small_blob_is_verified_and_limited(server: registry_server.Registry) -> None:
    digest = server.blob(b"content")
    server.faults += [Fault("blobs", wrong_bytes=True), Fault("blobs", cut_after=3)]
    with pytest.raises(UserError, match="answers with other content"):
        client(server.host).blob(digest, 10)
    with pytest.raises(RetryableError, match="broke off"):
        client(server.host).blob(digest, 10)
    with pytest.raises(UserError, match="has more than 3 bytes"):
        client(server.host).blob(digest, 3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"mediaType": registry.INDEXES[0], "manifests": []}, "is an index of several manifests"),
    ({"layers": []}, "lists no files"),
    ({"layers": "none"}, "cannot be used"),
    ({"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": ZEROS, "size": 1}]},
     "is an archive.*oras push"),
    ({"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": ZEROS, "size": 1}]},
     "not a file.*oras push"),
    ({"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": ZEROS, "size": 1,
                  "annotations": {registry.TITLE: "folder"}}]}, "is an archive.*oras push"),  # oras-py
    ({"layers": [{"mediaType": "x", "digest": ZEROS, "size": 1, "annotations": {
        registry.TITLE: "folder", "io.deis.oras.content.unpack": "true"}}]}, "is an archive.*oras push"),
    ({"layers": [{"mediaType": "application/vnd.cncf.model.weight.v1.tar", "digest": ZEROS, "size": 1, "annotations": {
        registry.FILE_PATH: "model.safetensors"}}]}, "is an archive"),
    ({"layers": [{"mediaType": "x", "digest": "sha512:00", "size": 1, "annotations": {registry.TITLE: "a"}}]},
     "has the size 1 and the digest 'sha512:00'"),
    ({"layers": [{"mediaType": "x", "digest": ZEROS, "size": -1, "annotations": {registry.TITLE: "a"}}]}, "size -1"),
    ({"layers": [{"mediaType": "x", "digest": ZEROS, "size": 1, "annotations": {registry.TITLE: "a"}}] * 2},
     "two layers are the file 'a'"),
])
def test_a_manifest_whose_layers_are_not_files_is_refused(server: registry_server.Registry, changes: dict[str, object],
                                                          message: str) -> None:
    server.push("team/adapters/seville", {"a": b"1"}, "v1", **changes)
    with pytest.raises(UserError, match=rf"seville:v1: .*{message}"):
        client(server.host).manifest("v1").layers()


@pytest.mark.parametrize("text", [
    "oci://registry.example.com/Team/model:v1", "oci://registry.example.com", "oci://registry.example.com/a@sha256:00",
    "oci://user:password@registry.example.com/a:v1", "registry.example.com/a:v1", "oci://registry.example.com/a b:v1",
    "oci://registry.example.com/a/../b:v1", "oci://registry.example.com/a:v1?x"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be oci://REGISTRY/NAME:TAG"):
        Reference.parse(text)
