"""Promises of an imported adapter's file: it names what was published, and nothing that contradicts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.core import imported, pipeline
from jobs.core.artifacts import Spec
from jobs.core.errors import UserError
from jobs.core.imported import Imported, ImportedAdapter, LoadedImport
from jobs.core.plan import (
    EvaluatedImportPlan,
    ImportPlan,
    deciding_evaluation,
    plan,
    plan_adapter,
    plan_evaluation,
    plan_import,
)
from tests import build_pipeline
from tests.build_pipeline import SHA256
from tests.manifests import CHECKOUT

SOURCE = "oci://registry.example.com/team/adapters/seville-hotels"
GATE = {"gate": {"perplexity": {"max_ratio": 0.9}}}
DATASET = {"source": "file:dataset.jsonl", "sha256": SHA256}


def write(folder: Path, **changes: Any) -> Path:
    return build_pipeline.write(folder, **{"dataset": None, "training": None, "evaluation": None, "source": SOURCE,
                                           "sha256": SHA256, **changes})


def load(folder: Path, **changes: Any) -> ImportedAdapter:
    return imported.load(write(folder, **changes)).pipeline


def test_it_has_a_source_and_its_pin_and_nothing_is_trained(tmp_path: Path) -> None:
    loaded = imported.load_any(write(tmp_path))
    assert isinstance(loaded, LoadedImport)
    assert loaded.evaluated_here() is None
    assert {key: (each.source, each.sha256) for key, each in loaded.pipeline.sources().items()} == {
        "source": (SOURCE, SHA256)}
    named = plan_import(loaded.pipeline)
    assert type(named) is ImportPlan
    assert named.imported_adapter.spec["sha256"] == SHA256


def test_the_pin_alone_names_it(tmp_path: Path) -> None:
    """A mirror has the same bytes, and another name changes nothing of what is fetched."""
    one = plan_import(load(tmp_path)).imported_adapter
    assert plan_import(load(tmp_path, source="oci://mirror.example.com/a", adapter="other")).imported_adapter == one
    assert plan_import(load(tmp_path, sha256="0" * 64)).imported_adapter != one


def test_the_pin_may_stand_in_the_source(tmp_path: Path) -> None:
    inside = load(tmp_path, source=f"{SOURCE}@sha256:{SHA256}", sha256=None)
    assert plan_import(inside) == plan_import(load(tmp_path))


def test_a_trained_adapter_is_read_as_before(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path)
    assert imported.load_any(file) == pipeline.load(file)
    assert plan_adapter(pipeline.load(file).pipeline) == plan(pipeline.load(file).pipeline)


@pytest.mark.parametrize(("changes", "key", "message"), [
    ({"training": {"epochs": 1}}, "training", "beside `source`: an imported adapter is not trained here. Remove"),
    ({"dataset": DATASET}, "dataset", "`dataset` without `evaluation`"),
    ({"evaluation": GATE}, "evaluation", "`evaluation` without `dataset`"),
    ({"dataset": DATASET, "evaluation": GATE | {"privacy": {}}}, "evaluation.privacy", "measures what training"),
    ({"source": "https://example.com/adapter"}, "source", "https://example.com/adapter is not a source; allowed: "),
    ({"source": "https://me:hush@example.com/a?hush"}, "source", "'https://example.com/a': https://example.com/a is"),
    ({"source": "s3://bucket"}, "source", "s3://bucket must be s3://BUCKET/PREFIX/NAME/DIGEST"),
    ({"source": 1}, "source", "1: input should be a valid string"),
    ({"sha256": "0"}, "sha256", "'0' must be 64 hex digits"),
    ({"sha256": None}, "source", f"{SOURCE} is not pinned: `sha256` is missing. Run: python -m jobs pin"),
    ({"source": f"{SOURCE}@sha256:{'0' * 64}"}, "sha256", "names another digest than `sha256`"),
    ({"revision": "main"}, "revision", "unknown key; allowed: adapter, source, sha256, dataset, evaluation"),
    ({"sha265": "x"}, "sha265", "unknown key; did you mean `sha256`?"),
    ({"source": None}, "sha256", "is the pin of an imported adapter, and `source` is missing"),
    ({"serving": {"mode": "merged"}}, "source", "serving.mode of the environment is merged"),
    ({"adapter": "environment"}, "adapter", "no adapter can have this name"),
])
def test_what_contradicts_itself_is_refused_with_what_was_meant(tmp_path: Path, changes: dict[str, Any], key: str,
                                                                message: str) -> None:
    file = write(tmp_path, **changes)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if text.startswith(key.split(".")[0]))
    with pytest.raises(UserError) as raised:
        imported.load_any(file)
    assert message in str(raised.value)
    at, _, rest = str(raised.value).removeprefix(f"{file}:").partition(": ")
    assert rest.startswith(f"{key}: ")
    assert int(at) >= line
    assert "\n" not in str(raised.value)


def test_clients_can_tell_it_from_the_base_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter: has the base model's name"):
        load(tmp_path, adapter="model", base_model={"source": "hf://model", "revision": "1" * 40})


def test_the_stages_of_the_other_kind_refuse_it(tmp_path: Path) -> None:
    file = write(tmp_path)
    with pytest.raises(UserError, match=r":\d+: source: this adapter is imported, not trained here"):
        pipeline.load(file)
    with pytest.raises(UserError, match="nothing is evaluated here"):
        imported.load_data(file)
    with pytest.raises(UserError, match="this adapter is trained here"):
        imported.load(build_pipeline.write(tmp_path))


def test_evaluated_here_it_has_the_data_and_the_gate_of_a_trained_one(tmp_path: Path) -> None:
    adapter = load(tmp_path, dataset=DATASET, evaluation=GATE)
    here, named = adapter.evaluated_here, plan_import(adapter)
    assert here
    assert isinstance(named, EvaluatedImportPlan)
    of_trained = plan(build_pipeline.build(training=None))
    for name in ("dataset", "acceptability", "encoded_dataset", "base_scores", "reference_scores"):
        assert getattr(named, name) == getattr(of_trained, name), name
    assert list(adapter.sources()) == ["source", "dataset", "evaluation.acceptability"]
    # What depends on the adapter follows from the one that arrived.
    arrived = Imported(Spec("fine-tuned-model", "adapter", {"recipe": 2}, {"base_model": "b"}),
                       Spec("fine-tuned-model", "evaluation", {}, {}))
    decides = deciding_evaluation(adapter, arrived)
    assert decides == plan_evaluation(here, arrived.adapter).evaluation
    assert decides.inputs["adapter"] == arrived.adapter.digest
    assert deciding_evaluation(load(tmp_path), arrived) == arrived.evaluation


def test_what_relocation_recorded_is_read_again(tmp_path: Path) -> None:
    recorded = Imported(Spec("volume", "adapter", {"lora": {"r": 8}}, {"base_model": "b"}),
                        Spec("volume", "evaluation", {"adapter": "seville-hotels"}, {"adapter": "a"}))
    (tmp_path / imported.RECORD).write_text(recorded.to_json())
    assert imported.read(tmp_path, "volume") == recorded


WITHOUT_A_DIGEST = json.dumps({kind: {"spec": {"r": float("nan")}, "inputs": {}} for kind in ("adapter", "evaluation")})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"adapter": 1}', '{"adapter": {"spec": {}, "inputs": 7}}',
                                  '{"adapter": {"spec": NaN, "inputs": {}}}', "[" * 10_000, WITHOUT_A_DIGEST])
def test_a_damaged_record_is_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / imported.RECORD).write_text(text)
    with pytest.raises(UserError, match=r"imported.json: is damaged") as raised:
        imported.read(tmp_path, "volume")
    assert "\n" not in str(raised.value)


def test_settings_of_a_run_are_those_of_a_training() -> None:
    with pytest.raises(UserError, match="this adapter is imported, not trained here"):
        imported.load_any(CHECKOUT / "overlays" / "kind-serving" / "adapters" / "seville-hotels",
                          changes=["training.epochs=3"])


@pytest.mark.parametrize("source", ["s3://bucket/prefix/seville-hotels/0123", "s3://bucket/prefix/seville-hotels/0123/"])
def test_in_a_bucket_it_is_a_folder(tmp_path: Path, source: str) -> None:
    found = load(tmp_path, source=source).sources()["source"]
    assert (found.source, found.sha256) == ("s3://bucket/prefix/seville-hotels/0123/", SHA256)


def test_a_file_without_its_pin_is_read_to_pin_it(tmp_path: Path) -> None:
    unpinned = {"base_model": {"source": "hf://a/b"}}
    file = write(tmp_path, sha256=None, **unpinned)
    for loaded in (imported.load(file, pinned=False), imported.load_any(file, pinned=False)):
        assert loaded.pipeline.sources()["source"].unpinned() == "`sha256` is missing"
    for write_it in (write, build_pipeline.write):
        file = write_it(tmp_path, **unpinned)
        assert imported.load_any(file, pinned=False)
        with pytest.raises(UserError, match="environment.yaml:.* base_model: hf://a/b is not pinned"):
            imported.load_any(file)


@pytest.mark.parametrize("text", ["", "- a\n"])
def test_a_file_that_holds_no_mapping_is_told_what_it_lacks(tmp_path: Path, text: str) -> None:
    file = write(tmp_path)
    file.write_text(text)
    with pytest.raises(UserError, match="must hold a mapping with the key `adapter` and others"):
        imported.load_any(file)


def test_the_stages_of_data_and_evaluation_read_it_like_a_trained_one(tmp_path: Path) -> None:
    file = write(tmp_path, dataset=DATASET, evaluation=GATE)
    loaded, found = imported.load(file), imported.load_data(file)
    assert found == loaded.evaluated_here()
    assert (found.path, found.environment, found.pipeline) == (file, loaded.environment, loaded.pipeline.evaluated_here)
    assert found.pipeline.adapter == "seville-hotels"
    assert found.pipeline.training == pipeline.Training()
    assert list(found.pipeline.sources()) == ["source", "dataset", "evaluation.acceptability"]
    assert found.pipeline.sources()["source"] == loaded.pipeline.published
    trained = build_pipeline.write(tmp_path)
    assert imported.load_data(trained) == pipeline.load(trained)
    assert imported.load_data(trained, changes=["training.epochs=3"]).pipeline.training.epochs == 3


def test_its_environment_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    file = write(tmp_path / "a", dataset=DATASET, evaluation=GATE)
    elsewhere = (file.parent / "environment.yaml").rename(tmp_path / "environment.yaml")
    for load_it in (imported.load, imported.load_any, imported.load_data):
        assert load_it(file, elsewhere).environment.path == elsewhere  # type: ignore[operator]
    trained = build_pipeline.write(tmp_path / "a")
    (trained.parent / "environment.yaml").unlink()
    assert imported.load_any(trained, elsewhere).environment.path == elsewhere


@pytest.mark.parametrize(("dataset", "evaluation", "where"), [
    ({"source": "file:a", "sha256": None}, GATE, "dataset: file:a is not pinned"),
    (DATASET, GATE | {"acceptability": {"source": "hf://datasets/a/b"}}, "evaluation.acceptability: hf://datasets/a/b")])
def test_what_it_is_evaluated_on_is_pinned_as_well(tmp_path: Path, dataset: Any, evaluation: Any, where: str) -> None:
    with pytest.raises(UserError, match=where):
        load(tmp_path, dataset=dataset, evaluation=evaluation)


def test_the_record_is_text_that_people_can_read(tmp_path: Path) -> None:
    text = Imported(Spec("v", "adapter", {"größe": 1}, {}), Spec("v", "evaluation", {}, {})).to_json()
    assert '\n    "spec": {\n      "größe": 1\n' in text and text.endswith("}\n")


def test_a_damaged_record_is_moved_away_by_hand(tmp_path: Path) -> None:
    (tmp_path / imported.RECORD).write_text("[]")
    with pytest.raises(UserError, match=rf"^{tmp_path}/imported.json: is damaged \(.*\). Move {tmp_path} away and run"):
        imported.read(tmp_path, "volume")
