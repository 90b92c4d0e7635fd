"""Scores artifacts: each model is measured as it is and with its own settings, and what is read is what was written."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts, models
from jobs.core.artifacts import Spec
from jobs.core.errors import RetryableError, UserError
from jobs.data import encoded
from jobs.evaluation import proof, scores, scoring
from jobs.evaluation.scores import ScoredModel
from jobs.evaluation.scoring import Material, Measured
from tests.build_models import tiny_adapter, tiny_llama, tiny_tokenizer

MEASURED = Measured({"perplexity": 9.5, "rougeL": None, "vocabulary": "Málaga"},
                    {"records": [{"line": 1, "nats": 2.5, "text": "東京"}, {"line": 2}], "tasks.city": [{"line": 1}]},
                    [{"line": 1, "answer": "Sí."}], [{"task": "city", "answer": "Ávila"}])


# --- the files ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_and_people_can_read_the_files(tmp_path: Path) -> None:
    scores.write(tmp_path, MEASURED)
    found = scores.read(tmp_path, ["records", "sentences", "tasks.city"])
    assert (found.summary, found.values, found.generations) == (MEASURED.summary, MEASURED.values, MEASURED.generations)
    assert scores.read(tmp_path, ["records"]).values.keys() == {"records"}
    assert (tmp_path / "scores.json").read_bytes().decode() == (
        '{\n  "perplexity": 9.5,\n  "rougeL": null,\n  "vocabulary": "Málaga"\n}\n')
    assert (tmp_path / "generations.jsonl").read_bytes().decode() == '{"line": 1, "answer": "Sí."}\n'
    assert (tmp_path / "records.jsonl").read_bytes().decode() == (
        '{"line": 1, "nats": 2.5, "text": "東京"}\n{"line": 2}\n')
    assert scoring.read_jsonl(tmp_path / "task_answers.jsonl") == MEASURED.task_answers


def test_without_tasks_there_is_no_file_of_their_answers(tmp_path: Path) -> None:
    scores.write(tmp_path, Measured({}, {"records": []}, []))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["generations.jsonl", "records.jsonl", "scores.json"]


@pytest.mark.parametrize("measured", [Measured({"rougeL": float("nan")}, {}, []),
                                      Measured({}, {"records": [{"nats": float("inf")}]}, [])])
def test_what_is_no_json_is_not_written(tmp_path: Path, measured: Measured) -> None:
    """NaN is none: another program could not read the file."""
    with pytest.raises(ValueError, match="JSON compliant"):
        scores.write(tmp_path, measured)


# --- measuring ------------------------------------------------------------------------------------------------------


class Stage:
    """What `measure` asks of models, metrics, privacy and proof, and notes of it; no model is computed."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.volumes, self.no_proof = place, False
        self.loads: list[Path] = []
        self.calls: list[tuple[Any, ...]] = []
        self.proven: list[tuple[Any, ...]] = []
        self.alive: list[weakref.ref[Any]] = []
        self.most_alive = 0
        monkeypatch.setattr(models, "load_model", self.load_model)
        monkeypatch.setattr(models, "load_tokenizer", self.load_tokenizer)
        monkeypatch.setattr(models, "check_vocabulary",
                            lambda model, tokenizer, where: self.calls.append(("check", str(model), tokenizer, where)))
        monkeypatch.setattr(scores, "_with_adapter", lambda model, adapter: Model(f"{model.name}+{adapter.name}"))
        monkeypatch.setattr(encoded, "Split", lambda file: ("split", file))
        monkeypatch.setattr(scoring, "measure", self.measure)
        monkeypatch.setattr(proof, "record", self.record)

    def load_model(self, folder: Path) -> Any:
        self.loads.append(folder)
        model = Model(folder.name)
        self.alive.append(weakref.ref(model))
        self.most_alive = max(self.most_alive, sum(each() is not None for each in self.alive))
        return model

    def load_tokenizer(self, folder: Path) -> str:
        self.loads.append(folder)
        return f"tokenizer {folder.name}"

    def measure(self, model: Any, tokenizer: Any, material: Material, name: str) -> Measured:
        self.calls.append((name, str(model), tokenizer, material))
        return Measured({"perplexity": 2.0}, {"records": [{"line": 1}]}, [{"answer": name}], [{"task": name}])

    def record(self, model: Any, tokenizer: Any, material: Material) -> Any:
        self.proven.append((str(model), tokenizer, material.max_length))
        return None if self.no_proof else Proven()

    def run(self, scored: list[ScoredModel], **options: Any) -> list[artifacts.Artifact]:
        scores.measure(scored, Material([], [], 70, 9), self.volumes, keep=9, adapter_name="hotels", **options)
        return [artifacts.read(each.scores.path(self.volumes)) for each in scored]


class Model:
    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name


class Subjects:
    """What privacy is measured on."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def measure(self, model: Any, name: str, before: Any) -> list[dict[str, Any]]:
        self.calls.append((str(model), name, before))
        return [{"line": 1, "position": 1, "exposure": 2.0}, {"line": 2, "position": 1, "exposure": 4.0}]


class Proven:
    def to_json(self) -> str:
        return '{"a": "é"}'


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def model_of(name: str, folder: str, **options: Any) -> ScoredModel:
    return ScoredModel(name, Spec("volume", "scores", {"of": name}), Path("/models") / folder,
                       Path("/tokenizers") / options.pop("tokenizer", folder), **options)


def test_models_that_share_weights_are_loaded_once_and_the_base_is_measured_before_its_adapters(stage: Stage) -> None:
    scored = [model_of("tuned", "base", adapter=Path("/adapters/a")), model_of("base", "base"),
              model_of("other", "other", tokenizer="base"), model_of("promoted", "base", adapter=Path("/adapters/b"))]
    stage.run(scored)
    assert stage.loads == [Path("/models/base"), Path("/tokenizers/base"), Path("/models/other")]
    assert [call[:3] for call in stage.calls if call[0] != "check"] == [
        ("base", "base", "tokenizer base"), ("tuned", "base+a", "tokenizer base"),
        ("promoted", "base+a+b", "tokenizer base"), ("other", "other", "tokenizer base")]
    assert [call for call in stage.calls if call[0] == "check"][-1] == (
        "check", "other", "tokenizer base", "/tokenizers/base")
    assert stage.most_alive == 1, "two models at once may not fit"


def test_each_model_is_measured_in_its_own_format_on_the_same_material(stage: Stage) -> None:
    stage.run([model_of("base", "base", template={"day": "1"}, encoded=Path("/e.arrow")), model_of("other", "other")])
    first, second = (call[3] for call in stage.calls if call[0] != "check")
    assert (first.template, first.encoded) == ({"day": "1"}, ("split", Path("/e.arrow")))
    assert (second.template, second.encoded) == ({}, None)
    assert (first.max_length, first.max_new_tokens) == (second.max_length, second.max_new_tokens) == (70, 9)


def test_scores_that_are_there_are_not_measured_again_and_each_says_of_which_model_and_adapter_they_are(
        stage: Stage) -> None:
    (found,) = stage.run([model_of("base", "base")])
    assert (found.manifest["about"]["model"], found.manifest["about"]["adapter_name"]) == ("base", "hotels")
    assert scores.read(found.path, ["records"]) == Measured(
        {"perplexity": 2.0}, {"records": [{"line": 1}]}, [{"answer": "base"}])
    calls = len(stage.calls)
    stage.run([model_of("base", "base")])
    assert [call for call in stage.calls[calls:] if call[0] != "check"] == []


def test_only_so_many_scores_are_kept(stage: Stage) -> None:
    scored = [model_of(str(number), "base") for number in range(3)]
    scores.measure(scored, Material([], [], 70, 9), stage.volumes, keep=1, adapter_name="hotels")
    assert sum(each.scores.path(stage.volumes).exists() for each in scored) == 1


def test_privacy_is_measured_of_those_that_it_is_asked_of_and_compared_with_the_base(stage: Stage) -> None:
    subjects, before = Subjects(), [{"line": 1, "nats": 3.0}]
    base_scores = stage.volumes / "of-base"
    base_scores.mkdir()
    scores.write_jsonl(base_scores / "privacy.jsonl", before)
    read = []

    def privacy(tokenizer: Any) -> Any:
        read.append(tokenizer)
        return subjects

    found = stage.run([model_of("base", "base", private=True),
                       model_of("tuned", "base", private=True, adapter=Path("/a"), base_scores=base_scores),
                       model_of("other", "other")], privacy=privacy)
    assert read == ["tokenizer base"], "once for models with the same tokenizer"
    assert subjects.calls == [("base", "base", None), ("base+a", "tuned", before)]
    assert [scores.read_summary(each.path).get("privacy.exposure") for each in found] == [3.0, 3.0, None]
    assert [scores.read_summary(each.path)["perplexity"] for each in found] == [2.0] * 3
    values = [scores.read(each.path, ["records", "privacy"]).values for each in found]
    assert [each.keys() for each in values] == [{"records", "privacy"}, {"records", "privacy"}, {"records"}]
    assert scoring.read_jsonl(found[0].path / "task_answers.jsonl") == [{"task": "base"}]
    stage.run([model_of("none", "base", private=True)])  # without `evaluation.privacy`


def test_of_a_model_that_may_be_served_its_proof_is_kept(stage: Stage) -> None:
    base, tuned = stage.run([model_of("base", "base"), model_of("tuned", "base", prove=True)])
    assert (tuned.path / "proof.json").read_bytes().decode() == '{"a": "é"}'
    assert not (base.path / "proof.json").exists()
    assert stage.proven == [("base", "tokenizer base", 70)]
    stage.no_proof = True  # its logits are no numbers
    (found,) = stage.run([model_of("broken", "base", prove=True)])
    assert not (found.path / "proof.json").exists()


def test_the_vocabulary_is_read_from_the_scores_or_else_from_the_tokenizer(stage: Stage, tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "tokenizer")
    scored = ScoredModel("base", Spec("volume", "scores", {}), tmp_path, tmp_path / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "vocabulary", lambda tokenizer: f"of {tokenizer}")
        assert scored.vocabulary(tmp_path) == "of tokenizer tokenizer"
    folder = scored.scores.path(tmp_path)
    folder.mkdir(parents=True)
    scores.write(folder, Measured({"vocabulary": "abc"}, {}, []))
    assert scored.vocabulary(tmp_path) == "abc"


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_llama(folder / "base")
    for seed, name in enumerate(("one", "two"), 1):
        tiny_adapter(folder / name, folder / "base", seed=seed)
    return folder


def test_the_model_has_this_adapter_and_no_other(adapters: Path) -> None:
    import torch

    def load() -> Any:
        return models.load_model(adapters / "base")

    def logits(model: Any) -> Any:
        assert not model.training
        with torch.no_grad():
            return model(torch.tensor([[5, 6, 7]])).logits

    one, two = (logits(scores._with_adapter(load(), adapters / name)) for name in ("one", "two"))
    model = load()
    assert not torch.allclose(logits(model), one, atol=1e-3) and not torch.allclose(one, two, atol=1e-3)
    for name, expected in (("one", one), ("two", two)):
        model = scores._with_adapter(model, adapters / name)
        assert torch.equal(logits(model), expected), name


@contextmanager
def failing(error: Exception) -> Iterator[None]:
    from peft import PeftModel

    def fail(*_: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "from_pretrained", fail)
        yield


def test_an_adapter_that_cannot_be_loaded_is_named_and_a_full_gpu_is_not_its_fault(adapters: Path) -> None:
    import torch

    for error, kind in ((ValueError("weights"), UserError), (OSError(5, "input/output error"), RetryableError)):
        with failing(error), pytest.raises(kind, match=f"^{adapters / 'one'}: the adapter cannot be loaded") as raised:
            scores._with_adapter(None, adapters / "one")
        assert str(error) in str(raised.value) or "nput/output" in str(raised.value)
        assert raised.value.__cause__ is error
    with failing(torch.OutOfMemoryError("CUDA out of memory")), pytest.raises(torch.OutOfMemoryError):
        scores._with_adapter(None, adapters / "one")
