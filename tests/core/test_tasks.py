"""Promises of tasks as they are declared: the options of a check, what each record needs, and what names a score."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.core.tasks import CHECKS, HarnessFile, Task, check_names

SHA256 = "5b1f" * 16
OPTIONS: dict[str, Any] = {"case_sensitive": False, "normalize": True, "pattern": "x", "schema": {"type": "object"},
                           "fence": True, "labels": ["a", "b"],
                           "lm_eval": {"source": "file:task.yaml", "sha256": SHA256}}


def task(check: str, **options: Any) -> Task:
    needed = {"lm_eval": OPTIONS["lm_eval"]} if check == "lm_eval" else {}
    return Task.model_validate({"name": "city", "source": "file:city.jsonl", "sha256": SHA256, "check": check,
                                **needed, **options})


@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("check", list(CHECKS))
def test_a_check_takes_its_own_options_and_no_others(check: str, option: str) -> None:
    given = {option: OPTIONS[option]}
    if option in CHECKS[check].options:
        assert task(check, **given)
    else:
        with pytest.raises(ValueError, match=f"is no option of the check {check}; its options: "):
            task(check, **given)


@pytest.mark.parametrize(("of", "needs"), [
    (task("exact"), "expected"), (task("contains"), "expected"), (task("rougeL"), "expected"),
    (task("label_f1"), "label"), (task("label_f1", labels=["a", "b"]), "label"), (task("lm_eval"), None),
    (task("regex"), "pattern"), (task("regex", pattern="x"), None), (task("json_schema"), "schema"),
    (task("json_schema", schema={}), None)])
def test_a_record_needs_what_no_option_has_for_all(of: Task, needs: str | None) -> None:
    assert of.needs == needs


@pytest.mark.parametrize(("of", "identity"), [
    (task("exact"), {"name": "city", "check": "exact"}),
    (task("exact", case_sensitive=True, normalize=False), {"name": "city", "check": "exact"}),
    (task("exact", case_sensitive=False, max_new_tokens=7),
     {"name": "city", "check": "exact", "case_sensitive": False, "max_new_tokens": 7}),
    (task("json_schema", schema={"type": "null"}, fence=True),
     {"name": "city", "check": "json_schema", "schema": {"type": "null"}, "fence": True}),
    (task("label_f1", labels=["b", "a"]), {"name": "city", "check": "label_f1", "labels": ["a", "b"]}),
    (task("exact", source="hf://datasets/a/b", sha256=None, revision="1" * 40), {"name": "city", "check": "exact"}),
    (task("lm_eval"), {"name": "city", "check": "lm_eval"})])
def test_what_decides_a_score_names_it_however_it_is_written(of: Task, identity: dict[str, Any]) -> None:
    """Options with their default are left out, and so are sources, which are named by their pins."""
    assert of.identity() == identity


def test_the_gate_knows_a_task_by_its_name() -> None:
    assert task("exact").key == "tasks.city"


@pytest.mark.parametrize(("options", "message"), [
    ({"check": "exact", "sha256": None, "revision": "main"}, "is not pinned by `revision`"),
    ({"check": "exact", "source": "builtin:tiny"}, "is not a source"),
    ({"check": "json_schema", "schema": {"const": float("nan")}}, "is not JSON: "),
    ({"check": "lm_eval", "lm_eval": None}, "the check lm_eval needs `lm_eval`: {source: file:TASK.yaml}"),
    ({"check": "lm_eval", "lm_eval": {"source": "builtin:tiny"}}, "is not a source"),
    ({"check": "lm_eval", "lm_eval": {"source": "file:a.yaml", "revision": "main"}}, "is not pinned by `revision`"),
    ({"check": "lm_eval", "lm_eval": OPTIONS["lm_eval"] | {"metric": "bleu"}}, "'acc', 'acc_norm' or 'exact_match'")])
def test_what_is_no_task_is_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        task(**options)
    assert message in str(raised.value)


def test_a_pin_in_a_source_must_be_the_same_as_the_pin_beside_it() -> None:
    source = f"oci://registry.example.com/tasks@sha256:{SHA256}"
    assert task("exact", source=source).pin == SHA256
    with pytest.raises(ValueError, match="names another digest than `sha256`"):
        task("exact", source=source, sha256="0" * 64)
    assert HarnessFile(source=source, sha256=SHA256).pin == SHA256
    with pytest.raises(ValueError, match="names another digest than `sha256`"):
        HarnessFile(source=source, sha256="0" * 64)


def test_the_second_of_two_tasks_with_one_name_is_refused() -> None:
    other = task("exact", name="other")
    assert check_names([task("exact"), other]) == [task("exact"), other]
    with pytest.raises(ValueError, match="city is the name of another task already"):
        check_names([task("exact"), other, task("contains")])
