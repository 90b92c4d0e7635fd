"""The registry client, against Debian's docker-registry and against a server with tokens and faults."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest
import requests
import urllib3

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
    monkeypatch.setenv("REGISTRY_PLAIN_HTTP", "other:1,registry.svc:5000 third")
    assert url("registry.svc:5000") == "http://registry.svc:5000" and url("registry.svc") == "https://registry.svc"


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_busy_registry_gets_the_pause_that_it_requests(server: registry_server.Registry,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("jobs.core.retries.time", SimpleNamespace(sleep=pauses.append))
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


@pytest.mark.parametrize(("text", "reference"), [
    ("oci://registry.example.com/a", Reference("registry.example.com", "a")),
    ("oci://localhost:5000/team/a_b/c-d.e:V1.2-x", Reference("localhost:5000", "team/a_b/c-d.e", "V1.2-x")),
    (f"oci://[::1]:5000/a@{ZEROS}", Reference("[::1]:5000", "a", None, ZEROS)),
    (f"oci://r/a:v1@{ZEROS}", Reference("r", "a", "v1", ZEROS))])
def test_a_reference_is_shown_as_it_is_written(text: str, reference: Reference) -> None:
    assert Reference.parse(text) == reference
    assert str(reference) == text


# --- what a manifest may list -----------------------------------------------------------------------------------------


def layers_of(*layers: dict[str, Any], **changes: Any) -> list[registry.Layer]:
    content = json.dumps({"layers": [{"mediaType": "x", "digest": ZEROS, "size": 1} | layer for layer in layers]}
                         | changes).encode()
    return registry.Manifest(Reference("r", "a", "v1"), content).layers()


@pytest.mark.parametrize("layer", [
    {"annotations": {registry.TITLE: "w"}}, {"annotations": {registry.FILE_PATH: "w", registry.TITLE: "other"}},
    {"annotations": {registry.TITLE: "w", registry.UNPACK: "false"}}, {"annotations": {registry.TITLE: "w"}, "size": 1},
    {"annotations": {registry.TITLE: "w"}, "mediaType": "application/vnd.oci.image.layer.v1.tar"}])
def test_a_layer_with_a_name_is_a_file(layer: dict[str, Any]) -> None:
    assert layers_of(layer) == [registry.Layer("w", 1, "0" * 64)]
    assert layers_of(layer | {"size": 0})[0].size == 0


NAMED = {"annotations": {registry.TITLE: "w"}}
NO_FILE = f"the layer {ZEROS} (x) is not a file. Each file must be a layer with the annotation {registry.TITLE}, "
NO_LAYER = "the layer of 'w' has the size "


@pytest.mark.parametrize(("layer", "changes", "message"), [
    ({}, {}, f"the manifest cannot be used: {NO_FILE}"), ({"annotations": None}, {}, NO_FILE),
    ({"annotations": {registry.TITLE: 5}}, {}, NO_FILE),
    (NAMED | {"size": True}, {}, f"{NO_LAYER}True and the digest '{ZEROS}'"),
    (NAMED | {"size": "1"}, {}, f"{NO_LAYER}'1'"), (NAMED | {"size": 1.0}, {}, f"{NO_LAYER}1.0"),
    (NAMED | {"size": -1}, {}, f"{NO_LAYER}-1"), (NAMED | {"digest": ZEROS[:-1]}, {}, NO_LAYER),
    (NAMED | {"digest": 5}, {}, "the manifest cannot be used: "),
    (NAMED | {"mediaType": "application/x.tar+zstd"}, {}, "is an archive. Each file"),
    (NAMED, {"manifests": []}, "is an index of several manifests"),
    (NAMED, {"mediaType": registry.INDEXES[1]}, "is an index of several manifests")])
def test_a_layer_that_is_no_file_is_named(layer: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        layers_of(layer, **changes)
    assert str(raised.value).startswith("oci://r/a:v1: ") and message in str(raised.value)


# --- requests and answers, one by one ---------------------------------------------------------------------------------


@dataclass
class Seen:
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    options: Mapping[str, Any]

    @property
    def user(self) -> str | None:
        return self.headers.get("Authorization")


@dataclass
class Script:
    """Answers in their order, in place of any server, and what was requested."""

    answers: list[Any] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    def then(self, status: int | Exception, body: bytes | dict[str, Any] = b"", /, **headers: str) -> Script:
        self.answers.append((status, body if isinstance(body, bytes) else json.dumps(body).encode(),
                             {name.replace("_", "-"): value for name, value in headers.items()}))
        return self

    def request(self, session: requests.Session, method: str, url: str, *, data: Any, headers: Any, auth: Any,
                **options: Any) -> requests.Response:
        sent = session.prepare_request(requests.Request(method, url, headers=headers))
        auth(sent)
        self.seen.append(Seen(method, url, sent.headers, data.read() if hasattr(data, "read") else data, options))
        status, body, answered = self.answers.pop(0)
        if isinstance(status, Exception):
            raise status
        answer = requests.Response()
        answer.status_code, answer.url = status, url
        answer.headers.update(answered)
        answer.raw = urllib3.HTTPResponse(io.BytesIO(body), preload_content=False)
        return answer


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(requests.Session, "request", lambda session, *args, **options: script.request(
        session, *args, **options))
    return script


HOST = "registry.example.com"
API = f"https://{HOST}/v2/team/adapters/seville/"
BEARER = 'Bearer realm="https://tokens.example.com/token?a=b",service="reg istry",scope="ignored"'
CI = "Basic " + base64.b64encode(b"ci:secret").decode()


def test_a_token_is_requested_with_the_password_and_everything_else_with_the_token(script: Script, tmp_path: Path
                                                                                   ) -> None:
    login(tmp_path, HOST)
    script.then(401, WWW_Authenticate=BEARER).then(200, {"token": "t"}).then(200, b"{}")
    assert client(HOST).manifest("v1").content == b"{}"
    first, token, second = script.seen
    assert (first.method, first.url, first.user) == ("GET", f"{API}manifests/v1", None)
    assert set(first.headers["Accept"].split(", ")) == {*registry.MANIFESTS, *registry.INDEXES}
    assert (first.headers["User-Agent"], first.headers["Accept-Encoding"]) == ("lora-gitops", "identity")
    assert first.options == {"stream": True, "timeout": registry.SILENCE_S, "allow_redirects": True}
    assert token.url == ("https://tokens.example.com/token?a=b&scope=repository%3Ateam%2Fadapters%2Fseville%3Apull&"
                         "service=reg+istry")
    assert (token.method, token.user, second.user, second.url) == ("GET", CI, "Bearer t", first.url)
    assert second.headers["Accept"] == first.headers["Accept"]
    script.then(401, WWW_Authenticate=BEARER).then(200, {"token": "t"}).then(requests.exceptions.SSLError("expired"))
    with pytest.raises(UserError, match=f"^{SEVILLE}:v1: the TLS certificate is not trusted"):
        Registry(Reference(HOST, "team/adapters/seville")).manifest("v1")
    assert script.seen[-2].url == token.url, "to pull, unless it is for a push"


@pytest.mark.parametrize(("challenge", "query"), [
    ('bearer realm="https://t/x"', "?scope=repository%3Ateam%2Fadapters%2Fseville%3Apull"),
    ('Bearer service="s",realm="https://t/x"', "?scope=repository%3Ateam%2Fadapters%2Fseville%3Apull&service=s"),
    ('Basic realm="r", Bearer realm="https://t/x"', "?scope=repository%3Ateam%2Fadapters%2Fseville%3Apull")])
def test_a_token_may_be_had_without_credentials(script: Script, challenge: str, query: str) -> None:
    script.then(401, WWW_Authenticate=challenge).then(200, {"access_token": "t"}).then(200, b"{}")
    client(HOST).manifest("v1")
    assert [(each.url, each.user) for each in script.seen[1:]] == [
        (f"https://t/x{query}", None), (f"{API}manifests/v1", "Bearer t")]


def test_an_identity_token_is_sent_in_the_body_and_never_in_a_url(script: Script, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {HOST: {"identitytoken": "id"}}}))
    script.then(401, WWW_Authenticate='Bearer realm="https://t/x",service="s"').then(200, {"token": "t"}).then(200)
    client(HOST).has_manifest("v1")
    token = script.seen[1]
    assert (token.method, token.url, token.user) == ("POST", "https://t/x", None)
    assert token.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert parse_qs((token.body or b"").decode()) == {
        "scope": ["repository:team/adapters/seville:pull"], "service": ["s"], "grant_type": ["refresh_token"],
        "client_id": ["lora-gitops"], "refresh_token": ["id"]}


def test_a_password_is_sent_only_to_the_registry_that_asks_for_it(script: Script, tmp_path: Path) -> None:
    login(tmp_path, HOST)
    script.then(401, WWW_Authenticate='Basic realm="r"').then(404).then(202, Location="https://elsewhere/up").then(201)
    assert client(HOST, push=True).push_blob(b"w", digest_of(b"w"), 1)
    assert [(each.method, each.user) for each in script.seen] == [
        ("HEAD", None), ("HEAD", CI), ("POST", CI), ("PUT", None)]


@pytest.mark.parametrize(("location", "place"), [
    ("https://registry.example.com/up/1", "https://registry.example.com/up/1?digest="),
    ("/v2/up/1?state=x", "https://registry.example.com/v2/up/1?state=x&digest="),
    ("1", f"{API}blobs/uploads/1?digest="), (None, f"{API}blobs/uploads/?digest=")])
def test_a_blob_is_uploaded_where_the_registry_wants_it(script: Script, tmp_path: Path, location: str | None,
                                                        place: str) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"www")
    (tmp_path / "empty").touch()
    for content, size in ((file, 3), (b"www", 3), (b"", 0), (tmp_path / "empty", 0)):
        digest = digest_of(b"w" * size)
        script.then(404).then(202, **({"Location": location} if location else {})).then(201)
        assert client(HOST, push=True).push_blob(content, digest, size)
        head, post, put = script.seen[-3:]
        assert (head.method, head.url) == ("HEAD", f"{API}blobs/{digest}")
        assert (post.method, post.url) == ("POST", f"{API}blobs/uploads/")
        assert (put.method, put.url, put.body) == ("PUT", place + digest, b"w" * size)
        assert put.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(("answer", "message"), [
    ({}, None), ({"Docker_Content_Digest": digest_of(b"{}")}, None),
    ({"Docker_Content_Digest": ZEROS}, f"seville:v1: the registry changed the manifest: it was {digest_of(b'{}')} and "
                                       f"is {ZEROS}")])
def test_a_manifest_that_the_registry_changes_is_found(script: Script, answer: dict[str, str], message: str | None
                                                       ) -> None:
    script.then(201, **answer)
    if message is None:
        assert client(HOST, push=True).push_manifest(b"{}", "v1", "application/x") == digest_of(b"{}")
    else:
        with pytest.raises(UserError) as raised:
            client(HOST, push=True).push_manifest(b"{}", "v1")
        assert str(raised.value).endswith(message)
    [seen] = script.seen
    assert (seen.method, seen.url, seen.body) == ("PUT", f"{API}manifests/v1", b"{}")
    assert seen.headers["Content-Type"] == ("application/x" if message is None else registry.OCI_MANIFEST)


def test_a_blob_is_read_in_ranges_with_the_header_that_the_registry_takes(script: Script, tmp_path: Path) -> None:
    login(tmp_path, HOST)
    ours = client(HOST)
    script.then(401, WWW_Authenticate=BEARER).then(200, {"token": "one"}).then(200)
    assert ours.authorization(ZEROS) == {"Authorization": "Bearer one"}
    assert script.seen[0].url == ours.blob_url(ZEROS) == f"{API}blobs/{ZEROS}"
    assert ours.authorization(ZEROS) == {"Authorization": "Bearer one"}, "nothing is asked again"
    assert ours.authorization(ZEROS, rejected={"Authorization": "Bearer older"}) == {"Authorization": "Bearer one"}
    assert len(script.seen) == 3
    script.then(401, WWW_Authenticate=BEARER).then(200, {"token": "two"}).then(200)
    assert ours.authorization(ZEROS, rejected={"Authorization": "Bearer one"}) == {"Authorization": "Bearer two"}
    assert script.seen[3].user is None


@pytest.mark.parametrize("status", [401, 403])
def test_what_the_registry_did_not_admit_is_asked_again(script: Script, tmp_path: Path, status: int) -> None:
    login(tmp_path, HOST)
    ours = client(HOST)
    script.then(401, WWW_Authenticate=BEARER).then(200, {"token": "one"}).then(status)
    with pytest.raises(UserError, match="not allowed"):
        ours.authorization(ZEROS)
    script.then(200)
    assert ours.authorization(ZEROS) == {"Authorization": "Bearer one"}
    assert len(script.seen) == 4


def test_a_registry_that_is_open_to_all_is_asked_once(script: Script) -> None:
    ours = client(HOST)
    script.then(200)
    assert ours.authorization(ZEROS) == ours.authorization(ZEROS) == {}
    script.then(404)
    assert ours.authorization(ZEROS, rejected={}) == {}
    assert len(script.seen) == 2


ERRORS = {"errors": [{"code": "X", "message": "no\n  way"}]}


@pytest.mark.parametrize(("user", "push", "answer", "message"), [
    (None, False, (401, b""), "not allowed (401): {file} has no credentials for registry.example.com. docs/pub"),
    ("ci", False, (401, b""), "not allowed (401): the credentials of ci for registry.example.com in {file} are wrong"),
    (None, False, (403, ERRORS), "not allowed (403 X: no way): it needs credentials. docs/publication.md, Credentials"),
    ("ci", False, (403, b""), "not allowed (403): ci may not pull from it. docs/publication.md"),
    ("ci", True, (403, b""), "not allowed (403): ci may not push to it. "),
    (None, False, (400, ERRORS), "the registry rejects the request (400 X: no way)"),
    (None, False, (400, {"errors": [{"code": "X"}]}), "the registry rejects the request (400 X)"),
    (None, False, (400, {"errors": [{"code": "X", "message": "m" * 400}]}), f"(400 X: {'m' * 297})"),
    (None, False, (400, {"errors": []}), "the registry rejects the request (400)"),
    (None, False, (400, {"errors": [{}]}), "the registry rejects the request (400)"),
    (None, False, (400, b"<html>"), "the registry rejects the request (400)"),
    (None, False, (400, b" " * (registry.ANSWER_BYTES + 1)), "the registry rejects the request (400)"),
    (None, False, (204, b""), "the registry rejects the request (204)")])
def test_an_error_of_the_registry_is_one_line_that_says_what_to_do(
        script: Script, tmp_path: Path, user: str | None, push: bool, answer: tuple[int, Any], message: str) -> None:
    if user:
        login(tmp_path, HOST, user)
    script.then(*answer)
    with pytest.raises(UserError) as raised:
        client(HOST, push=push).manifest("v1")
    assert str(raised.value).startswith("oci://registry.example.com/team/adapters/seville:v1: ")
    assert message.format(file=tmp_path / "config.json") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("answer", "error", "message"), [
    ((403, b""), UserError, "not allowed: t gives no token (403): {file} has no credentials for registry.example.com."),
    ((400, b""), UserError, "not allowed: t gives no token (400)"),
    ((401, b""), UserError, "not allowed: t gives no token (401)"),
    ((404, b""), UserError, "not found (404). Is there a typo in the name?"),
    ((200, b"{}"), RetryableError, "t answers without a token"), ((200, b"[]"), RetryableError, "t answers without"),
    ((200, b"x"), RetryableError, "t answers without a token")])
def test_a_service_that_gives_no_token_is_named(script: Script, tmp_path: Path, answer: tuple[int, bytes],
                                                error: type[Exception], message: str) -> None:
    script.then(401, WWW_Authenticate='Bearer realm="https://t/x"').then(*answer)
    with pytest.raises(error) as raised:
        client(HOST).manifest("v1")
    assert f"seville:v1: {message.format(file=tmp_path / 'config.json')}" in str(raised.value)


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(("answer", "message"), [
    ((requests.exceptions.SSLError("expired"),), "the TLS certificate is not trusted"),
    ((200, b" " * (registry.ANSWER_BYTES + 1)), "has more than 1048576 bytes")])
def test_a_fault_of_the_service_of_tokens_names_what_was_wanted(script: Script, tmp_path: Path, answer: tuple[Any, ...],
                                                                message: str, identity: bool) -> None:
    if identity:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {HOST: {"identitytoken": "id"}}}))
    script.then(401, WWW_Authenticate='Bearer realm="https://t/x"').then(*answer)
    with pytest.raises(UserError, match=f"^oci://{HOST}/team/adapters/seville:v1: {message}"):
        client(HOST).manifest("v1")


def test_a_registry_that_names_no_service_of_tokens_is_an_error(script: Script) -> None:
    script.then(401, WWW_Authenticate='Bearer service="s"')
    with pytest.raises(UserError, match="seville:v1: the registry names '' for tokens, which is not https"):
        client(HOST).manifest("v1")


@pytest.mark.parametrize(("status", "there"), [(200, True), (404, False)])
def test_a_manifest_of_any_kind_is_there(script: Script, status: int, there: bool) -> None:
    script.then(status)
    assert client(HOST).has_manifest("v1") is there
    [seen] = script.seen
    assert (seen.method, seen.url) == ("HEAD", f"{API}manifests/v1")
    assert set(seen.headers["Accept"].split(", ")) == {*registry.MANIFESTS, *registry.INDEXES}


@pytest.mark.parametrize(("host", "realm", "sent"), [
    (HOST, "http://t/x", False), (HOST, "", False), (HOST, "ftp://t/x", False), (HOST, "https://t/x", True),
    ("localhost:5000", "http://t/x", True), ("localhost:5000", "ftp://t/x", False)])
def test_a_token_is_requested_over_tls_unless_the_registry_has_none_itself(script: Script, host: str, realm: str,
                                                                           sent: bool) -> None:
    script.then(401, WWW_Authenticate=f'Bearer realm="{realm}"').then(200, {"token": "t"}).then(200, b"{}")
    if sent:
        assert client(host).manifest("v1")
    else:
        with pytest.raises(UserError, match="which is not https: no password is sent there"):
            client(host).manifest("v1")
        assert len(script.seen) == 1


@pytest.mark.parametrize("challenge", [None, "Digest realm=x", 'Basic realm="r"'])
def test_a_registry_that_asks_for_what_there_is_not_is_an_error(script: Script, challenge: str | None) -> None:
    script.then(401, **({"WWW_Authenticate": challenge} if challenge else {}))
    with pytest.raises(UserError, match=r"seville:v1: not allowed \(401\): .* has no credentials for"):
        client(HOST).manifest("v1")


URL = "https://user:password@registry.example.com/v2/a?secret"


@pytest.mark.parametrize(("fault", "error", "message"), [
    (requests.exceptions.SSLError(f"bad {URL}"), UserError, "is not trusted (SSLError: bad …). Set SSL_CERT_FILE to"),
    (requests.exceptions.InvalidURL(URL), UserError, "cannot be requested: InvalidURL: …"),
    (requests.exceptions.InvalidSchema(URL), UserError, "cannot be requested: InvalidSchema: …"),
    (requests.exceptions.TooManyRedirects("30"), UserError, "cannot be requested: TooManyRedirects: 30"),
    (requests.exceptions.ConnectionError(urllib3.exceptions.MaxRetryError(
        urllib3.HTTPConnectionPool("h"), "/v2/secret", OSError("refused"))), RetryableError,
     "ConnectionError: refused"),
    (requests.exceptions.ReadTimeout("<object at 0x7>: read timed out " + "x" * 300), RetryableError,
     "The last error: ReadTimeout: … read timed out " + "x" * 183),
    (requests.exceptions.ConnectionError(), RetryableError, "The last error: ConnectionError: "),
    (requests.exceptions.ChunkedEncodingError(OSError("gone")), RetryableError, "ChunkedEncodingError: gone")])
def test_a_connection_that_fails_is_named_without_the_url_that_may_hold_secrets(
        script: Script, fault: Exception, error: type[Exception], message: str) -> None:
    for _ in range(3):
        script.then(fault)
    with pytest.raises(error) as raised:
        client(HOST).manifest("v1")
    assert message in str(raised.value) and str(raised.value).startswith("oci://registry.example.com/team/")
    assert "secret" not in str(raised.value) and "\n" not in str(raised.value) and "x" * 184 not in str(raised.value)


SEVILLE = f"oci://{HOST}/team/adapters/seville"


@pytest.mark.parametrize("fault", [requests.exceptions.SSLError("expired"), 400, requests.exceptions.ConnectionError()])
@pytest.mark.parametrize(("work", "before", "subject"), [
    (lambda ours, file: ours.manifest(ZEROS), [], f"{SEVILLE}@{ZEROS}"),
    (lambda ours, file: ours.blob(ZEROS, 9), [], f"{SEVILLE}@{ZEROS}"),
    (lambda ours, file: ours.has_blob(ZEROS), [], SEVILLE),
    (lambda ours, file: ours.has_manifest("v1"), [], SEVILLE),
    (lambda ours, file: ours.push_blob(b"w", ZEROS, 1), [404], f"{SEVILLE}: {ZEROS}"),
    (lambda ours, file: ours.push_blob(b"w", ZEROS, 1), [404, 202], f"{SEVILLE}: {ZEROS}"),
    (lambda ours, file: ours.push_blob(file, ZEROS, 1), [404, 202], f"{SEVILLE}: weights"),
    (lambda ours, file: ours.push_manifest(b"{}", "v1"), [], f"{SEVILLE}:v1")])
def test_every_error_names_what_was_wanted(script: Script, tmp_path: Path, work: Callable[[Registry, Path], object],
                                           before: list[int], subject: str, fault: int | Exception) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    for answer in [*before, fault, fault, fault]:
        script.then(answer)
    with pytest.raises((UserError, RetryableError)) as raised:
        work(client(HOST, push=True), tmp_path / "weights")
    assert str(raised.value).startswith(f"{subject}: ")


def test_a_registry_in_trouble_is_named_with_its_host_and_reason(script: Script) -> None:
    for status in registry.RETRIED[:3]:
        script.then(status, ERRORS)
    with pytest.raises(RetryableError, match=rf"The last error: {HOST} answers 429 X: no way$"):
        client(HOST).manifest("v1")


def test_no_more_is_read_than_may_be_kept(script: Script) -> None:
    """A server could send without end."""
    sizes: list[int] = []

    def read(size: int, *, decode_content: bool) -> bytes:
        sizes.append(size)
        return b""

    answer = SimpleNamespace(raw=SimpleNamespace(read=read), close=lambda: None)
    assert registry._read(answer, 10, "it") == b""
    assert sizes == [11], "one more byte shows that there are too many"
    script.then(200, b" " * (registry.MANIFEST_BYTES + 1))
    with pytest.raises(UserError, match=f"^{SEVILLE}:v1: has more than 4194304 bytes$"):
        client(HOST).manifest("v1")
    script.then(201, b" " * (registry.ANSWER_BYTES + 1))
    with pytest.raises(UserError, match=f"^{SEVILLE}:v1: has more than 1048576 bytes$"):
        client(HOST, push=True).push_manifest(b"{}", "v1")


@pytest.mark.parametrize("size", [10, 11])
def test_a_blob_is_read_up_to_its_limit(script: Script, size: int) -> None:
    script.then(200, b"w" * size)
    if size == 10:
        assert client(HOST).blob(digest_of(b"w" * 10), 10) == b"w" * 10
        assert (script.seen[0].method, script.seen[0].url) == ("GET", f"{API}blobs/{digest_of(b'w' * 10)}")
    else:
        with pytest.raises(UserError, match=r"seville@sha256:\w{64}: has more than 10 bytes$"):
            client(HOST).blob(digest_of(b"w" * size), 10)


@pytest.mark.parametrize(("authority", "verified"), [(None, True), ("", True), ("/etc/ca.pem", "/etc/ca.pem")])
def test_certificates_are_checked_by_the_authorities_of_this_machine_or_by_those_that_are_named(
        monkeypatch: pytest.MonkeyPatch, authority: str | None, verified: bool | str) -> None:
    if authority is not None:
        monkeypatch.setenv("SSL_CERT_FILE", authority)
    assert client(HOST)._client().verify == verified


# --- as whom ----------------------------------------------------------------------------------------------------------


def auth(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(("entry", "found"), [
    ({"auth": auth("ci:se:cret")}, ("ci", "se:cret", "")), ({"username": "ci", "password": "s"}, ("ci", "s", "")),
    ({"auth": auth("a:b"), "username": "ci", "password": "s"}, ("ci", "s", "")),
    ({"identitytoken": "id"}, ("", "", "id")), ({"auth": auth("ci:"), "identitytoken": "id"}, ("ci", "", "id")),
    ({"auth": auth("ci:")}, None), ({"username": "ci"}, None), ({}, None)])
def test_an_entry_has_a_password_or_a_token(tmp_path: Path, entry: dict[str, str],
                                            found: tuple[str, str, str] | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"h": entry}}))
    user = registry.credentials(Reference("h", "a"))
    assert (user and (user.name, user.password, user.identity_token)) == found


@pytest.mark.parametrize("content", ["{}", '{"auths": null}', '{"auths": {}}', '{"credsStore": "desktop"}'])
def test_a_file_may_have_no_credentials(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert registry.credentials(Reference("h", "a")) is None


def test_a_part_of_the_name_goes_before_the_registry_and_the_whole_name_before_both(tmp_path: Path) -> None:
    names = ["h/team/a", "h/team", "h"]
    for number, name in enumerate(names):
        (tmp_path / "config.json").write_text(json.dumps({"auths": {
            each: {"auth": auth(f"{each}:s")} for each in reversed(names[number:])}}))
        found = registry.credentials(Reference("h", "team/a"))
        assert found and found.name == name


@pytest.mark.parametrize(("variables", "file"), [
    ({"REGISTRY_AUTH_FILE": "/a/auth.json", "DOCKER_CONFIG": "/b"}, "/a/auth.json"),
    ({"DOCKER_CONFIG": "/b"}, "/b/config.json"), ({"DOCKER_CONFIG": ""}, "/home/me/.docker/config.json")])
def test_credentials_are_where_docker_podman_and_kubernetes_put_them(
        monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], file: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(registry.credentials_file()) == file


def test_a_file_of_credentials_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"json: the registries' credentials cannot be read: Is a directory\. docs/"):
        registry.credentials(Reference("h", "a"))
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_text("secret")
    with pytest.raises(UserError, match=r"cannot be read: it is not a docker config\.json\. docs/") as raised:
        registry.credentials(Reference("h", "a"))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("host", "url"), [
    ("docker.io", "https://registry-1.docker.io"), ("index.docker.io", "https://registry-1.docker.io"),
    ("ghcr.io", "https://ghcr.io"), ("localhost", "http://localhost"), ("[::1]:5000", "http://[::1]:5000"),
    ("[::1]", "http://[::1]"), ("127.0.0.1:80", "http://127.0.0.1:80"), ("localhost.example.com",
                                                                         "https://localhost.example.com")])
def test_a_registry_has_its_own_address(host: str, url: str) -> None:
    assert Registry(Reference(host, "a")).blob_url(ZEROS) == f"{url}/v2/a/blobs/{ZEROS}"


@pytest.mark.parametrize("name", ["index.docker.io", "docker.io", "https://index.docker.io/v1/"])
def test_docker_hubs_credentials_are_found_by_each_of_its_names(tmp_path: Path, name: str) -> None:
    login(tmp_path, name)
    for host in ("docker.io", "index.docker.io"):
        assert registry.credentials(Reference(host, "a"))
    assert registry.credentials(Reference("ghcr.io", "a")) is None


def test_docker_hubs_credentials_may_be_for_a_part_of_it(tmp_path: Path) -> None:
    login(tmp_path, "docker.io/team")
    assert registry.credentials(Reference("docker.io", "team/a"))
    assert registry.credentials(Reference("docker.io", "other/a")) is None
