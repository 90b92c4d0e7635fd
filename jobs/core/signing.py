"""Signs what a stage publishes, with the `model-signing` package of the OpenSSF; signatures.py checks signatures.

The key is what SIGNING_KEY names: the file of a Secret that is mounted into the stages that make adapters and
evaluations, or a key in a hardware security module (`pkcs11:`). Nothing here connects to anything: model-signing
contacts Sigstore only to sign without a key.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import signatures
from jobs.core.errors import RetryableError, UserError
from jobs.core.files import read_plain_file
from jobs.core.layout import MANIFEST

if TYPE_CHECKING:
    from jobs.core.environment import Environment

VARIABLE = "SIGNING_KEY"
PKCS11 = "pkcs11:"
KEY_BYTES = 64 * 2**10
ADVICE = f"docs/signing.md says how to make one and where it belongs ({VARIABLE})"


@dataclass(frozen=True)
class Signer:
    """A private key, and the public keys that the environment trusts, of which its own is one."""

    keys: tuple[str, ...]
    own: str
    _signer: Any  # of model-signing

    def sign(self, content: bytes, name: str = MANIFEST) -> str:
        """The signature of a file with this content: a sigstore bundle, as `model_signing sign key FILE` writes it.

        With a key in a file, the same content gives the same signature.

        Args:
            name: of the file; for people who read the bundle.
        """
        from model_signing import hashing
        from model_signing._signing import signing

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            file.write_bytes(content)
            # The paths of git, which it would ignore in a folder, are a set: in another order in every process.
            config = hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)
            payload = signing.Payload(config.hash(file))
        return str(self._signer.sign(payload).bundle.to_json())

    def sign_statement(self, subjects: Mapping[str, str], predicate_type: str, predicate: Mapping[str, Any]) -> str:
        """A sigstore bundle with a signed in-toto statement. `signatures.verify_envelope` returns the statement.

        Args:
            subjects: sha256 by name: what the statement is about.
            predicate: without numbers, which would become floating-point ones.
        """
        return str(self._signer.sign(_Payload(statement(subjects, predicate_type, predicate))).bundle.to_json())


class _Payload:
    """What model-signing's signers sign."""

    def __init__(self, statement: Any) -> None:
        self.statement = statement


def statement(subjects: Mapping[str, str], predicate_type: str, predicate: Mapping[str, Any]) -> Any:
    """An in-toto statement (v1)."""
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    return Statement([ResourceDescriptor(name=name, digest={"sha256": digest}).pb for name, digest in subjects.items()],
                     predicate_type, dict(predicate))


def signer(environment: Environment) -> Signer | None:
    """What signs in this process; None where the environment asks for no signatures.

    Call it before the work begins: a key that is missing must not cost a training.

    Raises:
        UserError: the environment asks for signatures, and there is no key, or none that it trusts.
    """
    if environment.signing is None:
        return None
    source = os.environ.get(VARIABLE, "").strip()
    if not source:
        raise UserError(f"environment.yaml asks for signatures (signing.public_keys), and this stage has no key: "
                        f"{VARIABLE} is not set. Add the component base/signing to the overlay's kustomization.yaml, "
                        "and create the Secret signing-key (docs/signing.md)")
    made, own = _pkcs11(source) if source.startswith(PKCS11) else _file(Path(source))
    keys = environment.signing.keys
    if own not in keys:
        raise UserError(f"{VARIABLE}: the public key of {_shown(source)} ({signatures.fingerprint(own)[:12]}) is none "
                        "of signing.public_keys in environment.yaml, so nothing would accept what it signs. Add it "
                        "there (openssl pkey -in KEY -pubout), or correct the Secret")
    return Signer(keys, own, made)


def _shown(source: str) -> str:
    return source.partition("?")[0]  # the query of a PKCS#11 URI may hold the PIN


def _file(file: Path) -> tuple[Any, str]:
    try:
        pem = read_plain_file(file, KEY_BYTES, follow_links=True)  # a Secret's files are links
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: the signing key cannot be read: {reason}. {ADVICE}") from None
    return from_pem(pem, str(file))


def from_pem(pem: bytes, name: str) -> tuple[Any, str]:
    """What signs with a private key in PEM, and its public key.

    Args:
        name: of the key, for messages.
    Raises:
        UserError: it is no private key, or none that can sign models.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(pem, None)
    except TypeError:
        raise UserError(f"{name}: the signing key is encrypted with a password, and a stage has none. {ADVICE}") \
            from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{name}: is no private key in PEM. {ADVICE}") from None
    public = key.public_key().public_bytes(serialization.Encoding.PEM,
                                           serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    try:
        own = signatures.public_key(public)
    except ValueError as error:
        raise UserError(f"{name}: the signing key {error}. {ADVICE}") from None
    return _reproducible(key), own


def _reproducible(key: Any) -> Any:
    """model-signing's signer for a private key, but the same content gives the same signature: an adapter that is
    published again then has the same digest in a registry. Its own draws random numbers, and writes the keys of a
    statement in an order that differs from process to process."""
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from google.protobuf import json_format
    from model_signing._signing import sign_ec_key, sign_sigstore_pb
    from sigstore_models import intoto
    from sigstore_models.bundle.v1 import Bundle

    class Reproducible(sign_ec_key.Signer):
        def __init__(self) -> None:  # without the parent's, which reads the file again: it may be another one by now
            self._private_key = key

        def sign(self, payload: Any) -> Any:
            content = json.dumps(json_format.MessageToDict(payload.statement.pb), sort_keys=True, indent=1).encode()
            algorithm = ECDSA(sign_ec_key.get_ec_key_hash(key.public_key()), deterministic_signing=True)  # RFC 6979
            signature = key.sign(sign_sigstore_pb.pae(content), algorithm)
            envelope = intoto.Envelope(payload=base64.b64encode(content), payload_type=signatures.IN_TOTO, signatures=[
                intoto.Signature(sig=base64.b64encode(signature), keyid="")])
            return sign_sigstore_pb.Signature(Bundle(
                media_type=sign_sigstore_pb._BUNDLE_MEDIA_TYPE, dsse_envelope=envelope,
                verification_material=self._get_verification_material()))

    return Reproducible()


def _pkcs11(uri: str) -> tuple[Any, str]:
    from cryptography.hazmat.primitives import serialization

    try:
        from model_signing._signing.sign_pkcs11 import Signer as ModuleSigner
    except ImportError:
        raise UserError(f"{VARIABLE} is a PKCS#11 URI, for which this image lacks PyKCS11: add it to the image "
                        "(pip install 'model-signing[pkcs11]'), with the module of your device (docs/signing.md)") \
            from None
    try:
        made: Any = ModuleSigner(uri)
    except Exception as error:  # of the module's own kinds; its text may hold the URI, and that the PIN
        raise UserError(f"{VARIABLE}: no key that can sign is at {_shown(uri)} ({type(error).__name__}). See "
                        "docs/signing.md") from None
    own = made.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return _Device(made, _shown(uri)), own.decode()


class _Device:
    """A key in a device, which may be away when a training of hours has ended. Its checkpoint stays."""

    def __init__(self, signer: Any, name: str) -> None:
        self._signer, self._name = signer, name

    def sign(self, payload: Any) -> Any:
        try:
            return self._signer.sign(payload)
        except Exception as error:
            raise RetryableError(f"{VARIABLE}: {self._name} did not sign ({type(error).__name__})") from None
