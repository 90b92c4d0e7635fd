"""Promises of signatures: what model-signing makes verifies here and the other way round, and nothing forged does."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from jobs.core import artifacts, environment, provenance, signatures, signing
from jobs.core.errors import RetryableError, UserError
from tests import build_pipeline, build_signing
from tests.build_signing import pair
from tests.manifests import CHECKOUT

CONTENT = b'{"kind": "adapter"}\n'
DEVICE = "pkcs11:token=team;object=adapters?pin-value=1234"
DEVICES = "model_signing._signing.sign_pkcs11"


@functools.cache
def signed(name: str = "one") -> bytes:
    """The signature of CONTENT."""
    return build_signing.signer(pair(name)).sign(CONTENT).encode()


def payload(bundle: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
    return found


def model_signing(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True,
                          check=False)


def accepted_by_model_signing(folder: Path, content: bytes, bundle: bytes, key: str) -> bool:
    """Whether `model_signing verify key`, by its API, accepts the bundle as the signature of the content."""
    from model_signing import verifying

    for name, text in (("artifact.json", content), ("artifact.json.sig", bundle), ("key.pub", key.encode())):
        (folder / name).write_bytes(text)
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=folder / "key.pub").verify(
            folder / "artifact.json", folder / "artifact.json.sig")
    except Exception:
        return False
    return True


def accepted_here(content: bytes, bundle: bytes, key: str) -> bool:
    try:
        return signatures.verify(content, bundle, [key]) == key
    except ValueError:
        return False


# --- with the command line of model-signing ---------------------------------------------------------------------------


def test_what_is_signed_here_verifies_with_the_command_line_of_model_signing(tmp_path: Path) -> None:
    """As docs/signing.md shows it."""
    (tmp_path / "artifact.json").write_bytes(CONTENT)
    (tmp_path / "artifact.json.sig").write_bytes(signed())
    (tmp_path / "signing.pub").write_text(pair().public)
    run = model_signing("verify", "key", tmp_path / "artifact.json", "--signature", tmp_path / "artifact.json.sig",
                        "--public_key", tmp_path / "signing.pub")
    assert (run.returncode, run.stdout) == (0, "Verification succeeded\n"), run.stderr


@pytest.mark.parametrize("curve", list(signatures.CURVES))
def test_every_curve_that_is_accepted_signs_for_both(tmp_path: Path, curve: str) -> None:
    bundle = build_signing.signer(pair(curve, curve)).sign(CONTENT).encode()
    assert accepted_here(CONTENT, bundle, pair(curve, curve).public)
    assert accepted_by_model_signing(tmp_path, CONTENT, bundle, pair(curve, curve).public)


def test_what_the_command_line_of_model_signing_signs_verifies_here(tmp_path: Path) -> None:
    (tmp_path / "artifact.json").write_bytes(CONTENT)
    (tmp_path / "key.pem").write_text(pair().private)
    run = model_signing("sign", "key", tmp_path / "artifact.json", "--private_key", tmp_path / "key.pem",
                        "--signature", tmp_path / "artifact.json.sig")
    assert run.returncode == 0, run.stderr
    bundle = (tmp_path / "artifact.json.sig").read_bytes()
    assert accepted_here(CONTENT, bundle, pair().public)
    assert payload(bundle)["subject"] == payload(signed())["subject"]


# --- good and bad signatures ------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(bundle: bytes) -> bytes:
        parsed = json.loads(bundle)
        change(parsed)
        return json.dumps(parsed).encode()
    return apply


def restated(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Another statement, signed by the trusted key."""
    def apply(bundle: bytes) -> bytes:
        statement = payload(bundle)
        change(statement)
        return build_signing.envelope(json.dumps(statement).encode(), pair())
    return apply


def other_key_of_that_name(bundle: dict[str, Any]) -> None:
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    bundle.clear()
    bundle.update(json.loads(signed("two")))
    bundle["verificationMaterial"]["publicKey"]["hint"] = hint


OTHER = hashlib.sha256(b"other").hexdigest()
BAD: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "no JSON": lambda bundle: bundle[:-1],
    "half": lambda bundle: bundle[:len(bundle) // 2],
    "a list": lambda _: b"[]",
    "a number": lambda _: b"1",
    "not UTF-8": lambda bundle: b"\xff" + bundle,
    "deep": lambda _: b"[" * 60000,
    "by another key": lambda _: signed("two"),
    "by another key, under this one's name": changed(other_key_of_that_name),
    "another name of the key": changed(lambda b: b["verificationMaterial"]["publicKey"].update(hint=OTHER)),
    "another kind of bundle": changed(lambda b: b.update(mediaType=signatures.BUNDLE.replace("0.3", "0.2"))),
    "no verification material": changed(lambda b: b.pop("verificationMaterial")),
    "no envelope": changed(lambda b: b.pop("dsseEnvelope")),
    "no signature": changed(lambda b: b["dsseEnvelope"].update(signatures=[])),
    "an empty signature": changed(lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="")),
    "a signature that is no base64": changed(lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="%%%")),
    "a signature that is a number": changed(lambda b: b["dsseEnvelope"]["signatures"][0].update(sig=5)),
    "another payload": changed(lambda b: b["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode())),
    "another kind of payload": changed(lambda b: b["dsseEnvelope"].update(payloadType="text/plain")),
    "of another file": lambda _: build_signing.signer(pair()).sign(b"other").encode(),
    "a statement without a subject": restated(lambda s: s.update(subject=[])),
    "a statement about two": restated(lambda s: s["subject"].append({"name": "b", "digest": {"sha256": OTHER}})),
    "a statement of another kind": restated(lambda s: s.update(predicateType="https://slsa.dev/provenance/v1")),
    "a statement in another format": restated(lambda s: s.update(_type="https://in-toto.io/Statement/v0.1")),
    "another file in the statement": restated(lambda s: s["predicate"]["resources"][0].update(digest=OTHER)),
    "no file in the statement": restated(lambda s: s["predicate"].update(resources=[])),
    "a second file in the statement": restated(
        lambda s: s["predicate"]["resources"].append({"name": "b", "algorithm": "sha256", "digest": OTHER})),
    "a statement that is a list": lambda _: build_signing.envelope(b"[]", pair()),
    "a statement that is no JSON": lambda _: build_signing.envelope(b"{", pair()),
}


def test_a_good_signature_is_accepted_by_both(tmp_path: Path) -> None:
    assert accepted_here(CONTENT, signed(), pair().public)
    assert accepted_by_model_signing(tmp_path, CONTENT, signed(), pair().public)


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_signature_is_accepted_by_neither(tmp_path: Path, name: str) -> None:
    bundle = BAD[name](signed())
    assert not accepted_here(CONTENT, bundle, pair().public)
    assert not accepted_by_model_signing(tmp_path, CONTENT, bundle, pair().public)


@pytest.mark.parametrize(("name", "reason"), [
    ("half", "it is no whole sigstore bundle"), ("another kind of bundle", "of another kind or version"),
    ("another kind of payload", "of another kind or version"), ("by another key", "none of signing.public_keys"),
    ("of another file", "the file was changed, or the signature belongs to another one"),
    ("a statement of another kind", "what it signs is another kind of statement"),
    ("a statement in another format", "what it signs is another kind of statement"),
    ("a statement that is a list", "what it signs is no statement about a model")])
def test_a_bad_signature_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        signatures.verify(CONTENT, BAD[name](signed()), [pair().public])


@pytest.mark.parametrize("hint", [{}, {"hint": None}, {"hint": 5}, {"hint": ["x"]}])
def test_a_signature_that_does_not_name_its_key_is_not_accepted_here(tmp_path: Path, hint: dict[str, Any]) -> None:
    """model-signing takes it, as one from before its version 1.0."""
    bundle = changed(lambda b: b["verificationMaterial"].update(publicKey=hint))(signed())
    with pytest.raises(ValueError, match="does not name its key"):
        signatures.verify(CONTENT, bundle, [pair().public])


def test_a_keyless_signature_is_not_accepted() -> None:
    """It names a person by a certificate of Sigstore, and not a key."""
    def by_certificate(bundle: dict[str, Any]) -> None:
        bundle["verificationMaterial"] = {"certificate": {"rawBytes": ""}}

    with pytest.raises(ValueError, match="does not name its key: it is keyless"):
        signatures.verify(CONTENT, changed(by_certificate)(signed()), [pair().public])


def broken(text: str) -> str:
    """Base64 with a line's end in it, as a lenient decoder takes it."""
    return f"{text[:8]}\n{text[8:]}"


@pytest.mark.parametrize("change", [
    lambda envelope: envelope.update(payload=broken(envelope["payload"])),
    lambda envelope: envelope["signatures"][0].update(sig=broken(envelope["signatures"][0]["sig"]))])
def test_a_signature_has_one_spelling(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(ValueError, match="no whole sigstore bundle"):
        signatures.verify(CONTENT, changed(lambda b: change(b["dsseEnvelope"]))(signed()), [pair().public])


@pytest.mark.parametrize("length", [signatures.PEM_BYTES, signatures.PEM_BYTES + 1])
def test_a_public_key_is_read_up_to_a_limit_that_no_key_has(length: int) -> None:
    text = pair().public.ljust(length, "\n")
    if length <= signatures.PEM_BYTES:
        assert signatures.public_key(text) == pair().public
    else:
        with pytest.raises(ValueError, match="must be one public key in PEM"):
            signatures.public_key(text)


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"\n", CONTENT.replace(b" ", b"")])
def test_a_signature_is_of_exactly_these_bytes(tmp_path: Path, content: bytes) -> None:
    assert not accepted_here(content, signed(), pair().public)
    assert not accepted_by_model_signing(tmp_path, content, signed(), pair().public)


@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_no_changed_byte_makes_a_signature_for_something_else(place: int, byte: int) -> None:
    bundle = bytearray(signed())
    bundle[place % len(bundle)] = byte
    with contextlib.suppress(ValueError):  # anything else would be an error of ours
        signatures.verify(CONTENT, bytes(bundle), [pair().public])
    with pytest.raises(ValueError):
        signatures.verify(CONTENT + b" ", bytes(bundle), [pair().public])


@given(end=st.integers(0, 10**6))
def test_no_part_of_a_signature_is_one(end: int) -> None:
    bundle = signed()
    with pytest.raises(ValueError):
        signatures.verify(CONTENT, bundle[:end % len(bundle)], [pair().public])


def test_any_of_the_trusted_keys_will_do_and_the_message_names_them_where_none_does() -> None:
    one, two, three = (pair(name).public for name in ("one", "two", "three"))
    assert signatures.verify(CONTENT, signed("one"), [two, one]) == one
    assert signatures.verify(CONTENT, signed("two"), [two, one]) == two
    with pytest.raises(ValueError) as raised:
        signatures.verify(CONTENT, signed("three"), [two, one])
    first, second, third = (signatures.fingerprint(key)[:12] for key in (one, two, three))
    assert str(raised.value) == (
        f"it is by the key '{third}', which is none of signing.public_keys ({second}, {first})")
    forged = changed(other_key_of_that_name)(signed())
    with pytest.raises(ValueError, match=f"^it was changed, or is not by the key {first} that it names$"):
        signatures.verify(CONTENT, forged, [one])


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_same_content_is_signed_with_the_same_bytes() -> None:
    """A published adapter that is published again keeps its digest in the registry."""
    assert build_signing.signer(pair()).sign(CONTENT) == build_signing.signer(pair()).sign(CONTENT)


def test_a_signature_has_the_form_of_model_signings_own(tmp_path: Path) -> None:
    """But for the random numbers and the order of keys, in which each of its own differs."""
    from model_signing import hashing
    from model_signing._signing import sign_ec_key
    from model_signing._signing import signing as own

    (tmp_path / "artifact.json").write_bytes(CONTENT)
    (tmp_path / "key.pem").write_text(pair().private)
    made = sign_ec_key.Signer(tmp_path / "key.pem").sign(own.Payload(hashing.Config().set_ignored_paths(
        paths=[], ignore_git_paths=False).hash(tmp_path / "artifact.json"))).bundle.to_json().encode()
    signature = build_signing.signer(pair()).sign(CONTENT).encode()
    theirs, ours = json.loads(made), json.loads(signature)
    assert payload(made) == payload(signature)
    text = base64.b64decode(ours["dsseEnvelope"]["payload"]).decode()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1), "and people can read the statement"
    for bundle in (theirs, ours):
        bundle["dsseEnvelope"].pop("payload")
        bundle["dsseEnvelope"]["signatures"][0].pop("sig")
    assert ours == theirs


def environment_with(*keys: str) -> environment.Environment:
    return build_pipeline.build(signing__public_keys=[*keys]).environment


def test_without_signing_there_is_no_signer_whatever_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.VARIABLE, "/nowhere")
    assert signing.signer(build_pipeline.build().environment) is None


def test_the_signer_signs_with_the_key_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through links, as a Secret is mounted; its file ends in a line's end or not."""
    (tmp_path / "data").write_text(pair().private.strip())
    (tmp_path / "key").symlink_to(tmp_path / "data")
    monkeypatch.setenv(signing.VARIABLE, str(tmp_path / "key"))
    signer = signing.signer(environment_with(pair("two").public, pair().public))
    assert signer is not None
    assert (signer.own, signer.keys) == (pair().public, (pair("two").public, pair().public))
    assert signatures.verify(CONTENT, signer.sign(CONTENT).encode(), signer.keys) == pair().public


def private_key(make: Callable[[], Any], password: bytes | None = None) -> str:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    text: bytes = make().private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return text.decode()


WRONG_KEYS: dict[str, tuple[str | None, str]] = {
    "missing": (None, "cannot be read: No such file"),
    "empty": ("\n", "is no private key in PEM"),
    "a public key": (pair().public, "is no private key in PEM"),
    "encrypted": (private_key(lambda: ec.generate_private_key(ec.SECP256R1()), b"secret"), "encrypted with a password"),
    "of RSA": (private_key(lambda: rsa.generate_private_key(65537, 2048)), "is a key of the kind RSAPublicKey"),
    "of Ed25519": (private_key(ed25519.Ed25519PrivateKey.generate), "is a key of the kind Ed25519PublicKey"),
    "on another curve": (private_key(lambda: ec.generate_private_key(ec.SECP256K1())), "of the kind secp256k1"),
    "not trusted": (pair("two").private, "is none of signing.public_keys"),
}


@pytest.mark.parametrize("name", list(WRONG_KEYS))
def test_a_key_that_cannot_sign_is_found_before_the_work_and_is_never_shown(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, problem = WRONG_KEYS[name]
    file = tmp_path / "key"
    if text:
        file.write_text(text)
    monkeypatch.setenv(signing.VARIABLE, str(file))
    with pytest.raises(UserError) as raised:
        signing.signer(environment_with(pair().public))
    assert problem in str(raised.value)
    assert str(file) in str(raised.value)
    assert "PRIVATE" not in str(raised.value)
    assert not text or len(text) < 20 or text.splitlines()[1] not in str(raised.value) or text == pair().public


@pytest.mark.parametrize("value", [None, "", " "])
def test_where_signatures_are_asked_for_a_stage_needs_a_key(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(signing.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(signing.VARIABLE, value)
    with pytest.raises(UserError, match="SIGNING_KEY is not set. Add the component base/signing"):
        signing.signer(environment_with(pair().public))


def test_a_key_that_is_not_trusted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(pair("two").private)
    monkeypatch.setenv(signing.VARIABLE, str(tmp_path / "key"))
    with pytest.raises(UserError) as raised:
        signing.signer(environment_with(pair().public))
    assert str(raised.value).startswith(f"SIGNING_KEY: the public key of {tmp_path / 'key'} "
                                        f"({signatures.fingerprint(pair('two').public)[:12]}) is none of ")


@pytest.mark.parametrize("size", [signing.KEY_BYTES, signing.KEY_BYTES + 1])
def test_a_key_file_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    (tmp_path / "key").write_text(pair().private.ljust(size, "\n"))
    monkeypatch.setenv(signing.VARIABLE, str(tmp_path / "key"))
    if size <= signing.KEY_BYTES:
        assert signing.signer(environment_with(pair().public))
    else:
        with pytest.raises(UserError, match="the signing key cannot be read"):
            signing.signer(environment_with(pair().public))


@pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
def test_a_key_file_of_another_kind_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       kind: str) -> None:
    file = tmp_path / "key"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_text("x" * 100_000)
    monkeypatch.setenv(signing.VARIABLE, str(file))
    with pytest.raises(UserError, match="the signing key cannot be read"):
        signing.signer(environment_with(pair().public))


def test_a_pkcs11_uri_needs_a_package_that_is_not_in_the_images_and_its_pin_is_not_shown(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, DEVICES, None)
    monkeypatch.setenv(signing.VARIABLE, DEVICE)
    with pytest.raises(UserError) as raised:
        signing.signer(environment_with(pair().public))
    assert "model-signing[pkcs11]" in str(raised.value)
    assert "1234" not in str(raised.value)


class Device:
    """In place of model-signing's signer for a PKCS#11 device, which needs a library of C."""

    there = True

    def __init__(self, uri: str) -> None:
        if uri != DEVICE:
            raise LookupError(f"no key at {uri}")
        self.key, _ = signing.from_pem(pair().private.encode(), "the device's key")

    def public_key(self) -> Any:
        return serialization.load_pem_public_key(pair().public.encode())

    def sign(self, payload: Any) -> Any:
        if not self.there:
            raise OSError(f"{DEVICE} is away")
        return self.key.sign(payload)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(DEVICES)
    module.Signer = Device  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, DEVICES, module)
    monkeypatch.setenv(signing.VARIABLE, DEVICE)


def test_a_key_in_a_device_signs(device: None) -> None:
    signer = signing.signer(environment_with(pair("two").public, pair().public))
    assert signer is not None
    assert signer.own == pair().public
    assert signatures.verify(CONTENT, signer.sign(CONTENT).encode(), signer.keys) == pair().public


def test_a_device_that_is_away_when_the_work_is_done_is_tried_again(device: None, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    signer = signing.signer(environment_with(pair().public))
    assert signer is not None
    monkeypatch.setattr(Device, "there", False)
    with pytest.raises(RetryableError) as raised:
        signer.sign(CONTENT)
    assert str(raised.value) == "SIGNING_KEY: pkcs11:token=team;object=adapters did not sign (OSError)"


def test_a_device_without_the_key_is_an_error_that_does_not_show_the_pin(device: None, monkeypatch: pytest.MonkeyPatch
                                                                         ) -> None:
    monkeypatch.setenv(signing.VARIABLE, DEVICE.replace("adapters", "other"))
    with pytest.raises(UserError) as raised:
        signing.signer(environment_with(pair().public))
    assert str(raised.value) == ("SIGNING_KEY: no key that can sign is at pkcs11:token=team;object=other "
                                 "(LookupError). See docs/signing.md")


def test_the_key_of_a_device_must_be_trusted(device: None) -> None:
    with pytest.raises(UserError, match="the public key of pkcs11:token=team;object=adapters .* is none of ") as raised:
        signing.signer(environment_with(pair("two").public))
    assert "1234" not in str(raised.value)


def test_signing_and_verifying_with_a_key_connect_to_nothing(tmp_path: Path) -> None:
    """model-signing brings the clients of Sigstore with it, which would fetch their roots of trust."""
    program = f"""
import socket
def refuse(*_, **__): raise AssertionError("a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from tests import build_signing
from tests.build_signing import pair
from tests.manifests import CHECKOUT
from jobs.core import signatures
bundle = build_signing.signer(pair()).sign({CONTENT!r})
signatures.verify({CONTENT!r}, bundle.encode(), [pair().public])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                         env={**os.environ, "HOME": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.iterdir()), "nor does it write to the user's folder"


def test_checking_signatures_needs_no_model_signing() -> None:
    """vLLM's own image does not have it."""
    program = ("import sys; sys.modules.update(dict.fromkeys(('model_signing', 'sigstore', 'in_toto_attestation')))\n"
               f"from jobs.core import signatures\nsignatures.verify({CONTENT!r}, {signed()!r}, [{pair().public!r}])")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# --- docs/signing.md --------------------------------------------------------------------------------------------------


def commands(heading: str) -> str:
    """The first block of shell commands below a heading of docs/signing.md."""
    section = (CHECKOUT / "docs" / "signing.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return textwrap.dedent(re.findall(r"^( *)```sh\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)[0][1])


def run_shell(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=folder, capture_output=True, text=True,
                          check=False, env={**os.environ, "PATH": path})


def test_the_documented_commands_make_a_key_that_signs_and_verify_what_it_signed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_shell(commands("Switch it on"), tmp_path)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "signing.key").stat().st_mode & 0o77 == 0
    monkeypatch.setenv(signing.VARIABLE, str(tmp_path / "signing.key"))
    signer = signing.signer(environment_with((tmp_path / "signing.pub").read_text()))

    def write(draft: Path) -> None:
        (draft / "weights").write_text("w")

    folder = artifacts.publish(artifacts.Spec("volume", "adapter", {}), tmp_path, write, keep=1, signer=signer).path
    shutil.copyfile(tmp_path / "signing.pub", folder / "signing.pub")
    by_hand = run_shell(commands("Verify by hand"), folder)
    assert by_hand.returncode == 0, by_hand.stderr
    assert by_hand.stdout.splitlines() == ["Verification succeeded", "weights: OK"]
    (folder / "weights").write_text("x")
    assert run_shell(commands("Verify by hand"), folder).returncode == 1

    assert signer is not None
    manifest = (folder / "artifact.json").read_bytes()
    evaluation = json.dumps({"digest": "fedcba9876543210", "about": {"passed": True}}).encode()
    (folder / provenance.FILE).write_bytes(provenance.sign(build_pipeline.build(), manifest, evaluation, "e", signer))
    read = run_shell(commands("Provenance"), folder)
    assert read.returncode == 0, read.stderr
    assert read.stdout.startswith("Verified OK\n")
    subject = json.loads((folder / "statement.json").read_text())["subject"][0]["digest"]["sha256"]
    assert subject in read.stdout
