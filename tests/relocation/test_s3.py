"""s3:// against moto's S3 server over HTTP: what is pinned is what arrives, and what keeps it out is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from jobs.__main__ import main
from jobs.core import artifacts, environment, pipeline, retries
from jobs.core.declarations import Loaded, Source
from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import plan, plan_environment
from jobs.relocation import connection, download, relocate, sources
from jobs.relocation.sources.file import folder_sha256
from jobs.tools import pin
from tests import build_pipeline
from tests.hub_server import nowhere
from tests.relocation.conftest import CONTENT, SHA256
from tests.s3_server import S3, serve


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with serve() as s3:
        s3.put("private/data.jsonl", CONTENT)
        yield s3


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server, named and with credentials as the environment has them, and short pauses between attempts."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    for name in ("AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
                        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    server.seen.clear()
    server.drop_after = None
    server.refused.clear()
    yield server
    server.require_known_credentials(False)


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
    with pytest.raises(UserError, match=r"s3://data/private/data.jsonl: not allowed \(403\).*AWS_ACCESS_KEY_ID"):
        download.fetch(sources.listing(here, source()), draft)


def test_what_an_earlier_run_left_is_continued(s3: S3, here: Loaded, draft: Path) -> None:
    (draft / "data.jsonl.partial").write_bytes(CONTENT[:123_456])
    download.fetch(sources.listing(here, source()), draft)
    assert (draft / "data.jsonl").read_bytes() == CONTENT
    assert [int(each.removeprefix("bytes=").partition("-")[0]) for each in s3.ranges()] == [123_456]


def test_a_connection_that_breaks_is_tried_again(s3: S3, here: Loaded, draft: Path) -> None:
    s3.drop_after = 150_000
    download.fetch(sources.listing(here, source()), draft)
    assert s3.drop_after is None
    assert len(s3.ranges()) == 1
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


def test_pin_reads_the_content_also_when_a_connection_breaks(s3: S3, here: Loaded) -> None:
    s3.drop_after = 150_000
    assert sources.find_pin(here, source(sha256=None)) == SHA256
    assert s3.drop_after is None


def test_a_large_object_comes_in_ranges_through_several_connections(s3: S3, here: Loaded, draft: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).bytes(24 << 20)
    s3.put("private/large.jsonl", content)
    s3.seen.clear()
    monkeypatch.setattr(connection, "CONNECTIONS", 4)
    download.fetch(sources.listing(here, source("private/large.jsonl", hashlib.sha256(content).hexdigest())), draft)
    assert (draft / "large.jsonl").read_bytes() == content
    requests = [line for line in s3.seen if line.startswith("GET")]
    assert len(requests) > 2
    assert len(requests) == len(set(requests)), "no range twice"


def test_expired_credentials_are_named_for_an_object_and_for_a_folder(s3: S3, here: Loaded) -> None:
    s3.refused[".*"] = 400, "ExpiredToken"
    for key in ("private/data.jsonl", "private/", "private/*.jsonl"):
        with pytest.raises(UserError, match=r"s3://data/private/.*: the credentials have expired \(ExpiredToken\)"):
            sources.listing(here, source(key))


def test_an_object_that_is_replaced_while_it_is_fetched_is_worth_another_attempt(s3: S3, here: Loaded, draft: Path
                                                                                  ) -> None:
    s3.put("private/moving.jsonl", CONTENT)
    items = sources.listing(here, source("private/moving.jsonl"))
    s3.put("private/moving.jsonl", CONTENT[::-1])
    with pytest.raises(RetryableError, match="s3://data/private/moving.jsonl: was replaced while it was fetched"):
        download.fetch(items, draft)
    with pytest.raises(UserError, match=SHA256):
        download.fetch(sources.listing(here, source("private/moving.jsonl")), draft)


# --- folders and globs of data ----------------------------------------------------------------------------------------

RECORDS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(60)]


def lines(records: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture
def folder(s3: S3) -> Iterator[dict[str, bytes]]:
    """What is below s3://data/set/."""
    content = {"a.jsonl": lines(RECORDS[:20]), "deep/b.jsonl": lines(RECORDS[20:]), "README.md": b"# About",
               "_SUCCESS": b"", ".hidden.jsonl": b"no record"}
    for name, each in content.items():
        s3.put(f"set/{name}", each)
    s3.put("set/empty/", b"")  # as consoles make folders
    s3.put("settings/c.jsonl", b"no record")
    yield content
    s3.require_known_credentials(False)
    for name in (*content, "empty/", "SHA256SUMS", "extra.jsonl"):
        s3.delete(f"set/{name}")


def overlay(folder: Path, key: str) -> LoadedPipeline:
    """An overlay's files whose data is at `key`, pinned as `pin` does."""
    folder.mkdir(exist_ok=True)
    dataset = {"source": f"s3://data/{key}"}
    loaded = pipeline.load(build_pipeline.write(folder, dataset=dataset), pinned=False)
    dataset["sha256"] = sources.find_pin(loaded, loaded.pipeline.dataset)
    return pipeline.load(build_pipeline.write(folder, dataset=dataset))


def records(loaded: LoadedPipeline, volumes: Path) -> list[str]:
    """The questions of the published dataset."""
    found = artifacts.find(plan(loaded.pipeline).dataset, volumes)
    assert found
    return sorted(json.loads(line)["prompt"] for file in found.path.glob("*.jsonl")
                  for line in file.read_text().splitlines())


def test_a_folder_has_the_pin_of_the_same_files_on_a_disk_and_all_its_records_arrive(
        folder: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in folder.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    loaded = overlay(tmp_path / "o", "set/")
    assert loaded.pipeline.dataset.sha256 == folder_sha256(tmp_path / "copy")
    relocate.run_dataset(loaded, tmp_path / "v")
    assert records(loaded, tmp_path / "v") == sorted(each["prompt"] for each in RECORDS)


@pytest.mark.parametrize(("key", "chosen"), [
    ("set/*.jsonl", RECORDS[:20]), ("set/*/b.jsonl", RECORDS[20:]), ("set/**/*.jsonl", RECORDS),
    ("se[st]/?.jsonl", RECORDS[:20]),
])
def test_a_glob_selects_objects_by_their_names(folder: dict[str, bytes], tmp_path: Path, key: str,
                                               chosen: list[dict[str, str]]) -> None:
    loaded = overlay(tmp_path / "o", key)
    relocate.run_dataset(loaded, tmp_path / "v")
    assert records(loaded, tmp_path / "v") == sorted(each["prompt"] for each in chosen)


@pytest.mark.parametrize("change", [
    lambda s3: s3.put("set/a.jsonl", lines(RECORDS[:20]).replace(b"Answer", b"Anwser")),  # of the same size
    lambda s3: s3.put("set/extra.jsonl", lines(RECORDS[:1])),
    lambda s3: s3.delete("set/deep/b.jsonl"),
    lambda s3: s3.put("set/README.md", b"# Else"),
], ids=["changed", "added", "removed", "not data"])
def test_a_folder_that_is_not_as_pinned_is_refused_and_taken_when_it_is_again(
        s3: S3, folder: dict[str, bytes], tmp_path: Path, change: Any) -> None:
    loaded = overlay(tmp_path / "o", "set/")
    change(s3)
    for _ in range(2):
        with pytest.raises(UserError, match=f"s3://data/set/: pipeline.yaml says {loaded.pipeline.dataset.sha256}, "
                                            "but the content is [0-9a-f]{64}. Nothing was published"):
            relocate.run_dataset(loaded, tmp_path / "v")
        assert not list((tmp_path / "v" / "dataset" / "dataset").glob("[!.]*"))
    s3.delete("set/extra.jsonl")
    for name, content in folder.items():
        s3.put(f"set/{name}", content)
    relocate.run_dataset(loaded, tmp_path / "v")
    assert len(records(loaded, tmp_path / "v")) == len(RECORDS)


def test_what_an_earlier_attempt_fetched_of_another_content_is_fetched_again(s3: S3, folder: dict[str, bytes],
                                                                             tmp_path: Path) -> None:
    loaded = overlay(tmp_path / "o", "set/")
    draft = plan(loaded.pipeline).dataset.path(tmp_path / "v")
    earlier = draft.with_name(f".draft-{draft.name}") / "raw" / "a.jsonl"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(folder["a.jsonl"].replace(b"Answer", b"Anwser"))
    relocate.run_dataset(loaded, tmp_path / "v")
    assert len(records(loaded, tmp_path / "v")) == len(RECORDS)


def test_a_folder_with_a_list_of_digests_is_pinned_by_it_and_needs_no_right_to_list(
        s3: S3, folder: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = sha256sums({"a.jsonl": folder["a.jsonl"]})
    s3.put("set/SHA256SUMS", sums)
    for name, value in s3.add_user_with("s3:GetObject").items():
        monkeypatch.setenv(name, value)
    loaded = overlay(tmp_path / "o", "set/")
    assert loaded.pipeline.dataset.sha256 == hashlib.sha256(sums).hexdigest()
    relocate.run_dataset(loaded, tmp_path / "v")
    assert len(records(loaded, tmp_path / "v")) == 20, "what it does not list is not taken"


@pytest.mark.parametrize("name", ["../a.jsonl", "/etc/passwd", "deep/../../a.jsonl"])
def test_a_list_of_digests_cannot_lead_out_of_its_folder(s3: S3, folder: dict[str, bytes], here: Loaded, name: str
                                                         ) -> None:
    sums = sha256sums({"a.jsonl": folder["a.jsonl"], name: b"x"})
    s3.put("set/SHA256SUMS", sums)
    with pytest.raises(UserError, match=f"s3://data/set/: '{name}' cannot be the name of a file"):
        sources.listing(here, source("set/", hashlib.sha256(sums).hexdigest()))


@pytest.mark.parametrize("key", ["set/", "set/*.jsonl"])
def test_a_bucket_that_may_not_be_listed_says_which_right_is_missing(
        s3: S3, folder: dict[str, bytes], tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.add_user_with("s3:GetObject").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"s3://data/set/.*: not allowed \(403\).*s3:ListBucket, unless it has a SHA"):
        overlay(tmp_path / "o", key)


def test_a_folder_or_glob_without_objects_is_refused(s3: S3, here: Loaded) -> None:
    with pytest.raises(UserError, match="s3://data/nothing/: the folder holds no objects"):
        sources.listing(here, source("nothing/"))
    with pytest.raises(UserError, match=r"s3://data/set/\?\.csv: no object matches"):
        sources.listing(here, source("set/?.csv"))


def test_a_listing_of_thousands_of_objects_is_whole(s3: S3, here: Loaded) -> None:
    from moto.s3.models import s3_backends

    backend = next(iter(s3_backends.values()))["aws"]
    for n in range(2500):
        backend.put_object("data", f"many/{n}.jsonl", b"x")
    assert len(sources.listing(here, source("many/"))) == 2500
    assert sum("list-type=2" in line for line in s3.seen) == 3


@pytest.mark.parametrize("key", ["../b.jsonl", "a//b.jsonl", "./b.jsonl", f"{'n' * 241}.jsonl"])
def test_an_object_in_a_folder_whose_name_no_file_can_have_is_refused(s3: S3, here: Loaded, key: str) -> None:
    from moto.s3.models import s3_backends

    backend = next(iter(s3_backends.values()))["aws"]
    backend.put_object("data", f"odd/{key}", b"x")  # not over HTTP: clients would shorten it
    try:
        with pytest.raises(UserError, match="s3://data/odd/: '.*' cannot be the name of a file"):
            sources.listing(here, source("odd/"))
    finally:
        backend.delete_object("data", f"odd/{key}")


def test_an_object_that_is_also_a_folder_is_refused(s3: S3, here: Loaded) -> None:
    s3.put("both/a", b"x")
    s3.put("both/a/b.jsonl", b"x")
    with pytest.raises(UserError, match="s3://data/both/: 'a' is a file and also the folder of other files"):
        sources.listing(here, source("both/"))


# --- models -----------------------------------------------------------------------------------------------------------

MODEL = {
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}).encode(),
    "tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}", "README.md": b"# Tiny",
    "model.safetensors": save({"weight": np.ones(50_000)}), "pytorch_model.bin": b"pickle",
}


def sha256sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


@pytest.fixture
def model(s3: S3) -> Iterator[S3]:
    """s3://data/models/tiny with a SHA256SUMS."""
    for name, content in (MODEL | {"SHA256SUMS": sha256sums(MODEL), "unlisted.safetensors": b"x"}).items():
        s3.put(f"models/tiny/{name}", content)
    yield s3
    s3.require_known_credentials(False)
    s3.delete("models/tiny/SHA256SUMS")


def environment_file(folder: Path, key: str = "models/tiny") -> Path:
    """An environment whose models are at `key`, not pinned yet."""
    build_pipeline.write(folder, base_model={"source": f"s3://data/{key}"})
    return folder / "environment.yaml"


def pinned(file: Path) -> Path:
    """The file with its pins, found as `pin` finds them."""
    loaded = environment.load(file, pinned=False)
    text = file.read_text()
    found = pin.pins(loaded, "base_model", loaded.environment.base_model, update=False)
    for key, value in found.items():
        text = pin.set_value(text, ["base_model", key], value)
    file.write_text(text)
    return file


@pytest.mark.parametrize("key", ["models/tiny", "models/tiny/"])
def test_a_model_and_its_tokenizer_are_pinned_and_relocated_by_the_commands(
        model: S3, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to list, and for the tokenizer without reading the weights."""
    for name, value in model.add_user_with("s3:GetObject").items():
        monkeypatch.setenv(name, value)
    file = pinned(environment_file(tmp_path, key))
    loaded = environment.load(file)
    assert loaded.environment.base_model.sha256 == hashlib.sha256(sha256sums(MODEL)).hexdigest()
    assert loaded.environment.base_model.architecture == "LlamaForCausalLM"
    model.seen.clear()
    for what, files in (("tokenizer", ["config.json", "tokenizer.json", "tokenizer_config.json"]),
                        ("base-model", ["config.json", "model.safetensors"])):
        assert not any(line.startswith("GET") and "model.safetensors" in line for line in model.seen)
        assert main(["--environment", str(file), "--volumes", str(tmp_path / "v"), "relocate", what]) == 0
        artifact = artifacts.find(plan_environment(loaded.environment).named()[what], tmp_path / "v")
        assert artifact and [each["path"] for each in artifact.manifest["files"]] == files
        assert all((artifact.path / name).read_bytes() == MODEL[name] for name in files)


def refused(file: Path, capsys: pytest.CaptureFixture[str], what: str = "base-model") -> str:
    """The one line with which a relocation ends that somebody must help."""
    assert main(["--environment", str(file), "--volumes", str(file.parent / "v"), "relocate", what]) == 2
    assert not list((file.parent / "v").glob("*/*/[!.]*"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("status", [(404, "NoSuchKey"), (403, "AccessDenied")], ids=["404", "403"])
def test_a_model_without_a_list_of_digests_is_refused_with_the_commands_that_make_it(
        model: S3, tmp_path: Path, status: tuple[int, str], capsys: pytest.CaptureFixture[str]) -> None:
    """S3 answers 403 where the object is not there and the bucket may not be listed."""
    file = pinned(environment_file(tmp_path))
    model.refused["GET /data/models/tiny/SHA256SUMS"] = status
    line = refused(file, capsys)
    assert "sha256sum * > SHA256SUMS" in line
    assert "aws s3 cp SHA256SUMS s3://data/models/tiny/SHA256SUMS" in line
    with pytest.raises(UserError, match="aws s3 cp SHA256SUMS"):
        pinned(environment_file(tmp_path))


def test_a_list_of_digests_that_is_not_the_pinned_one_is_refused(
        model: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pinned(environment_file(tmp_path))
    model.put("models/tiny/SHA256SUMS", sha256sums(MODEL | {"README.md": b"# Else"}))
    assert "s3://data/models/tiny: SHA256SUMS: environment.yaml says" in refused(file, capsys)


def test_a_listed_file_that_is_not_there_is_named_before_anything_is_fetched(
        model: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pinned(environment_file(tmp_path))
    model.delete("models/tiny/model.safetensors")
    assert ("s3://data/models/tiny/model.safetensors: SHA256SUMS lists it, but it is not there (404). Upload it"
            in refused(file, capsys))


def test_a_file_that_is_not_as_listed_is_named_with_both_digests(
        model: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pinned(environment_file(tmp_path))
    model.put("models/tiny/model.safetensors", save({"weight": np.zeros(50_000)}))
    line = refused(file, capsys)
    assert "s3://data/models/tiny/model.safetensors: SHA256SUMS says" in line
    assert hashlib.sha256(MODEL["model.safetensors"]).hexdigest() in line
    assert "write SHA256SUMS again and run: python -m jobs pin" in line
