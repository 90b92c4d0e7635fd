"""An adapter that one environment published arrives in another one whole, fitting and proven, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts, promotion, provenance, signatures
from jobs.core.artifacts import MANIFEST, SIGNATURE
from jobs.core.errors import RetryableError, UserError
from jobs.core.imported import LoadedImport
from jobs.core.pipeline import Pipeline
from jobs.core.plan import Plan, plan, plan_import
from jobs.core.published import PROVENANCE
from jobs.publication import layout
from jobs.publication.layout import File
from jobs.publication.push import Published
from jobs.relocation import adapters
from tests import build_published, registry_server
from tests.build_published import NAME, declare, publish, trained
from tests.build_signing import pair, signer
from tests.registry_server import Fault, Registry
from tests.s3_server import S3
from tests.s3_server import serve as serve_s3

Files = list[File]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry_server.isolate(monkeypatch, tmp_path, attempts=2)


@dataclasses.dataclass
class World:
    """An environment that trained an adapter, a registry, and an environment that imports it."""

    folder: Path
    server: Registry
    there: Pipeline
    files: Files

    @property
    def volumes(self) -> Path:
        """Those of the environment that imports."""
        return self.folder / "here" / "volumes"

    @property
    def planned(self) -> Plan:
        return plan(self.there)

    def declare(self, files: Files | None = None, **changes: Any) -> LoadedImport:
        published = publish(self.server.host, self.files if files is None else files)
        return declare(self.folder / "here", published, **changes)

    def promoted(self) -> str | None:
        current = promotion.current(self.volumes / "fine-tuned-model", NAME)
        return current.adapter if current else None

    def published(self) -> set[str]:
        """What is on the volume, without drafts and locks."""
        folder = self.volumes / "fine-tuned-model"
        return {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*") if not path.name.startswith(".")}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    there = trained(tmp_path / "there")
    with registry_server.serve() as server:
        yield World(tmp_path, server, there, build_published.files(tmp_path / "there" / "volumes", there))


def test_it_arrives_as_it_was_published_and_is_promoted(world: World) -> None:
    loaded = world.declare()
    adapters.run(loaded, world.volumes)
    adapter, evaluation = world.planned.adapter, world.planned.evaluation
    there = world.folder / "there" / "volumes"
    assert {p.name: p.read_bytes() for p in adapter.path(world.volumes).iterdir()} == {
        p.name: p.read_bytes() for p in adapter.path(there).iterdir()}
    artifacts.read(adapter.path(world.volumes))
    manifest = artifacts.read(evaluation.path(world.volumes)).manifest
    assert [each["path"] for each in manifest["files"]] == ["evaluation.json"]
    assert manifest["about"]["left_out"] == ["proof.json"]
    current = promotion.current(world.volumes / "fine-tuned-model", NAME)
    assert current and (current.adapter, current.evaluation) == (adapter.digest, evaluation.digest)
    record = plan_import(loaded.pipeline).imported_adapter.path(world.volumes)
    assert artifacts.read(record).manifest["about"]["adapter"] == adapter.digest
    assert not list(world.volumes.glob("*/*/.draft-*"))


def test_a_second_run_fetches_nothing_and_promotes_again_after_a_revert(world: World) -> None:
    first = world.declare()
    adapters.run(first, world.volumes)
    other = trained(world.folder / "there", training__seed=1)
    second = world.declare(build_published.files(world.folder / "there" / "volumes", other))
    adapters.run(second, world.volumes)
    assert world.promoted() == plan(other).adapter.digest
    world.server.seen.clear()
    adapters.run(first, world.volumes)
    assert world.promoted() == world.planned.adapter.digest
    assert not world.server.seen


def test_what_retention_removed_is_fetched_again(world: World) -> None:
    loaded = world.declare()
    adapters.run(loaded, world.volumes)
    shutil.rmtree(world.planned.evaluation.path(world.volumes))
    adapters.run(loaded, world.volumes)
    artifacts.read(world.planned.evaluation.path(world.volumes))


def test_it_keeps_what_the_volume_has_of_it(world: World) -> None:
    """The environment that trained it may import it too: its own evaluation has the proof, which is not published."""
    build_published.files(world.volumes, world.there)
    adapters.run(world.declare(), world.volumes)
    assert (world.planned.evaluation.path(world.volumes) / "proof.json").exists()
    assert world.promoted() == world.planned.adapter.digest


def test_provenance_is_kept_with_the_record(world: World) -> None:
    loaded = world.declare(sorted([*world.files, File.of(PROVENANCE, b"{}")], key=lambda file: file.path))
    adapters.run(loaded, world.volumes)
    assert (plan_import(loaded.pipeline).imported_adapter.path(world.volumes) / PROVENANCE).read_bytes() == b"{}"


def test_it_may_have_another_name_only_if_it_is_evaluated_here(world: World) -> None:
    with pytest.raises(UserError, match="adapter: other is not the name under which it was evaluated"):
        adapters.run(world.declare(adapter="other"), world.volumes)
    dataset = {"source": "file:dataset.jsonl", "sha256": "0" * 64}
    loaded = world.declare(adapter="other", dataset=dataset, evaluation={"gate": {"perplexity": {"max_ratio": 1}}})
    adapters.run(loaded, world.volumes)
    assert world.planned.adapter.path(world.volumes).exists()
    assert not (world.volumes / "fine-tuned-model" / "promoted").exists()  # the gate here decides


# --- what is refused --------------------------------------------------------------------------------------------------


def edited(files: Files, path: str, change: Callable[[bytes], bytes] | None) -> Files:
    """The files with another content of one of them; without it if there is no change."""
    rest = [file for file in files if file.path != path]
    (found,) = (file for file in files if file.path == path)
    content = found.content if isinstance(found.content, bytes) else found.content.read_bytes()
    return sorted([*rest, *([File.of(path, change(content))] if change else [])], key=lambda file: file.path)


def with_manifest(files: Files, folder: str, **changes: Any) -> Files:
    """The files, with keys of an artifact's manifest replaced."""
    return edited(files, f"{folder}{MANIFEST}", lambda content: json.dumps(json.loads(content) | changes).encode())


def of_other_adapter(world: World) -> Files:
    """The adapter with the evaluation of another one."""
    other = trained(world.folder / "other", training__seed=1)
    others = build_published.files(world.folder / "other" / "volumes", other)
    return [*(file for file in world.files if "/" not in file.path), *(file for file in others if "/" in file.path)]


def with_verdict(world: World, **verdict: Any) -> Files:
    """The adapter with an evaluation that is whole and says something else."""
    volumes = world.folder / "rewritten"
    adapter = build_published.adapter(volumes, world.there)
    evaluation = build_published.evaluation(volumes, world.there, **verdict)
    return layout.files(adapter, evaluation, answers=False)


def with_adapter(world: World, change: Callable[[Path], object]) -> Files:
    volumes = world.folder / "rewritten"
    adapter = build_published.adapter(volumes, world.there, change)
    return layout.files(adapter, build_published.evaluation(volumes, world.there), answers=False)


BAD: dict[str, tuple[Callable[[World], Files], str]] = {
    "a file is missing": (lambda w: edited(w.files, "README.md", None), r"adapter/\w+: README.md is missing"),
    "a file of the evaluation is missing": (lambda w: edited(w.files, "evaluation/evaluation.json", None),
                                            r"evaluation/\w+: evaluation.json is missing"),
    "a file more": (lambda w: [*w.files, File.of("extra.json", b"{}")], "extra.json is not listed in artifact.json"),
    "a changed file": (lambda w: edited(w.files, "README.md", lambda text: text + b"!"), "README.md was changed"),
    "changed weights": (lambda w: edited(w.files, "adapter_model.safetensors", lambda b: b[::-1]),
                        "adapter_model.safetensors was changed"),
    "no manifest": (lambda w: edited(w.files, MANIFEST, None), "artifact.json is missing. It is not what"),
    "no evaluation": (lambda w: [f for f in w.files if "/" not in f.path], "evaluation/artifact.json is missing"),
    "a manifest that is not JSON": (lambda w: edited(w.files, MANIFEST, lambda _: b"{"), "artifact.json is damaged"),
    "a manifest of something else": (lambda w: with_manifest(w.files, "", kind="dataset"),
                                     r"artifact.json describes dataset/\w+, not an artifact of the kind adapter"),
    "a manifest with another spec": (lambda w: with_manifest(w.files, "", spec={}), "describes"),
    "a manifest with a list as spec": (lambda w: with_manifest(w.files, "", spec=[]), "describes"),
    "a manifest whose digest is a path": (lambda w: with_manifest(w.files, "", digest="../../x"), "describes"),
    "verdict of another adapter": (of_other_adapter, r"evaluation/\w+ is about the adapter \w+, not about"),
    "verdict about another adapter": (lambda w: with_verdict(w, adapter={"digest": "f" * 16}),
                                      "is about the adapter f{16}, not about"),
    "a rejected verdict": (lambda w: with_verdict(w, passed=False), "did not let the adapter"),
    "a verdict that is no verdict": (lambda w: with_verdict(w, passed="yes"), "did not let the adapter"),
    "no weights": (lambda w: with_adapter(w, lambda f: (f / "adapter_model.safetensors").unlink()),
                   "adapter_model.safetensors is missing: it is no LoRA adapter"),
    "a pickle": (lambda w: with_adapter(w, lambda f: (f / "weights.bin").write_bytes(b"x")), "holds weights.bin; only"),
    "a rank that is no number": (lambda w: with_adapter(w, lambda f: (f / "adapter_config.json").write_text("{}")),
                                 "has rank None, above"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_the_published_adapter_is_one_line(world: World, case: str) -> None:
    make, message = BAD[case]
    refused(world, world.declare(make(world)), message)


def refused(world: World, loaded: LoadedImport, message: str, error: type[Exception] = UserError) -> None:
    """Nothing is published or promoted, and the message is one line."""
    before = world.published()
    with pytest.raises(error, match=message) as raised:
        adapters.run(loaded, world.volumes)
    assert "\n" not in str(raised.value)
    assert ".draft-" not in str(raised.value)
    assert world.published() == before
    assert world.promoted() is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"base_model": {"source": "builtin:tiny-reference"}},
     r"trained with the base_model builtin:tiny \(base-model/\w+\), and this environment has builtin:tiny-reference at "
     r"this code \(base-model/\w+\)\. Set base_model in .*environment.yaml"),
    ({"tokenizer": {"source": "builtin:tiny-reference"}}, "trained with the tokenizer another one"),
    ({"chat_template": {"enable_thinking": False}}, 'chat_template {}, and .* has {"enable_thinking":false}'),
    ({"serving": {"max_lora_rank": 1}}, r"has rank 8, above serving.max_lora_rank \(1\)"),
])
def test_an_adapter_that_does_not_fit_the_environment_is_refused(world: World, changes: dict[str, Any], message: str
                                                                 ) -> None:
    refused(world, world.declare(**changes), message)


def test_it_is_refused_too_when_it_is_there_and_the_environment_has_changed(world: World) -> None:
    adapters.run(world.declare(), world.volumes)
    with pytest.raises(UserError, match="trained with the base_model"):
        adapters.run(world.declare(base_model={"source": "builtin:tiny-reference"}), world.volumes)


def test_an_adapter_of_this_name_with_other_weights_is_not_replaced(world: World) -> None:
    """The verdict is about the weights that were published, and a training on other hardware gives others."""
    build_published.adapter(world.volumes, world.there, lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"))
    refused(world, world.declare(), "is on this volume already, with other weights")


def test_an_evaluation_on_the_volume_that_rejected_it_decides(world: World) -> None:
    build_published.evaluation(world.volumes, world.there, passed=False)
    refused(world, world.declare(), "on this volume did not let the adapter")


def test_another_digest_than_that_of_the_registry_is_refused(world: World) -> None:
    refused(world, world.declare(sha256="0" * 64), "says sha256 0{64}, which the registry does not have")


def test_a_registry_without_the_blob(world: World) -> None:
    loaded = world.declare()
    world.server.blobs.pop(f"sha256:{hashlib.sha256(bytes(range(256)) + b'0').hexdigest()}")
    refused(world, loaded, "blob")


def test_wrong_bytes_of_a_blob(world: World) -> None:
    loaded = world.declare()
    world.server.faults.append(Fault("blobs/", times=99, wrong_bytes=True))
    refused(world, loaded, "but the content is")


def test_expired_credentials(world: World, tmp_path: Path) -> None:
    loaded = world.declare()
    world.server.users["ci"] = "new"
    (tmp_path / "config.json").write_text(json.dumps({"auths": {world.server.host: {"username": "ci",
                                                                                   "password": "old"}}}))
    refused(world, loaded, "credentials|401|denied|unauthorized")


def test_a_registry_that_is_down_is_tried_again(world: World) -> None:
    loaded = world.declare()
    world.server.faults.append(Fault("blobs/", times=99, status=503))
    refused(world, loaded, "503", RetryableError)
    world.server.faults.clear()
    adapters.run(loaded, world.volumes)
    assert world.promoted() == world.planned.adapter.digest


# --- from a bucket ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def buckets() -> Iterator[S3]:
    with serve_s3() as server:
        yield server


@pytest.fixture
def bucket(buckets: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in {"AWS_ENDPOINT_URL": buckets.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    return buckets


def in_bucket(world: World, bucket: S3, files: Files, prefix: str, **changes: Any) -> LoadedImport:
    """The environment's files for what was published below the prefix."""
    for file in files:
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        bucket.put(f"{prefix}/{file.path}", content)
    sums = layout.sums(files)
    bucket.put(f"{prefix}/SHA256SUMS", sums)
    source = Published(f"s3://data/{prefix}", hashlib.sha256(sums).hexdigest(), pushed=True)
    return declare(world.folder / "here", source, **changes)


def test_it_arrives_from_a_bucket_too(world: World, bucket: S3) -> None:
    loaded = in_bucket(world, bucket, signed(world), "team/seville-hotels/one", **SIGNING)
    adapters.run(loaded, world.volumes)
    assert world.promoted() == world.planned.adapter.digest


@pytest.mark.parametrize(("change", "message"), [
    (lambda bucket: bucket.delete("two/README.md"), "SHA256SUMS lists it, but it is not there"),
    (lambda bucket: bucket.put("two/README.md", b"other"), "SHA256SUMS says .*, but the content is"),
    (lambda bucket: bucket.put("two/SHA256SUMS", b"0" * 64 + b"  README.md\n"), "pipeline.yaml says .*, but the"),
    (lambda bucket: bucket.delete("two/SHA256SUMS"), "SHA256SUMS is missing, so nothing says what"),
], ids=["missing", "replaced", "another list", "no list"])
def test_what_is_wrong_in_a_bucket_is_one_line(world: World, bucket: S3, change: Callable[[S3], object], message: str
                                               ) -> None:
    loaded = in_bucket(world, bucket, world.files, "two")
    change(bucket)
    refused(world, loaded, message)


# --- signatures -------------------------------------------------------------------------------------------------------

SIGNING = {"signing": {"public_keys": [pair().public]}}


def signed(world: World, *, key: str = "one", seed: int = 0, answers: bool = False) -> Files:
    """The files of an adapter that an environment with this key signed and published."""
    folder = world.folder / f"signed-{key}-{seed}"
    return build_published.files(folder / "volumes", trained(folder, training__seed=seed), answers=answers,
                                 signer=signer(pair(key)))


@pytest.mark.parametrize("answers", [False, True])
def test_what_a_trusted_key_signed_is_promoted(world: World, answers: bool) -> None:
    adapters.run(world.declare(signed(world, answers=answers), **SIGNING), world.volumes)
    assert world.promoted() == world.planned.adapter.digest
    for spec in (world.planned.adapter, world.planned.evaluation):
        artifacts.read(spec.path(world.volumes), [pair().public])


def with_signature_of(files: Files, path: str, other: Files) -> Files:
    """The files with the signature that another artifact has."""
    return sorted([*(file for file in files if file.path != path), *(file for file in other if file.path == path)],
                  key=lambda file: file.path)


UNSIGNED: dict[str, tuple[Callable[[World], Files], str]] = {
    "unsigned": (lambda w: w.files, r"adapter/\w+: is not signed; environment.yaml asks for signatures"),
    "signed by another key": (lambda w: signed(w, key="two"), r"adapter/\w+: its signature does not verify"),
    "an unsigned evaluation": (lambda w: edited(signed(w), f"evaluation/{SIGNATURE}", None),
                               r"evaluation/\w+: is not signed"),
    "signature of another adapter": (lambda w: with_signature_of(signed(w), SIGNATURE, signed(w, seed=1)),
                                     r"adapter/\w+: its signature does not verify"),
    "signature of another evaluation": (
        lambda w: with_signature_of(signed(w), f"evaluation/{SIGNATURE}", signed(w, seed=1)),
        r"evaluation/\w+: its signature does not verify"),
    "the adapter's signature on the evaluation": (lambda w: [
        *(f for f in signed(w) if f.path != f"evaluation/{SIGNATURE}"),
        *(dataclasses.replace(f, path=f"evaluation/{SIGNATURE}") for f in signed(w) if f.path == SIGNATURE)],
        r"evaluation/\w+: its signature does not verify"),
    "facts that were changed": (lambda w: with_manifest(signed(w), "", about={}),
                                r"adapter/\w+: its signature does not verify"),
    "a signature that is none": (lambda w: edited(signed(w), SIGNATURE, lambda _: b"{}"),
                                 r"adapter/\w+: its signature does not verify"),
}


@pytest.mark.parametrize("case", UNSIGNED)
def test_what_no_trusted_key_signed_is_refused(world: World, case: str) -> None:
    make, message = UNSIGNED[case]
    refused(world, world.declare(make(world), **SIGNING), message)


def with_provenance(world: World, *, key: str = "one", of: int = 0) -> Files:
    """What is published of an adapter, with the provenance of the one that has the seed `of`."""
    files, others = signed(world), {file.path: file for file in signed(world, seed=of)}

    def manifest(path: str) -> bytes:
        content = others[path].content
        return content if isinstance(content, bytes) else content.read_bytes()

    path = f"evaluation/{MANIFEST}"
    made = provenance.sign(world.there, manifest(MANIFEST), manifest(path), path, signer(pair(key)))
    return sorted([*files, File.of(PROVENANCE, made)], key=lambda file: file.path)


def test_provenance_is_verified_and_kept(world: World) -> None:
    loaded = world.declare(with_provenance(world), **SIGNING)
    adapters.run(loaded, world.volumes)
    kept = plan_import(loaded.pipeline).imported_adapter.path(world.volumes) / PROVENANCE
    assert b"seville-hotels" in signatures.verify_envelope(kept.read_bytes(), [pair().public])[0]


@pytest.mark.parametrize("options", [{"key": "two"}, {"of": 1}])
def test_provenance_of_another_adapter_or_by_another_key_is_refused(world: World, options: dict[str, Any]) -> None:
    refused(world, world.declare(with_provenance(world, **options), **SIGNING), "provenance.json does not verify: ")


def test_when_a_key_is_removed_what_it_signed_is_no_longer_promoted(world: World) -> None:
    files = signed(world)
    adapters.run(world.declare(files, **SIGNING), world.volumes)
    with pytest.raises(UserError, match="its signature does not verify"):
        adapters.run(world.declare(files, signing={"public_keys": [pair("two").public]}), world.volumes)


def test_signed_again_by_another_key_it_takes_the_place_of_what_is_there(world: World) -> None:
    """Key rotation: the same adapter, published again, has the same digest and another signature."""
    adapters.run(world.declare(signed(world), **SIGNING), world.volumes)
    adapters.run(world.declare(signed(world, key="two"), signing={"public_keys": [pair("two").public]}), world.volumes)
    for spec in (world.planned.adapter, world.planned.evaluation):
        artifacts.read(spec.path(world.volumes), [pair("two").public])
    assert not list(world.volumes.glob("*/*/.draft-*"))


# --- tampering --------------------------------------------------------------------------------------------------------


def in_the_middle(content: bytes) -> bytes:
    return content[:len(content) // 2] + b"!" + content[len(content) // 2:]


def test_no_file_can_be_changed_in_the_registry_or_left_out_or_added(world: World) -> None:
    """By whoever can write to the registry, and also pushes a manifest that fits, and has its digest put into git."""
    files = [*signed(world, answers=True)]
    for path in [file.path for file in files]:
        for name, change in (("changed", in_the_middle), ("left out", None)):
            loaded = world.declare(edited(files, path, change), **SIGNING)
            with pytest.raises(UserError):
                adapters.run(loaded, world.volumes)
            assert world.published() == set(), f"{path}: {name}"
    for path in ("x.json", "evaluation/x.json", "evaluation/x/y.json", "x/y.json"):
        with pytest.raises(UserError):
            adapters.run(world.declare([*files, File.of(path, b"{}")], **SIGNING), world.volumes)
        assert world.published() == set(), path
    adapters.run(world.declare(files, **SIGNING), world.volumes)
    assert world.promoted()


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placed", [0, 1, 2])
def test_a_kill_at_any_moment_leaves_nothing_promoted_and_the_next_run_completes_it(
        world: World, monkeypatch: pytest.MonkeyPatch, placed: int) -> None:
    """With nothing, the adapter, or both on the volume."""
    calls: list[object] = []
    place, loaded = artifacts.place, world.declare()

    def killed(*arguments: Any, **options: Any) -> None:
        if len(calls) < placed:
            place(*arguments, **options)
        calls.append(arguments)
        if len(calls) > placed or placed == len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "place", killed)
    with pytest.raises(KeyboardInterrupt):
        adapters.run(loaded, world.volumes)
    assert world.promoted() is None
    assert len(world.published()) == placed
    monkeypatch.setattr(artifacts, "place", place)
    adapters.run(loaded, world.volumes)
    assert world.promoted() == world.planned.adapter.digest
    assert not list(world.volumes.glob("*/*/.draft-*"))
