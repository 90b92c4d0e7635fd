"""Checks signatures of artifacts: OpenSSF Model Signing bundles over `artifact.json`, by public keys that are in git.

The manifest lists every file with its sha256, so its signature covers the whole artifact. signing.py makes signatures
with the `model-signing` package, and `model_signing verify key` takes them. Here they are checked with `cryptography`
alone, because vLLM's own image has no model-signing, and because that checks files: between its check and ours, someone
who can write to the volume could replace them. This checks the bytes that were read, and accepts a little less than
model-signing does: no signature without the digest of its key, and none in the format of before version 1.0
(tests/core/test_signing.py compares the two).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.files import read_plain_file
from jobs.core.layout import MANIFEST, MANIFEST_BYTES, SIGNATURE, SIGNATURE_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

# By OpenSSL's name of the curve, which is also the sigstore bundle's: the name of its hash.
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
PEM_BYTES = 4096  # a public key on the largest of the curves has 270
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IN_TOTO = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
MODEL_SIGNATURE = "https://model_signing/signature/v1.0"


PRIVATE = ("is a private key. Whoever can read this file can sign now: make a new pair of keys, put the private one "
           "into the Secret and the public one here")


class NotSigned(UserError):
    """An artifact has no signature by one of the trusted keys. A user must decide; nothing uses the artifact."""


def is_private(text: str) -> bool:
    """Whether the text holds a private key in PEM."""
    return "PRIVATE KEY-----" in text


def public_key(text: str) -> str:
    """A public key in PEM, as OpenSSL writes it; its digest (`fingerprint`) is over this form.

    Raises:
        ValueError: it is not a public key on one of `CURVES`; the message says what it is, and never quotes it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    if is_private(text):
        raise ValueError(PRIVATE)
    if text.count("-----BEGIN") != 1 or len(text) > PEM_BYTES:
        raise ValueError("must be one public key in PEM (-----BEGIN PUBLIC KEY-----)")
    try:
        key = serialization.load_pem_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm, TypeError):
        raise ValueError("is no public key in PEM (-----BEGIN PUBLIC KEY-----); `openssl pkey -pubout` writes one") \
            from None
    curve = key.curve.name if isinstance(key, EllipticCurvePublicKey) else type(key).__name__.strip("_")
    if curve not in CURVES:
        raise ValueError(f"is a key of the kind {curve}; only keys on {', '.join(CURVES)} can verify a model's "
                         "signature")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def fingerprint(key: str) -> str:
    """By which a signature names its public key: the sha256 of the PEM that `public_key` returns."""
    return hashlib.sha256(key.encode()).hexdigest()


def check(artifact: Path, manifest: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, bytes]:
    """Check the signature of an artifact whose files were compared with its manifest.

    Args:
        manifest: as it was read. It must be what the signature is about, and not only what is there now.
        keys: the trusted public keys.
    Returns:
        the key by which the signature verifies, and the content of the manifest that is signed.
    Raises:
        NotSigned: there is no signature, or it does not verify.
        OSError: it cannot be read; `filename` is set.
    """
    try:
        bundle = read_plain_file(artifact / SIGNATURE, SIGNATURE_BYTES)
    except FileNotFoundError:
        raise NotSigned(f"{artifact}: is not signed; environment.yaml asks for signatures (signing.public_keys)") \
            from None
    except UserError as error:
        raise NotSigned(f"{artifact}: its signature cannot be read: {error}") from None
    content = read_plain_file(artifact / MANIFEST, MANIFEST_BYTES)
    try:
        if json.loads(content) != manifest:
            raise ValueError(f"{MANIFEST} was replaced while it was read")
        return verify(content, bundle, keys), content
    except (ValueError, RecursionError) as error:
        raise NotSigned(f"{artifact}: its signature does not verify: {error}") from None


def verify(content: bytes, bundle: bytes, keys: Sequence[str]) -> str:
    """Check a bundle that signs `content` as model-signing does for a single file.

    Returns:
        the key, one of `keys`, by which it verifies.
    Raises:
        ValueError: it does not; the message is one line. Nothing else, whatever the bundle holds.
    """
    payload, key = verify_envelope(bundle, keys)
    digest = hashlib.sha256(content).digest()
    try:
        statement = json.loads(payload)
        kind, subjects, predicate = statement["predicateType"], statement["subject"], statement["predicate"]
        signed = {"subjects": [subject["digest"] for subject in subjects],
                  "resources": predicate["resources"],
                  "method": predicate["serialization"]["method"], "hash": predicate["serialization"]["hash_type"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("what it signs is no statement about a model") from None
    if (statement.get("_type"), kind) != (STATEMENT, MODEL_SIGNATURE):
        raise ValueError("what it signs is another kind of statement")
    expected = {"subjects": [{"sha256": hashlib.sha256(digest).hexdigest()}],
                "resources": [{"name": ".", "algorithm": "sha256", "digest": digest.hex()}],
                "method": "files", "hash": "sha256"}
    if signed != expected:
        raise ValueError("it signs something else: the file was changed, or the signature belongs to another one")
    return key


def verify_envelope(bundle: bytes, keys: Sequence[str]) -> tuple[bytes, str]:
    """The in-toto statement that a sigstore bundle signs, and the key, one of `keys`, by which it verifies.

    Raises:
        ValueError: it does not verify; the message is one line.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    try:
        parsed = json.loads(bundle)
        media_type, material = parsed["mediaType"], parsed["verificationMaterial"]
        hint = material["publicKey"].get("hint") if "publicKey" in material else None
        envelope = parsed["dsseEnvelope"]
        payload_type = envelope["payloadType"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        (only,) = envelope["signatures"]
        signature = base64.b64decode(only["sig"], validate=True)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # binascii.Error, too
        raise ValueError("it is no whole sigstore bundle") from None
    if media_type != BUNDLE or payload_type != IN_TOTO:
        raise ValueError("it is a sigstore bundle of another kind or version")
    if not isinstance(hint, str):
        raise ValueError("it does not name its key: it is keyless, by a certificate, or from before model-signing 1.0")
    key = next((each for each in keys if fingerprint(each) == hint), None)
    if key is None:
        raise ValueError(f"it is by the key {hint[:12]!r}, which is none of signing.public_keys ("
                         f"{', '.join(fingerprint(each)[:12] for each in keys)})")
    loaded = _load(key)
    # DSSE's pre-authentication encoding: https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md
    signed = b"DSSEv1 %d %s %d %s" % (len(IN_TOTO), IN_TOTO.encode(), len(payload), payload)
    try:
        loaded.verify(signature, signed, ECDSA(getattr(hashes, CURVES[loaded.curve.name])()))
    except InvalidSignature:
        raise ValueError(f"it was changed, or is not by the key {hint[:12]} that it names") from None
    return payload, key


@functools.lru_cache(maxsize=64)
def _load(key: str) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    loaded = serialization.load_pem_public_key(key.encode())
    assert isinstance(loaded, EllipticCurvePublicKey), "`public_key` refuses others"
    return loaded
