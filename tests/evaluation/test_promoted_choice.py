"""Which adapter a new one is compared with, and with what it is measured: decided from manifests, without a model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts, promotion
from jobs.core.artifacts import Spec
from jobs.core.errors import UserError
from jobs.core.plan import Plan, merged_model, plan, scores_of_adapter
from jobs.evaluation import promoted
from jobs.evaluation.promoted import Comparison
from tests.build_models import write_pipeline
from tests.build_signing import pair, sign

VOLUME = "fine-tuned-model"
NO_WORSE: dict[str, Any] = {"bits_per_byte": {"max_ratio": 1000.0, "than": "promoted"}}


def publish(volumes: Path, *specs: Spec) -> None:
    """Artifacts with a made-up file: only their manifests are read here."""
    def write(draft: Path) -> None:
        (draft / "file").write_text("x")

    for spec in specs:
        artifacts.publish(spec, volumes, write, keep=9)


@pytest.fixture
def before(tmp_path: Path) -> Plan:
    """The plan of an adapter that is there with all that it was trained with."""
    wanted = plan(write_pipeline(tmp_path, gate=NO_WORSE).pipeline)
    publish(tmp_path / "volumes", wanted.base_model, wanted.tokenizer, wanted.adapter)
    return wanted


def find(place: Path, before: Plan, **changes: Any) -> tuple[promoted.Promoted, Plan]:
    """The promoted adapter as a changed pipeline file finds it, and the plan of that file."""
    loaded = write_pipeline(place, **{"gate": NO_WORSE, "seed": 1, **changes})
    wanted = plan(loaded.pipeline)
    return promoted.find(loaded.pipeline, wanted, place / "volumes", before.adapter.digest), wanted


# --- which one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("promotions", "gate", "reason"), [
    ([], NO_WORSE, "no adapter is promoted as hotels yet, so there is nothing to compare with"),
    (["other"], {"perplexity": {"max": 9.0}}, "no rule asks for it"),
    (["other"], NO_WORSE, None),
    (["own"], NO_WORSE, "this adapter is the promoted one, so there is nothing to compare with"),
    (["own", "other"], NO_WORSE, r"this adapter was promoted before \(20.*\): a revert needs no comparison"),
    (["other", "third"], NO_WORSE, None),
])
def test_only_an_adapter_that_was_never_promoted_is_compared_and_with_the_one_that_is(
        tmp_path: Path, promotions: list[str], gate: dict[str, Any], reason: str | None) -> None:
    pipeline = write_pipeline(tmp_path, gate=gate).pipeline
    wanted = plan(pipeline)
    digests = {"own": wanted.adapter.digest, "other": "a" * 16, "third": "b" * 16}
    for name in promotions:
        promotion.promote(tmp_path / VOLUME, "hotels", digests[name], "e" * 16)
    promotion.promote(tmp_path / VOLUME, "another-name", digests["own"], "e" * 16)
    found = promoted.comparison(pipeline, wanted, tmp_path)
    if reason is None:
        assert found == Comparison(digests[promotions[-1]])
    else:
        assert found.adapter is None and re.fullmatch(reason, found.reason or "")


@pytest.mark.parametrize(("compared", "passed", "now", "outdated"), [
    ("a", True, "a", False), ("a", False, "a", False), (None, True, None, False), (None, False, None, False),
    ("a", True, "b", True), ("a", False, "b", True), (None, True, "b", True), (None, False, "b", True),
    ("a", True, None, False),  # it passed and needs no comparison any more
    ("a", False, None, True),
])
def test_a_verdict_is_made_again_if_it_compared_with_another_adapter_than_it_would_now(
        compared: str | None, passed: bool, now: str | None, outdated: bool) -> None:
    evaluation = {"passed": passed, **({"promoted": {"digest": compared}} if compared else {})}
    assert promoted.outdated(evaluation, Comparison(now)) is outdated


# --- measured with what ---------------------------------------------------------------------------------------------


def test_on_the_same_data_the_promoted_adapter_has_its_scores_already(tmp_path: Path, before: Plan) -> None:
    found, wanted = find(tmp_path, before)
    volumes, scored, digest = tmp_path / "volumes", found.scored, before.adapter.digest
    assert wanted.adapter.digest != digest and scored.scores.digest == before.adapter_scores.digest
    assert (found.adapter, found.base_model) == (digest, before.base_model.digest)
    assert found.to_json("hotels") == {"name": "hotels", "digest": digest, "base_model": before.base_model.digest}
    assert (scored.name, scored.model, scored.tokenizer, scored.adapter) == (
        f"hotels@{digest}", before.base_model.path(volumes), before.tokenizer.path(volumes),
        before.adapter.path(volumes))
    assert scored.inputs == [wanted.base_model, wanted.tokenizer, wanted.encoded_dataset]
    assert scored.encoded == wanted.encoded_dataset.path(volumes) / "holdout.arrow"
    assert scored.base_scores == wanted.base_scores.path(volumes)
    assert scored.private and scored.prove and scored.template == {}


@pytest.mark.parametrize(("changes", "private", "reads_encoded"), [
    ({}, True, True), ({"epochs": 9}, True, True),
    ({"max_length": 100}, False, True),  # encoded otherwise, in the same format
    ({"template": {"enable_thinking": False}}, False, False),
    ({"base": "builtin:tiny"}, False, False),
])
def test_its_privacy_is_measured_on_what_it_was_trained_on_and_it_reads_what_is_in_its_format(
        tmp_path: Path, before: Plan, changes: dict[str, Any], private: bool, reads_encoded: bool) -> None:
    found, wanted = find(tmp_path, before, **changes)
    assert (found.scored.private, found.scored.encoded is not None) == (private, reads_encoded)
    assert (wanted.encoded_dataset in found.scored.inputs) is reads_encoded
    assert (wanted.base_model in found.scored.inputs) is ("base" not in changes), "nothing brings another one"
    assert ("encoded_dataset" in found.scored.scores.inputs) is reads_encoded
    assert found.scored.scores.inputs["model"] == before.base_model.digest
    assert found.scored.scores.inputs["tokenizer"] == before.tokenizer.digest
    assert found.scored.scores.spec["chat_template"] == {}


def test_it_keeps_the_chat_format_that_it_was_trained_with(tmp_path: Path) -> None:
    template = {"date_string": "26 Jul 2024"}
    wanted = plan(write_pipeline(tmp_path, gate=NO_WORSE, template=template).pipeline)
    publish(tmp_path / "volumes", wanted.base_model, wanted.tokenizer, wanted.adapter)
    found, _ = find(tmp_path, wanted)
    assert (found.scored.template, found.scored.encoded) == (template, None)
    assert found.scored.scores.spec["chat_template"] == template
    same, _ = find(tmp_path, wanted, template=template)
    assert same.scored.encoded is not None


@pytest.mark.parametrize("kind", ["base_model", "tokenizer"])
def test_what_it_was_trained_with_must_be_there_unless_it_is_on_its_way_or_no_longer_needed(
        tmp_path: Path, before: Plan, kind: str) -> None:
    volumes = tmp_path / "volumes"
    gone = getattr(before, kind).path(volumes)
    shutil.rmtree(gone)
    find(tmp_path, before)  # the pipeline file desires it too
    with pytest.raises(UserError) as refused:
        find(tmp_path, before, base="builtin:tiny")
    assert str(refused.value) == (
        f"evaluation.gate compares with hotels@{before.adapter.digest}, which is promoted (than: promoted), but {gone} "
        "is not there. It was trained with that, and cannot be measured on this data without it. Relocate that again "
        "(git revert brings it back), or take the rules `than: promoted` out for this change. Nothing is promoted")
    loaded = write_pipeline(tmp_path, gate=NO_WORSE, seed=1, base="builtin:tiny")
    gone.mkdir()  # without a manifest
    with pytest.raises(UserError, match=f"than: promoted.*but it is damaged: {gone}"):
        find(tmp_path, before, base="builtin:tiny")
    gone.rmdir()
    base, tokenizer = before.base_model.digest, before.tokenizer.digest
    publish(volumes, scores_of_adapter(plan(loaded.pipeline), before.adapter.digest, model=base, tokenizer=tokenizer,
                                       chat_template={}, encoded=False, private=False))
    assert find(tmp_path, before, base="builtin:tiny")[0].base_model == base


def test_an_adapter_that_is_gone_damaged_or_not_signed_is_one_line_with_a_way_out(tmp_path: Path, before: Plan) -> None:
    volumes, folder = tmp_path / "volumes", before.adapter.path(tmp_path / "volumes")
    start = (f"evaluation.gate compares with hotels@{before.adapter.digest}, which is promoted (than: promoted), but ")
    end = (f". Restore it, or remove {volumes / VOLUME / 'promoted' / 'hotels'} to compare with nothing. "
           "Nothing is promoted")

    def message(**changes: Any) -> str:
        with pytest.raises(UserError) as refused:
            find(tmp_path, before, **changes)
        text = str(refused.value)
        assert text.startswith(start) and text.endswith(end) and "\n" not in text
        return text[len(start):-len(end)]

    signing = {"public_keys": [pair().public]}
    assert message(signing=signing).startswith(f"{folder}: is not signed")
    sign(folder, pair())
    find(tmp_path, before, signing=signing)
    (folder / "file").write_text("y")
    assert message().startswith("it is damaged: ") and str(folder) in message()
    shutil.rmtree(folder)
    assert message() == f"{folder} is not there"


def test_in_mode_merged_it_is_measured_as_it_is_served_where_it_was_merged(tmp_path: Path, before: Plan) -> None:
    volumes, digest = tmp_path / "volumes", before.adapter.digest
    merged = merged_model(digest, before.base_model.digest)
    found, _ = find(tmp_path, before, mode="merged")
    assert found.scored.adapter == before.adapter.path(volumes), "it was promoted in mode lora"
    publish(volumes, merged)
    assert find(tmp_path, before)[0].scored.model == before.base_model.path(volumes), "now the mode is lora"
    shutil.rmtree(before.base_model.path(volumes))  # which is not needed
    found, wanted = find(tmp_path, before, mode="merged", max_length=100)
    scored = found.scored
    assert (scored.model, scored.adapter) == (merged.path(volumes), None)
    assert scored.scores.inputs["model"] == merged.digest and found.base_model == before.base_model.digest
    assert wanted.base_model not in scored.inputs and wanted.tokenizer in scored.inputs


def test_a_merged_model_must_be_signed_and_relocated_models_never_are(tmp_path: Path, before: Plan) -> None:
    volumes, signing = tmp_path / "volumes", {"public_keys": [pair().public]}
    sign(before.adapter.path(volumes), pair())
    find(tmp_path, before, base="builtin:tiny", signing=signing)
    merged = merged_model(before.adapter.digest, before.base_model.digest)
    publish(volumes, merged)
    with pytest.raises(UserError, match=f"{merged.path(volumes)}: is not signed"):
        find(tmp_path, before, base="builtin:tiny", signing=signing, mode="merged")
    sign(merged.path(volumes), pair())
    find(tmp_path, before, base="builtin:tiny", signing=signing, mode="merged")
