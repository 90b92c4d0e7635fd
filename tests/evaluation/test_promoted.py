"""A rule `than: promoted` compares with what clients get now, and with nothing else; a revert needs no comparison."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.core import artifacts, models, promotion
from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import Plan, plan
from jobs.evaluation import evaluate, promoted, scoring
from jobs.training import merge
from tests.build_models import PASSING, published_pipeline, tiny_adapter, tiny_llama

VOLUME = "fine-tuned-model"
NO_WORSE: dict[str, Any] = {"bits_per_byte": {"max_ratio": 1000.0, "than": "promoted"}}
BETTER: dict[str, Any] = {"bits_per_byte": {"max_ratio": 1e-6, "than": "promoted"}}
PER_TOKEN: dict[str, Any] = {"perplexity": {"max_ratio": 1000.0, "than": "promoted"}}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: Any) -> Path:
    """A pipeline whose first adapter is promoted; tests copy it."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    evaluate.run(*published_pipeline(folder, gate=NO_WORSE), 0)
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that get measured from here on, and the folders of the models that are loaded."""
    names: list[str] = []
    measure, load = scoring.measure, models.load_model

    def watch(model: Any, tokenizer: Any, material: Any, name: str) -> Any:
        names.append(name)
        return measure(model, tokenizer, material, name)

    def watch_load(path: Path, **options: Any) -> Any:
        if not options:  # with options, it is merged
            names.append(f"load {path.parent.name}/{path.name}")
        return load(path, **options)

    monkeypatch.setattr(scoring, "measure", watch)
    monkeypatch.setattr(models, "load_model", watch_load)
    return names


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def served(volumes: Path) -> str | None:
    current = promotion.current(volumes / VOLUME, "hotels")
    return current.adapter if current else None


def evaluation(of: LoadedPipeline, volumes: Path) -> Any:
    """The content of the evaluation artifact, verified."""
    return read(artifacts.read(plan(of.pipeline).evaluation.path(volumes)).path / "evaluation.json")


def desired(folder: Path, **settings: Any) -> tuple[LoadedPipeline, Path, Plan]:
    loaded, volumes = published_pipeline(folder, **settings)
    return loaded, volumes, plan(loaded.pipeline)


def first(folder: Path) -> Plan:
    """The plan of the adapter that `evaluated` promoted."""
    return desired(folder, gate=NO_WORSE)[2]


def test_the_first_adapter_has_nothing_to_beat(folder: Path) -> None:
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE)
    found = evaluation(loaded, volumes)
    (check,) = found["gate"]
    assert check["outcome"] == "passed" and "no adapter is promoted as hotels yet" in check["description"]
    assert "promoted" not in found and found["scores"].keys() == {"base", "fine_tuned", "reference"}
    assert served(volumes) == wanted.adapter.digest


def test_a_later_adapter_is_compared_with_the_promoted_one_which_is_not_measured_again(
        folder: Path, measured: list[str]) -> None:
    before = first(folder)
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE, seed=1)
    evaluate.run(loaded, volumes, 0)
    found = evaluation(loaded, volumes)
    assert [name for name in measured if "@" in name] == [f"hotels@{wanted.adapter.digest}"]
    assert found["promoted"] == {"name": "hotels", "digest": before.adapter.digest,
                                 "base_model": before.base_model.digest}
    assert list(found["scores"]) == list(found["intervals"]) == ["base", "fine_tuned", "promoted", "reference"]
    assert found["scores"]["promoted"] == read(before.adapter_scores.path(volumes) / "scores.json")
    (check,) = found["gate"]
    assert check["than"] == "promoted" and check["value"] == pytest.approx(
        found["scores"]["fine_tuned"]["bits_per_byte"] / found["scores"]["promoted"]["bits_per_byte"])
    assert served(volumes) == wanted.adapter.digest
    runs = volumes / VOLUME / "tensorboard" / "hotels" / wanted.adapter.digest / "evaluation"
    assert {run.name for run in runs.iterdir()} == {"base", "fine-tuned", "promoted", "reference"}


def test_an_adapter_that_is_not_better_than_the_promoted_one_is_rejected(folder: Path) -> None:
    before = first(folder)
    loaded, volumes, _ = desired(folder, gate=BETTER, seed=1)
    evaluate.run(loaded, volumes, 0)
    (check,) = evaluation(loaded, volumes)["gate"]
    assert check["outcome"] == "failed" and "fine-tuned / promoted is" in check["description"]
    assert served(volumes) == before.adapter.digest


def test_on_other_data_the_promoted_adapter_is_measured_with_the_load_of_the_base_model(
        folder: Path, measured: list[str]) -> None:
    """A second copy of the base model might not fit into memory. Its adapter must not leak into another's scores."""
    before = first(folder)
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE, seed=1, max_length=100)
    evaluate.run(loaded, volumes, 0)
    assert measured == [
        f"load {wanted.base_model}", "file:base", f"hotels@{wanted.adapter.digest}", f"hotels@{before.adapter.digest}",
        f"load {wanted.reference_model}", "file:reference"]
    scores = evaluation(loaded, volumes)["scores"]
    was = read(before.adapter_scores.path(volumes) / "scores.json")
    assert scores["promoted"]["perplexity"] == pytest.approx(was["perplexity"], rel=1e-5)
    alone = desired(folder, gate=PASSING, seed=1, max_length=100)[2]
    shutil.rmtree(alone.adapter_scores.path(volumes))
    evaluate.run(*published_pipeline(folder, gate=PASSING, seed=1, max_length=100), 0)
    again = read(alone.adapter_scores.path(volumes) / "scores.json")
    assert scores["fine_tuned"]["perplexity"] == pytest.approx(again["perplexity"], rel=1e-6)
    assert scores["fine_tuned"]["perplexity"] != pytest.approx(was["perplexity"], rel=1e-3)


def test_the_promoted_adapter_itself_passes_a_new_gate_without_a_comparison(folder: Path) -> None:
    loaded, volumes, wanted = desired(folder, gate=BETTER)
    evaluate.run(loaded, volumes, 0)
    found = evaluation(loaded, volumes)
    assert "this adapter is the promoted one" in found["gate"][0]["description"] and "promoted" not in found
    assert found["passed"] and served(volumes) == wanted.adapter.digest


def test_a_revert_is_an_order_and_needs_no_comparison(folder: Path, measured: list[str]) -> None:
    """The first adapter is asked for again, by a gate that would reject it: a line of the history that was half
    written does not hide that it was promoted."""
    evaluate.run(*published_pipeline(folder, gate=NO_WORSE, seed=1), 0)
    history = folder / "volumes" / VOLUME / "promoted" / "hotels.history.jsonl"
    with history.open("a") as lines:
        lines.write('{"adapter": "81e9')
    measured.clear()
    loaded, volumes, wanted = desired(folder, gate=BETTER)
    evaluate.run(loaded, volumes, 0)
    found = evaluation(loaded, volumes)
    assert "this adapter was promoted before (20" in found["gate"][0]["description"] and "promoted" not in found
    assert served(volumes) == wanted.adapter.digest and measured == []


def test_a_promoted_adapter_on_another_base_model_is_measured_on_its_own(folder: Path, measured: list[str]) -> None:
    """The tokens are the same, so that perplexities can be compared although the tokenizers are two artifacts."""
    before = first(folder)
    loaded, volumes, wanted = desired(folder, gate=PER_TOKEN, base="builtin:tiny", base_model=other_llama)
    evaluate.run(loaded, volumes, 0)
    assert measured == [
        f"load {wanted.base_model}", "builtin:tiny", f"hotels@{wanted.adapter.digest}", f"load {before.base_model}",
        f"hotels@{before.adapter.digest}"]
    found = evaluation(loaded, volumes)
    was = read(before.adapter_scores.path(volumes) / "scores.json")
    assert found["promoted"]["base_model"] == before.base_model.digest != wanted.base_model.digest
    assert found["scores"]["promoted"]["perplexity"] == pytest.approx(was["perplexity"], rel=1e-5)
    assert served(volumes) == wanted.adapter.digest


def other_llama(folder: Path, vocabulary: int = 320) -> None:
    tiny_llama(folder, vocabulary=vocabulary, seed=7)


def test_perplexities_of_other_tokens_are_refused_before_the_adapter_is_there(folder: Path) -> None:
    first(folder)
    settings: dict[str, Any] = {"base": "builtin:tiny", "base_model": lambda folder: other_llama(folder, 300),
                                "vocabulary": 300}
    loaded, volumes, _ = desired(folder, gate=PER_TOKEN, without=("adapter",), **settings)
    with pytest.raises(UserError, match=r"gate\.perplexity: the promoted model has another tokenizer.*bits_per_byte"):
        evaluate.run(loaded, volumes, 0)
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE, **settings)
    evaluate.run(loaded, volumes, 0)
    assert served(volumes) == wanted.adapter.digest, "bits per byte are comparable"


def test_so_are_perplexities_of_a_reference_model_with_other_tokens(folder: Path) -> None:
    rule = {"perplexity": {"max_ratio": 2.0, "than": "reference"}}
    loaded, volumes, _ = desired(folder, gate=rule, seed=3, without=("adapter",))
    with pytest.raises(UserError, match=r"gate\.perplexity: the reference model has another tokenizer.*bits_per_byte"):
        evaluate.run(loaded, volumes, 0)


@pytest.mark.parametrize("kind", ["base_model", "tokenizer"])
def test_without_the_base_model_of_the_promoted_adapter_nothing_is_decided(folder: Path, kind: str) -> None:
    before = first(folder)
    loaded, volumes, _ = desired(folder, gate=NO_WORSE, base="builtin:tiny", base_model=other_llama)
    gone = getattr(before, kind).path(volumes)
    shutil.rmtree(gone)
    with pytest.raises(UserError) as refused:
        evaluate.run(loaded, volumes, 0)
    message = str(refused.value)
    assert f"{gone} is not there" in message and f"hotels@{before.adapter.digest}" in message
    assert "git revert" in message and "Nothing is promoted" in message and "\n" not in message
    assert served(volumes) == before.adapter.digest


def test_what_was_measured_before_needs_no_base_model(folder: Path) -> None:
    """With its scores on this data there, nothing is loaded: a change of the gate is decided from them."""
    before = first(folder)
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE, base="builtin:tiny", base_model=other_llama)
    evaluate.run(loaded, volumes, 0)
    promotion.promote(volumes / VOLUME, "hotels", before.adapter.digest, before.evaluation.digest)
    (volumes / VOLUME / "promoted" / "hotels.history.jsonl").unlink()
    shutil.rmtree(before.base_model.path(volumes))
    shutil.rmtree(before.tokenizer.path(volumes))
    loaded, volumes, wanted = desired(folder, gate={"bits_per_byte": {"max_ratio": 500.0, "than": "promoted"}},
                                      base="builtin:tiny")
    evaluate.run(loaded, volumes, 0)
    assert evaluation(loaded, volumes)["promoted"]["digest"] == before.adapter.digest
    assert served(volumes) == wanted.adapter.digest


def damage(adapter: Path) -> None:
    with (adapter / "adapter_model.safetensors").open("ab") as weights:
        weights.write(b"x")


@pytest.mark.parametrize(("harm", "message"), [(damage, "adapter_model.safetensors was changed"),
                                               (shutil.rmtree, "is not there")])
def test_a_damaged_promoted_adapter_is_reported_before_anything_is_waited_for(
        folder: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], message: str) -> None:
    before = first(folder)
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE, seed=1, without=("adapter",))
    shutil.rmtree(wanted.dataset.path(volumes))
    harm(before.adapter.path(volumes))
    assert main(["--pipeline", str(loaded.path), "--volumes", str(volumes), "--wait-seconds", "0", "evaluate"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "hotels@" in line]
    assert message in line and str(before.adapter.path(volumes)) in line
    assert f"remove {volumes / VOLUME / 'promoted' / 'hotels'} to compare with nothing" in line
    assert served(volumes) == before.adapter.digest


@pytest.mark.parametrize("content", ["not json", '{"adapter": "../..", "evaluation": "x", "at": "y"}', None])
def test_an_unreadable_promotion_is_reported_before_anything_is_waited_for(
        folder: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    loaded, volumes, _ = desired(folder, gate=NO_WORSE, seed=1, without=("adapter",))
    pointer = volumes / VOLUME / "promoted" / "hotels"
    pointer.unlink()
    if content is None:
        os.mkfifo(pointer)
    else:
        pointer.write_text(content)
    assert main(["--pipeline", str(loaded.path), "--volumes", str(volumes), "--wait-seconds", "0", "evaluate"]) == 2
    assert f"{pointer}: " in (errors := capsys.readouterr().err) and "the promotion is damaged" in errors


def test_a_promotion_while_another_is_compared_with_is_noticed_and_compared_with(
        folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Retention removes the one before at the same moment, since nothing protects it any more."""
    before, (_, volumes, between) = first(folder), desired(folder, gate=NO_WORSE, seed=1)
    loaded, _, wanted = desired(folder, gate=NO_WORSE, seed=2, max_length=100)
    measure = scoring.measure

    def promotes(model: Any, tokenizer: Any, material: Any, name: str) -> Any:
        if name == "file:base":
            promotion.promote(volumes / VOLUME, "hotels", between.adapter.digest, between.evaluation.digest)
            shutil.rmtree(before.adapter.path(volumes))
        return measure(model, tokenizer, material, name)

    monkeypatch.setattr(scoring, "measure", promotes)
    with caplog.at_level("INFO", "jobs"):
        evaluate.run(loaded, volumes, 0)
    assert evaluation(loaded, volumes)["promoted"]["digest"] == between.adapter.digest
    assert "another adapter was promoted as hotels meanwhile: comparing again" in caplog.text
    assert served(volumes) == wanted.adapter.digest


def test_no_verdict_is_published_that_compares_with_a_former_adapter(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving follows a published verdict within a second: it must be about what is promoted at that moment."""
    first(folder)
    _, volumes, between = desired(folder, gate=NO_WORSE, seed=1)
    loaded, _, wanted = desired(folder, gate=NO_WORSE, seed=2)
    conclude = evaluate.conclude
    seen: list[bool] = []

    def late(*arguments: Any) -> Any:
        fill = conclude(*arguments)
        if not seen:
            promotion.promote(volumes / VOLUME, "hotels", between.adapter.digest, between.evaluation.digest)
        seen.append(wanted.evaluation.path(volumes).exists())
        return fill

    monkeypatch.setattr(evaluate, "conclude", late)
    evaluate.run(loaded, volumes, 0)
    assert seen == [False, False]
    assert evaluation(loaded, volumes)["promoted"]["digest"] == between.adapter.digest


def test_a_rejection_is_decided_again_when_another_adapter_is_promoted_by_then(
        folder: Path, measured: list[str]) -> None:
    loaded, volumes, _ = desired(folder, gate=BETTER, seed=1)
    evaluate.run(loaded, volumes, 0)
    evaluate.run(loaded, volumes, 0)
    assert evaluation(loaded, volumes)["passed"] is False
    assert measured[1:] == [f"hotels@{plan(loaded.pipeline).adapter.digest}"], "once, with the first run"
    other, _, wanted = desired(folder, gate=PASSING, seed=2)
    evaluate.run(other, volumes, 0)
    evaluate.run(loaded, volumes, 0)
    assert evaluation(loaded, volumes)["promoted"]["digest"] == wanted.adapter.digest == served(volumes)
    (volumes / VOLUME / "promoted" / "hotels").unlink()
    evaluate.run(loaded, volumes, 0)
    assert served(volumes) == plan(loaded.pipeline).adapter.digest, "there is nothing to beat any more"


def test_what_passed_and_serves_is_not_decided_again(folder: Path, measured: list[str]) -> None:
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE, seed=1)
    evaluate.run(loaded, volumes, 0)
    made = (wanted.evaluation.path(volumes) / "artifact.json").read_text()
    measured.clear()
    evaluate.run(loaded, volumes, 0)
    evaluate.run(*published_pipeline(folder, gate=NO_WORSE), 0)
    evaluate.run(loaded, volumes, 0)
    assert measured == [] and served(volumes) == wanted.adapter.digest
    assert (wanted.evaluation.path(volumes) / "artifact.json").read_text() == made


def test_with_the_smallest_retention_what_is_compared_with_stays(folder: Path) -> None:
    before = first(folder)
    loaded, volumes, _ = desired(folder, gate=BETTER, seed=1, max_length=100, keep=1)
    evaluate.run(loaded, volumes, 0)
    assert artifacts.find(before.adapter, volumes) and artifacts.find(before.evaluation, volumes)
    assert evaluation(loaded, volumes)["promoted"]["digest"] == before.adapter.digest


def test_the_promoted_adapter_is_measured_in_the_chat_format_in_which_it_is_served(folder: Path) -> None:
    before = first(folder)
    loaded, volumes, wanted = desired(folder, gate=NO_WORSE, seed=1, template={"enable_thinking": False})
    found = promoted.find(loaded.pipeline, wanted, volumes, before.adapter.digest)
    assert found.scored.template == {} and found.scored.encoded is None
    evaluate.run(loaded, volumes, 0)
    assert read(found.scored.scores.path(volumes) / "artifact.json")["spec"]["chat_template"] == {}
    assert served(volumes) == wanted.adapter.digest


def test_privacy_is_measured_of_the_promoted_adapter_only_on_what_it_was_trained_on(folder: Path) -> None:
    """On other data, which of the records it was trained on is not known."""
    before = first(folder)
    same, volumes, wanted = desired(folder, gate=NO_WORSE, seed=1, privacy={"canaries": 0})
    assert promoted.find(same.pipeline, wanted, volumes, before.adapter.digest).scored.private
    loaded, _, wanted = desired(folder, gate=NO_WORSE, seed=1, max_length=100, privacy={"canaries": 0})
    evaluate.run(loaded, volumes, 0)
    other = promoted.find(loaded.pipeline, wanted, volumes, before.adapter.digest).scored
    assert (wanted.adapter_scores.path(volumes) / "privacy.jsonl").exists()
    assert not other.private and not (other.scores.path(volumes) / "privacy.jsonl").exists()
    assert "privacy" in wanted.adapter_scores.spec and "privacy" not in other.scores.spec
    assert evaluation(loaded, volumes)["scores"]["promoted"]["privacy.membership_auc"] is None


def test_in_mode_merged_the_merged_model_is_what_is_measured(tmp_path: Path, measured: list[str]) -> None:
    """Were it not what base model and adapter are together, its scores would show it."""
    loaded, volumes, wanted = desired(tmp_path, gate=NO_WORSE, mode="merged", without=("merged_model",))
    with pytest.raises(RetryableError, match=str(wanted.merged_model)):
        evaluate.run(loaded, volumes, 0)

    def wrong(draft: Path) -> None:
        tiny_adapter(tmp_path / "wrong", wanted.base_model.path(volumes), seed=9)
        merge.write_merged(wanted.base_model.path(volumes), tmp_path / "wrong", draft)

    artifacts.publish(wanted.merged_model, volumes, wrong, keep=5)
    evaluate.run(loaded, volumes, 0)
    assert [name for name in measured if name.startswith("load")] == [
        f"load {wanted.base_model}", f"load {wanted.merged_model}", f"load {wanted.reference_model}"]
    merged = evaluation(loaded, volumes)["scores"]["fine_tuned"]

    as_lora, _, _ = desired(tmp_path, gate=PASSING)
    evaluate.run(as_lora, volumes, 0)
    apart = evaluation(as_lora, volumes)["scores"]["fine_tuned"]
    assert merged["perplexity"] != pytest.approx(apart["perplexity"], rel=1e-2)

    shutil.rmtree(wanted.merged_model.path(volumes))
    shutil.rmtree(wanted.adapter_scores.path(volumes))
    loaded, _, _ = desired(tmp_path, gate=PASSING, mode="merged")
    evaluate.run(loaded, volumes, 0)
    right = evaluation(loaded, volumes)["scores"]["fine_tuned"]
    assert right["perplexity"] == pytest.approx(apart["perplexity"], rel=1e-4)


def test_in_mode_merged_the_promoted_adapter_is_measured_as_it_is_served(tmp_path: Path, measured: list[str]) -> None:
    """One that was promoted in mode lora has no merged model: it is measured on its base model."""
    as_lora, volumes, before = desired(tmp_path, gate=NO_WORSE)
    evaluate.run(as_lora, volumes, 0)
    loaded, _, wanted = desired(tmp_path, gate=NO_WORSE, mode="merged", seed=1)
    evaluate.run(loaded, volumes, 0)
    assert evaluation(loaded, volumes)["scores"]["promoted"] == read(
        before.adapter_scores.path(volumes) / "scores.json")
    measured.clear()
    last, _, _ = desired(tmp_path, gate=NO_WORSE, mode="merged", seed=2, max_length=100)
    evaluate.run(last, volumes, 0)
    assert [f"load {wanted.merged_model}", f"hotels@{wanted.adapter.digest}"] == measured[-4:-2]
