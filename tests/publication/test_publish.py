"""The stage `publish`: only what is promoted, to the place that environment.yaml names, and once."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.__main__ import main
from jobs.core import artifacts, promotion, signatures
from jobs.core.declarations import Source
from jobs.core.errors import RetryableError, UserError
from jobs.core.files import sha256_of
from jobs.core.plan import FINE_TUNED_VOLUME
from jobs.core.published import PROVENANCE
from jobs.publication import layout, publish
from jobs.relocation import download, sources
from jobs.relocation.sources import oci
from tests import build_pipeline, build_signing, registry_server
from tests.publication.conftest import TEXT, Made, make
from tests.s3_server import S3, serve


@pytest.fixture
def made(server: registry_server.Registry, tmp_path: Path) -> Made:
    return make(tmp_path / "made", publication={"to": f"oci://{server.host}/team/adapters"})


def run(made: Made, *, promoted_s: float = 0) -> None:
    publish.run(made.loaded, made.volumes, promoted_s)


def stage(made: Made, *options: str) -> int:
    return main(["--pipeline", str(made.loaded.path), "--volumes", str(made.volumes), "--wait-seconds", "0", "publish",
                 *options])


def pull(made: Made, lines: list[str], folder: Path) -> dict[str, bytes]:
    """What the printed lines bring, by the relocation of another environment."""
    source = Source(**dict(line.split(": ", 1) for line in lines))
    folder.mkdir()
    download.fetch(sources.listing(made.loaded, source), folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_promoted_adapter_is_published_and_its_lines_bring_it_elsewhere(
        made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr("jobs.core.termination.TERMINATION_LOG", log)
    assert stage(made) == 0
    title, *lines = log.read_text().splitlines()
    assert title == f"PUBLISHED: seville-hotels@{made.adapter.digest}. In the pipeline.yaml of another environment:"
    found = pull(made, lines, tmp_path / "pulled")
    assert found["adapter_model.safetensors"] == (made.adapter.path / "adapter_model.safetensors").read_bytes()
    assert not any(TEXT.encode() in content for content in found.values())
    before = log.read_text()
    assert stage(made) == 0
    assert log.read_text() == before.replace("PUBLISHED", "ALREADY PUBLISHED")


def test_a_second_run_writes_nothing(made: Made, server: registry_server.Registry) -> None:
    run(made)
    server.seen.clear()
    run(made)
    assert server.seen and {seen.method for seen in server.seen} <= {"GET", "HEAD"}


def test_answers_are_published_where_they_are_asked_for(server: registry_server.Registry, tmp_path: Path) -> None:
    made = make(tmp_path / "made", publication={"to": f"oci://{server.host}/team", "answers": True})
    run(made)
    assert any(TEXT.encode() in blob for blob in server.blobs.values())


def test_a_run_with_other_values_than_git_has_publishes_nothing_and_waits_for_nothing(
        server: registry_server.Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path / "made", publication={"to": f"oci://{server.host}/team"})
    with caplog.at_level("INFO", "jobs"):
        assert stage(made, "--set", "training.epochs=29") == 0
    assert "NOT PUBLISHED: this run took other values than the pipeline file" in caplog.text
    assert not server.blobs


def test_a_rejected_adapter_is_not_published_and_the_job_ends_well(server: registry_server.Registry, tmp_path: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path / "made", passed=False, publication={"to": f"oci://{server.host}/team"})
    with caplog.at_level("INFO", "jobs"):
        assert stage(made) == 0
    assert f"NOT PUBLISHED: seville-hotels@{made.adapter.digest} did not pass its evaluation" in caplog.text
    assert not server.seen


def test_what_passed_and_is_not_promoted_is_waited_for(server: registry_server.Registry, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "POLL_S", 0.01)
    made = make(tmp_path / "made", promoted=False, publication={"to": f"oci://{server.host}/team"})
    promotion.promote(made.volumes / FINE_TUNED_VOLUME, "seville-hotels", "0" * 16, "1" * 16)  # the one before
    with pytest.raises(RetryableError, match="passed its evaluation but was not promoted within 0 s"):
        run(made)
    assert not server.seen
    promote = threading.Timer(0.3, promotion.promote, (made.volumes / FINE_TUNED_VOLUME, "seville-hotels",
                                                       made.adapter.digest, made.evaluation.digest))
    promote.start()
    run(made, promoted_s=30)
    assert server.manifests


def test_without_an_evaluation_the_job_is_tried_again(made: Made) -> None:
    made.evaluation.path.rename(made.evaluation.path.with_name("away"))
    with pytest.raises(RetryableError, match="waited 0 s for evaluation/"):
        run(made)


def test_without_a_place_nothing_is_published(tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    with pytest.raises(UserError, match=r"environment\.yaml: has no key `publication`"):
        run(made)


@pytest.mark.parametrize("which", ["adapter", "evaluation"])
def test_a_damaged_artifact_is_not_published(made: Made, server: registry_server.Registry, which: str) -> None:
    for path in getattr(made, which).path.rglob("*.*"):
        if path.is_file() and path.name != "artifact.json":
            content = path.read_bytes()
            path.write_bytes(content.replace(b"o", b"0", 1) if b"o" in content else content[:-1])
            if path.name == layout.EVALUATED:
                path.write_bytes(content + b" ")
            with pytest.raises(UserError, match="was changed"):
                run(made)
            path.write_bytes(content)
    assert not server.seen


def test_expired_credentials_are_one_line_and_nothing_is_written(made: Made, server: registry_server.Registry,
                                                                 tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                 ) -> None:
    server.users = {"ci": "new"}
    auth = base64.b64encode(b"ci:old").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
    assert stage(made) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "the credentials of ci for" in error[0] and "are wrong or expired" in error[0]
    assert not server.manifests and not server.blobs


def test_the_second_run_needs_no_torch(made: Made) -> None:
    run(made)
    code = ("import sys; from jobs.__main__ import main; code = main(sys.argv[1:]); "
            "slow = {'torch', 'transformers', 'numpy', 'pyarrow', 'fsspec', 'aiohttp'} & set(sys.modules); "
            "assert not slow, slow; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, "--pipeline", str(made.loaded.path), "--volumes",
                           str(made.volumes), "publish"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ALREADY PUBLISHED" in done.stderr


# --- buckets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serve() as server:
        yield server


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A bucket, named and with credentials as the environment has them."""
    for name in ("AWS_PROFILE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_ENDPOINT_URL": s3.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
                        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    return s3


def objects(place: str) -> dict[str, bytes]:
    import fsspec

    bucket = fsspec.filesystem("s3", skip_instance_cache=True)
    root = place.removeprefix("s3://")
    return {path.removeprefix(f"{root}/"): bucket.cat_file(path) for path in bucket.find(root)}


def test_a_bucket_gets_the_same_files_and_a_list_of_their_digests(bucket: S3, tmp_path: Path,
                                                                 caplog: pytest.LogCaptureFixture) -> None:
    made = make(tmp_path / "made", publication={"to": "s3://data/team"})
    with caplog.at_level("INFO", "jobs"):
        run(made)
    place = f"s3://data/team/seville-hotels/{made.adapter.digest}"
    found = objects(place)
    sums = found.pop("SHA256SUMS")
    assert [f"source: {place}", f"sha256: {hashlib.sha256(sums).hexdigest()}"] == [
        record.message for record in caplog.records if record.name == "jobs"][-1].splitlines()[1:]
    assert sums.decode().splitlines() == [f"{hashlib.sha256(content).hexdigest()}  {path}"
                                          for path, content in sorted(found.items())]
    assert found.keys() == {file.path for file in layout.files(made.adapter, made.evaluation, answers=False)}
    caplog.clear()
    with caplog.at_level("INFO", "jobs"):
        run(made)
    assert "ALREADY PUBLISHED" in caplog.text


def test_what_others_may_have_pinned_in_a_bucket_is_not_overwritten(bucket: S3, tmp_path: Path) -> None:
    made = make(tmp_path / "made", publication={"to": "s3://data/kept"})
    run(made)
    place = f"s3://data/kept/seville-hotels/{made.adapter.digest}"
    before = objects(place)
    again = make(tmp_path / "made", publication={"to": "s3://data/kept", "answers": True})
    with pytest.raises(UserError, match="holds another publication of this adapter"):
        run(again)
    assert objects(place) == before


def test_a_bucket_that_is_not_there_or_not_allowed_is_named(bucket: S3, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "made", publication={"to": "s3://none/team"})
    with pytest.raises(UserError, match=r"s3://none/team/seville-hotels/.*: there is no such bucket"):
        run(made)
    bucket.require_known_credentials(True)
    try:
        with pytest.raises(UserError, match=r"not allowed \(.*s3:PutObject"):
            run(make(tmp_path / "made", publication={"to": "s3://data/denied"}))
    finally:
        bucket.require_known_credentials(False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no credentials"):
        run(make(tmp_path / "made", publication={"to": "s3://data/denied"}))


def test_a_bucket_that_is_down_is_tried_again_later(bucket: S3, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(RetryableError, match="s3://data/down/seville-hotels"):
        run(make(tmp_path / "made", publication={"to": "s3://data/down"}))


@pytest.fixture(autouse=True)
def fresh() -> None:
    oci._repository.cache_clear()


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def signed(server: registry_server.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """An environment that asks for signatures, with the key of the stages."""
    keys = build_signing.pair()
    (tmp_path / "key.pem").write_text(keys.private)
    monkeypatch.setenv("SIGNING_KEY", str(tmp_path / "key.pem"))
    made = make(tmp_path / "made", publication={"to": f"oci://{server.host}/team"},
                signing={"public_keys": [keys.public]})
    for artifact in (made.adapter, made.evaluation):
        build_signing.sign(artifact.path, keys)
    return made


def test_what_is_published_is_signed_as_a_whole_and_again_the_same(signed: Made, tmp_path: Path,
                                                                   server: registry_server.Registry,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "jobs"):
        run(signed)
        run(signed)
    first, second = [record.message.splitlines() for record in caplog.records if "PUBLISHED" in record.message]
    assert first[1:] == second[1:] and second[0].startswith("ALREADY PUBLISHED")
    pull(signed, first[1:], tmp_path / "pulled")
    keys = signed.loaded.pipeline.environment.trusted_keys
    statement = (tmp_path / "pulled" / PROVENANCE).read_bytes()
    subject = json.loads(signatures.verify_envelope(statement, keys)[0])["subject"]
    assert [each["digest"]["sha256"] for each in subject] == [sha256_of(tmp_path / "pulled" / "artifact.json")]
    (tmp_path / "pulled" / PROVENANCE).unlink()
    evaluation, adapter = (tmp_path / artifact.digest for artifact in (signed.evaluation, signed.adapter))
    (tmp_path / "pulled" / "evaluation").rename(evaluation)
    (tmp_path / "pulled").rename(adapter)
    assert artifacts.read(evaluation, keys).manifest["about"]["left_out"]
    assert artifacts.read(adapter, keys).digest == signed.adapter.digest


@pytest.mark.parametrize("which", ["adapter", "evaluation"])
def test_what_no_trusted_key_signed_is_not_published(signed: Made, server: registry_server.Registry,
                                                     which: str) -> None:
    artifact = getattr(signed, which)
    (artifact.path / artifacts.SIGNATURE).unlink()
    with pytest.raises(UserError, match="sign"):
        run(signed)
    build_signing.sign(artifact.path, build_signing.pair("another"))
    with pytest.raises(UserError, match="sign"):
        run(signed)
    assert not server.seen


def test_without_the_key_the_job_ends_before_it_waits(signed: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGNING_KEY")
    signed.evaluation.path.rename(signed.evaluation.path.with_name("away"))
    with pytest.raises(UserError, match="this stage has no key: SIGNING_KEY is not set"):
        run(signed)


@pytest.mark.parametrize("to", ["oci://{registry}/team", "s3://data/elsewhere"])
def test_another_environment_imports_it_by_the_lines_that_were_printed(
        to: str, bucket: S3, server: registry_server.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    keys = build_signing.pair()
    (tmp_path / "key.pem").write_text(keys.private)
    monkeypatch.setenv("SIGNING_KEY", str(tmp_path / "key.pem"))
    made = make(tmp_path / "made", publication={"to": to.format(registry=server.host)},
                signing={"public_keys": [keys.public]})
    for artifact in (made.adapter, made.evaluation):
        build_signing.sign(artifact.path, keys)
    with caplog.at_level("INFO", "jobs"):
        run(made)
    lines = next(record.message for record in caplog.records if "PUBLISHED" in record.message).splitlines()[1:]
    production = tmp_path / "production"
    production.mkdir()
    build_pipeline.write(production, base_model={"source": "builtin:tiny"}, signing={"public_keys": [keys.public]})
    (production / "pipeline.yaml").write_text("\n".join(["adapter: seville-hotels", *lines]))
    arguments = ["--pipeline", str(production / "pipeline.yaml"), "--volumes", str(production / "volumes")]
    assert main([*arguments, "relocate", "adapter"]) == 0
    promoted = promotion.current(production / "volumes" / FINE_TUNED_VOLUME, "seville-hotels")
    assert promoted and (promoted.adapter, promoted.evaluation) == (made.adapter.digest, made.evaluation.digest)
