"""Promises of the environment file: what all adapters share is validated and pinned, and each source is found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import ValidationError

from jobs.core import environment
from jobs.core.declarations import Source
from jobs.core.environment import SERVABLE_RANKS, Environment, Publication
from jobs.core.errors import UserError
from jobs.core.plan import plan, plan_environment
from tests import build_pipeline
from tests.build_pipeline import COMMIT, SHA256
from tests.build_signing import pair


def write(folder: Path, **changes: Any) -> Path:
    """Write `folder/environment.yaml` and return it."""
    build_pipeline.write_yaml(folder / "environment.yaml", build_pipeline.environment(**changes))
    return folder / "environment.yaml"


def test_an_overlays_folder_stands_for_its_file(tmp_path: Path) -> None:
    file = write(tmp_path)
    assert environment.load(tmp_path) == environment.load(file)
    assert environment.load(tmp_path).path == file


def test_what_is_not_written_has_its_default(tmp_path: Path) -> None:
    found = environment.load(write(tmp_path)).environment
    assert (found.serving.mode, found.serving.max_lora_rank, found.serving.when_base_changes, found.retention.keep) == (
        "lora", 64, "wait-for-adapters", 5)


@pytest.mark.parametrize(("tokenizer", "source"), [
    ({}, Source(source="hf://HuggingFaceTB/SmolLM2-135M-Instruct", revision=COMMIT)),
    ({"source": "hf://acme/tokenizer", "revision": "0" * 40}, Source(source="hf://acme/tokenizer", revision="0" * 40)),
    ({"source": "file:tokenizer", "sha256": SHA256}, Source(source="file:tokenizer", sha256=SHA256)),
])
def test_the_tokenizer_is_the_base_models_unless_another_is_named(
        tmp_path: Path, tokenizer: dict[str, str], source: Source) -> None:
    found = environment.load(write(tmp_path, tokenizer=tokenizer)).environment
    assert found.tokenizer_source == source
    named = {"base_model": found.base_model, "tokenizer": source, "reference_model": found.reference_model}
    if not tokenizer:
        del named["tokenizer"]
    assert found.sources() == named


@pytest.mark.parametrize(("changes", "key"), [
    ({"base_model": {"source": "hf://acme/a"}}, "base_model"),
    ({"tokenizer": {"source": "hf://acme/b"}}, "tokenizer"),
    ({"reference_model": {"source": "hf://acme/c", "revision": "main"}}, "reference_model")])
def test_every_source_must_be_pinned_except_for_pin_itself(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    file = write(tmp_path, **changes)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if text.startswith(key))
    with pytest.raises(UserError) as raised:
        environment.load(file)
    assert str(raised.value).startswith(f"{file}:{line}: {key}: {changes[key]['source']} is not pinned: ")
    assert str(raised.value).endswith(f"Run: python -m jobs pin {tmp_path}")
    assert environment.load(file, pinned=False).environment.sources()[key].source == changes[key]["source"]


@pytest.mark.parametrize("rank", [*SERVABLE_RANKS, 2, 7, 24, 63, 513])
def test_only_ranks_that_vllm_serves_are_taken(rank: int) -> None:
    if rank in SERVABLE_RANKS:
        assert environment.Serving(max_lora_rank=rank).max_lora_rank == rank
    else:
        with pytest.raises(ValueError, match=f"max_lora_rank {rank} is not one vLLM serves; allowed: 1, 8, 16,"):
            environment.Serving(max_lora_rank=rank)


def test_a_folder_without_the_file_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        environment.load(tmp_path)
    assert str(raised.value) == (f"{tmp_path}/environment.yaml: no such file. Name an overlay's folder, or its "
                                 "environment.yaml")


def test_a_path_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a+: cannot be read: File name too long"):
        environment.load(tmp_path / ("a" * 300))


def test_a_file_without_a_mapping_names_the_key_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "environment.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="must hold a mapping with the key `base_model` and others, not a list"):
        environment.load(tmp_path)


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"tokenize": False}, "chat_template: tokenize cannot be set"),
    ({"messages": "a", "tools": "b"}, "chat_template: messages, tools cannot be set"),
    ({"names": ["a"]}, "chat_template.names"),
    ({"number": float("nan")}, "chat_template.number"),
    ("enable_thinking", "chat_template")])
def test_arguments_of_the_chat_template_are_validated(tmp_path: Path, arguments: Any, problem: str) -> None:
    file = write(tmp_path, chat_template=arguments)
    with pytest.raises(UserError) as raised:
        environment.load(file)
    assert f": {problem}" in str(raised.value)


@pytest.mark.parametrize(("value", "shown"), [
    (["a"], "a list: "), ({"b": 1}, ""), (None, "None: "), (float("inf"), "inf: ")])
def test_an_argument_of_the_chat_template_is_refused_once_by_its_key(tmp_path: Path, value: Any, shown: str) -> None:
    file = write(tmp_path, chat_template={"first": 1, "names": value})
    with pytest.raises(UserError) as raised:
        environment.load(file)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if text.startswith("  names:"))
    assert str(raised.value) == (
        f"{file}:{line}: chat_template.names: {shown}must be true, false, a finite number or a text")


def test_arguments_of_the_chat_template_keep_their_types(tmp_path: Path) -> None:
    arguments = {"enable_thinking": False, "level": 1, "share": 0.5, "date_string": "26 Jul 2024"}
    found = environment.load(write(tmp_path, chat_template=arguments)).environment.chat_template
    assert found == arguments and [type(value) for value in found.values()] == [bool, int, float, str]


@pytest.mark.parametrize("to", ["oci://registry.example.com/team/adapters", "oci://localhost:5000/a", "s3://bucket",
                                "s3://bucket/team/adapters"])
def test_publication_names_a_place_and_changes_no_digest(to: str) -> None:
    values = build_pipeline.environment()
    found = Environment(**values, publication=Publication(to=to))
    assert found.publication and (found.publication.to, found.publication.answers) == (to, False)
    assert plan_environment(found) == plan_environment(Environment(**values))


@pytest.mark.parametrize("to", ["oci://registry.example.com/team:v1", "oci://registry.example.com", "s3://", "s3:///a",
                                "s3://bucket/a/", "https://registry.example.com/team", "registry.example.com/team",
                                "oci://registry.example.com/Team", f"oci://r.example.com/a@sha256:{'0' * 64}"])
def test_publication_to_what_is_no_place_is_refused(to: str) -> None:
    with pytest.raises(ValidationError, match="must be oci://REGISTRY/PREFIX"):
        Publication(to=to)


# --- signing ----------------------------------------------------------------------------------------------------------


def test_without_signing_nothing_is_trusted_and_nothing_is_asked_for() -> None:
    assert build_pipeline.build().environment.trusted_keys == ()


def test_the_trusted_keys_are_read_however_their_pem_is_wrapped(tmp_path: Path) -> None:
    """A digest over the key names it in a signature."""
    one, two = pair("one").public, pair("two").public
    body = "".join(two.splitlines()[1:-1])
    wrapped = f"\n-----BEGIN PUBLIC KEY-----\n{body[:20]}\n{body[20:]}\n-----END PUBLIC KEY-----"
    found = environment.load(write(tmp_path, signing={"public_keys": [one, wrapped]})).environment
    assert found.trusted_keys == (one, two)


def test_signing_is_in_no_digest(tmp_path: Path) -> None:
    """Who vouches for an artifact changes nothing in it: switching it on trains nothing again by another name."""
    assert plan(build_pipeline.build()) == plan(build_pipeline.build(signing={"public_keys": [pair().public]}))


OTHER_KINDS = {
    "RSA": rsa.generate_private_key(65537, 2048), "Ed25519": ed25519.Ed25519PrivateKey.generate(),
    "secp256k1": ec.generate_private_key(ec.SECP256K1())}


def public(key: Any) -> str:
    text: bytes = key.public_key().public_bytes(serialization.Encoding.PEM,
                                                serialization.PublicFormat.SubjectPublicKeyInfo)
    return text.decode()


@pytest.mark.parametrize(("signing", "where", "problem"), [
    ({"public_keys": [pair().public, pair("two").private]}, "public_keys.1", "is a private key"),
    ({"public_keys": pair().private}, "public_keys", "is a private key"),
    (pair().private, "public_keys", "is a private key"),
    ({"public_keys": [pair().public], "private_key": pair().private}, "private_key", "unknown key"),
    ({"public_keys": []}, "public_keys", "must be a list of public keys in PEM"),
    ({"public_keys": pair().public}, "public_keys", "must be a list of public keys in PEM"),
    ({"public_keys": [5]}, "public_keys", "must be a list of public keys in PEM"),
    ({"public_keys": [{"key": pair().private}]}, "public_keys", "is a private key"),
    ({}, "public_keys", "must be a list of public keys in PEM"),
    ({"public_keys": [pair().public, pair().public]}, "public_keys.1", "is in the list twice"),
    ({"public_keys": [pair().public + pair("two").public]}, "public_keys.0", "must be one public key in PEM"),
    ({"public_keys": ["signing.pub"]}, "public_keys.0", "must be one public key in PEM"),
    ({"public_keys": [pair().public[:60]]}, "public_keys.0", "is no public key in PEM"),
    ({"public_keys": [pair().public.replace("M", "é")]}, "public_keys.0", "is no public key in PEM"),
    *(({"public_keys": [public(key)]}, "public_keys.0", f"is a key of the kind {name}")
      for name, key in OTHER_KINDS.items()),
])
def test_a_wrong_key_is_named_by_file_and_line_and_never_quoted(tmp_path: Path, signing: Any, where: str,
                                                                 problem: str) -> None:
    file = write(tmp_path, signing=signing)
    lines = file.read_text().splitlines()
    with pytest.raises(UserError) as raised:
        environment.load(file)
    first = str(raised.value).splitlines()[0]
    assert re.match(rf"{re.escape(str(file))}:\d+: signing\.{re.escape(where)}: ", first)
    line = int(first.removeprefix(f"{file}:").partition(":")[0])
    assert line >= next(n for n, text in enumerate(lines, 1) if text.startswith("signing:"))
    assert problem in first
    for secret in (pair().private, pair("two").private):
        assert secret.splitlines()[1][:20] not in str(raised.value)
