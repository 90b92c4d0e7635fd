"""Export: a folder that PEFT loads, that says what it is, and that replaces nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from jobs.__main__ import main
from jobs.core import promotion
from jobs.core.errors import UserError
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from jobs.publication import bom, export
from jobs.publication.push import Published
from tests import build_adapter, build_signing
from tests.build_pipeline import COMMIT, SHA256
from tests.build_published import declare
from tests.publication.conftest import TEXT, Made, make

NAME = "seville-hotels"
VERDICT: dict[str, Any] = {
    "passed": True, "outcome": "passed",
    "base_model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "digest": "1" * 16},
    "sources": {"base_model": {"source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct", "pin": COMMIT},
                "dataset": {"source": "https://user:key@example.com/private.jsonl?signature=secret", "pin": SHA256}},
    "scores": {"fine_tuned": {"perplexity": 1.25, "rougeL": None, "acceptability_mcc": 0.9, "records": 73,
                              "model": "x", "tasks.facts": 0.7}},
    "intervals": {"fine_tuned": {"perplexity": [1.2, 1.3], "acceptability_mcc": [None, None]}},
    "gate": [{"metric": "perplexity", "outcome": "passed",
              "description": "perplexity: fine-tuned / base is 0.5, must be at most 0.9"}],
    "training": {"lora": {"r": 8}, "epochs": 1, "learning_rate": 0.0002}}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = make(tmp_path / "made", chat_template={"enable_thinking": False})
    rewrite(made, VERDICT)
    return made


def rewrite(made: Made, verdict: dict[str, Any]) -> None:
    """Give an evaluation another content, as if it had been made with it."""
    file = made.evaluation.path / "evaluation.json"
    file.write_text(json.dumps(verdict))
    build_signing.tamper(made.evaluation.path, "evaluation.json")


def bill_of(folder: Path) -> dict[str, Any]:
    text = (folder / export.BILL).read_text()
    for version in (SchemaVersion.V1_6,):
        problem = JsonStrictValidator(version).validate_str(text)
        assert problem is None, str(problem)[:500]
    bill: dict[str, Any] = json.loads(text)
    return bill


def test_the_promoted_adapter_is_exported_by_its_name_without_private_texts(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["export", NAME, "--volumes", str(made.volumes), "--output", str(output)]) == 0
    names = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "bom.cdx.json",
                     "evaluation/evaluation.json", "evaluation/report.html", "evaluation/report.md", "training.json"]
    for name in names[1:3]:
        assert (output / name).read_bytes() == (made.adapter.path / name).read_bytes()
    everything = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert TEXT.encode() not in everything
    assert b"secret" not in (output / export.BILL).read_bytes() + (output / export.CARD).read_bytes()


def test_it_is_exported_by_its_folder_where_git_desires_it(made: Made, tmp_path: Path) -> None:
    export.run(str(made.loaded.path.parent), made.volumes, tmp_path / "out")
    other = make(tmp_path / "made", promoted=False, training__seed=7)  # git moved on
    with pytest.raises(UserError, match=rf"desires {NAME}@{other.adapter.digest}, but {NAME}@{made.adapter.digest} is"):
        export.run(str(other.loaded.path.parent), made.volumes, tmp_path / "other")


def test_an_imported_adapter_is_exported_too(made: Made, tmp_path: Path) -> None:
    declare(tmp_path / "imports", Published("oci://registry.example.com/x", "0" * 64, pushed=True))
    export.run(str(tmp_path / "imports"), made.volumes, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_volumes_may_be_those_of_a_local_run(made: Made, tmp_path: Path) -> None:
    (made.volumes / FINE_TUNED_VOLUME).rename(made.volumes / f"{FINE_TUNED_VOLUME}-pvc")
    export.run(NAME, made.volumes, tmp_path / "out")
    with pytest.raises(UserError, match="has no folder fine-tuned-model"):
        export.run(NAME, tmp_path, tmp_path / "other")


def test_nothing_is_overwritten(made: Made, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("there", "link"):
        with pytest.raises(UserError, match="exists, and nothing is overwritten"):
            export.run(NAME, made.volumes, tmp_path / place)
    assert list((tmp_path / "there").iterdir()) == []


def test_what_is_not_promoted_or_damaged_is_not_exported(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter is promoted under this name"):
        export.run("other", made.volumes, tmp_path / "out")
    (made.adapter.path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="adapter_model.safetensors was changed"):
        export.run(NAME, made.volumes, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_the_card_tells_how_to_load_it_and_what_it_was_measured_to_do(made: Made, tmp_path: Path) -> None:
    export.run(NAME, made.volumes, tmp_path / "out")
    card = (tmp_path / "out" / export.CARD).read_text()
    assert card.startswith("---\nlibrary_name: peft\n---\n# seville-hotels\n"), "the card of the training"
    for line in (f'base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", '
                 f'revision="{COMMIT}")',
                 f"vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --revision {COMMIT} --enable-lora --max-lora-rank 8 "
                 f"--lora-modules {NAME}=FOLDER \\",
                 "  --default-chat-template-kwargs '{\"enable_thinking\": false}'",
                 "| perplexity: fine-tuned / base is 0.5, must be at most 0.9 | passed |",
                 f"Adapter {made.adapter.digest}, evaluation {made.evaluation.digest}."):
        assert line in card, line


def test_the_bill_names_model_base_data_and_libraries(made: Made, tmp_path: Path) -> None:
    export.run(NAME, made.volumes, tmp_path / "out")
    bill = bill_of(tmp_path / "out")
    model = bill["metadata"]["component"]
    assert (model["name"], model["version"]) == (NAME, made.adapter.digest)
    by_ref = {component["bom-ref"]: component for component in bill["components"]}
    assert by_ref["base-model"]["purl"] == f"pkg:huggingface/HuggingFaceTB/SmolLM2-135M-Instruct@{COMMIT}"
    assert by_ref["dataset"]["hashes"] == [{"alg": "SHA-256", "content": SHA256}]
    assert by_ref["dataset"]["name"] == "https://example.com/private.jsonl"
    versions = {component["name"]: component["version"] for component in bill["components"]
                if component["type"] in ("library", "platform")}
    assert versions == made.adapter.manifest["versions"]
    peft = next(component for component in bill["components"] if component["name"] == "peft")
    assert peft["purl"] == f"pkg:pypi/peft@{versions['peft']}" and "Apache" in json.dumps(peft["licenses"])
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [(each["type"], each["value"]) for each in metrics] == [
        ("perplexity", "1.25"), ("acceptability_mcc", "0.9"), ("tasks.facts", "0.7")]
    assert metrics[0]["confidenceInterval"] == {"lowerBound": "1.2", "upperBound": "1.3"}
    assert bill["dependencies"][0] == {"ref": "adapter", "dependsOn": list(by_ref)}


def test_the_same_adapter_has_the_same_bill(made: Made, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export.run(NAME, made.volumes, tmp_path / name)
    assert (tmp_path / "one" / export.BILL).read_bytes() == (tmp_path / "two" / export.BILL).read_bytes()


def test_the_licence_of_another_version_is_not_claimed() -> None:
    assert "licenses" not in bom.library("peft", "0.0.1") and "licenses" not in bom.library("no-such-package", "1")
    assert bom.library("torch", "2.13.0+cpu")["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"


def test_a_bill_without_measurements_is_valid(made: Made, tmp_path: Path) -> None:
    """An adapter that an earlier version evaluated, or that another environment published."""
    rewrite(made, {key: VERDICT[key] for key in ("passed", "outcome", "base_model", "gate")} | {"gate": []})
    export.run(NAME, made.volumes, tmp_path / "out")
    assert "quantitativeAnalysis" not in bill_of(tmp_path / "out")["metadata"]["component"]["modelCard"]


@pytest.mark.parametrize("verdict", [{"passed": True}, [], {**VERDICT, "gate": 5}])
def test_an_evaluation_that_lacks_what_the_card_needs_is_named(made: Made, tmp_path: Path, verdict: Any) -> None:
    rewrite(made, verdict)
    with pytest.raises(UserError, match="was made by an earlier version, or is not complete"):
        export.run(NAME, made.volumes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_loads_the_folder_and_the_model_answers_as_the_one_on_the_volume(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    desired, wanted = build_adapter.load(tmp_path / "git")
    volumes = tmp_path / "volumes"
    verdict = {**VERDICT, "adapter": {"name": desired.adapter, "digest": wanted.adapter.digest}}

    def write_verdict(draft: Path) -> None:
        (draft / "evaluation.json").write_text(json.dumps(verdict))

    adapter = build_adapter.adapter(volumes, desired)
    evaluation = build_adapter.evaluation(volumes, desired, change=write_verdict)
    promotion.promote(volumes / FINE_TUNED_VOLUME, desired.adapter, adapter.name, evaluation.name)
    export.run(desired.adapter, volumes, tmp_path / "out")
    assert plan(desired).adapter.digest == adapter.name

    def logits(folder: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(build_adapter.models() / "base")
        with torch.no_grad():
            found: torch.Tensor = PeftModel.from_pretrained(base, folder)(torch.tensor([[5, 6, 7]])).logits
        return found

    copied = tmp_path / "elsewhere"
    shutil.move(tmp_path / "out", copied)
    assert torch.equal(logits(copied), logits(adapter))
