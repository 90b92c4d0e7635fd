"""Builds keys and signatures for tests."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jobs.core import artifacts, signatures, signing
from jobs.core.plan import FINE_TUNED_VOLUME
from jobs.core.signing import Signer

CURVES = {"secp256r1": ec.SECP256R1(), "secp384r1": ec.SECP384R1(), "secp521r1": ec.SECP521R1()}


@dataclass(frozen=True)
class Pair:
    """A pair of keys, in PEM."""

    private: str
    public: str


@functools.cache
def pair(name: str = "one", curve: str = "secp256r1") -> Pair:
    """The pair of keys of that name, the same in every process."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()) % 2**250 + 1
    key = ec.derive_private_key(number, CURVES[curve])
    return Pair(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                  serialization.NoEncryption()).decode(),
                key.public_key().public_bytes(serialization.Encoding.PEM,
                                              serialization.PublicFormat.SubjectPublicKeyInfo).decode())


def signer(keys: Pair, *trusted: str) -> Signer:
    """Signs with the pair's private key, and trusts its public key and the others."""
    made, own = signing.from_pem(keys.private.encode(), "the key of a test")
    return Signer((own, *trusted), own, made)


def envelope(payload: bytes, keys: Pair) -> bytes:
    """A bundle with any payload, signed."""
    key = serialization.load_pem_private_key(keys.private.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    kind = signatures.IN_TOTO.encode()
    signature = key.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload), ec.ECDSA(hashes.SHA256()))
    return json.dumps({
        "mediaType": signatures.BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": signatures.fingerprint(keys.public)}, "tlogEntries": []},
        "dsseEnvelope": {"payload": base64.b64encode(payload).decode(), "payloadType": signatures.IN_TOTO,
                         "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}]}}).encode()


def sign(artifact: Path, keys: Pair) -> None:
    """Sign an artifact that is there."""
    (artifact / artifacts.SIGNATURE).write_text(signer(keys).sign((artifact / artifacts.MANIFEST).read_bytes()))


def sign_all(volumes: Path, keys: Pair) -> None:
    """Sign every adapter, merged model and evaluation that is there."""
    for kind in artifacts.SIGNED:
        for manifest in (volumes / FINE_TUNED_VOLUME / kind).glob(f"*/{artifacts.MANIFEST}"):
            sign(manifest.parent, keys)


def tamper(artifact: Path, name: str) -> None:
    """Change a file as one who can write to the volume would: the manifest lists it as it is then."""
    content = (artifact / name).read_bytes()
    (artifact / name).write_bytes(content + (content.splitlines(keepends=True)[0] if name.endswith(".jsonl") else b" "))
    manifest = json.loads((artifact / artifacts.MANIFEST).read_text())
    manifest["files"] = artifacts.listing(artifact)
    (artifact / artifacts.MANIFEST).write_text(json.dumps(manifest, indent=2))
