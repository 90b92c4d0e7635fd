"""Promises of relocation: verified artifacts in the promised form, or none; killed at any moment, it goes on."""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from jobs.core import artifacts, pipeline, retries
from jobs.core.declarations import Source
from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import plan
from jobs.data import harness
from jobs.relocation import relocate
from jobs.relocation.sources.file import folder_sha256
from tests import build_embedded, build_pipeline
from tests.hub_server import Fault, Hub, serve

RECORDS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(50)]
DATA = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LARGE = save({"weight": np.random.default_rng(0).integers(0, 255, 3_000_000, dtype=np.uint8)})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The local hub, named by HF_ENDPOINT for this process and those it starts, and short pauses between attempts."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
    monkeypatch.setenv("RETRY_FIRST_PAUSE_SECONDS", "0.01")
    monkeypatch.setenv("RETRY_ATTEMPTS", "3")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.files["data.jsonl"] = DATA
        yield server


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def model(weights: bytes | None = None, config: Any = LLAMA) -> dict[str, bytes]:
    """A model repository as they are: the files that are wanted, and those that must not be taken."""
    return {
        "config.json": json.dumps(config).encode(), "generation_config.json": b"{}", "tokenizer.json": b'{"model": {}}',
        "tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}", "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": save({"weight": np.ones(10)}) if weights is None else weights,
        "pytorch_model.bin": b"pickle", "modeling_tiny.py": b"import os", "README.md": b"# Tiny",
        ".gitattributes": b"x", "consolidated.safetensors": b"the same again", "onnx/model.onnx": b"x",
        "original/config.json": b"{}", "model-old/1-of-1.safetensors": b"older",
    }


def overlay(folder: Path, hub: Hub, files: dict[str, bytes] | None = None, **changes: Any) -> LoadedPipeline:
    """A pipeline whose data is at a URL and whose models are on the hub."""
    commit = hub.add("models", "acme/tiny", model() if files is None else files)
    source = {"source": "hf://acme/tiny", "revision": commit}
    settings: dict[str, Any] = {
        "dataset": {"source": f"{hub.url}/files/data.jsonl", "sha256": sha256(hub.files["data.jsonl"])},
        "base_model": source, "reference_model": source, **changes}
    folder.mkdir(exist_ok=True)
    return pipeline.load(build_pipeline.write(folder, **settings))


def run_here(loaded: LoadedPipeline, what: str, volumes: Path) -> None:
    """Relocate in this process, as the command does."""
    if what == "dataset":
        relocate.run_dataset(loaded, volumes)
    else:
        relocate.run_model(loaded.environment, what, volumes)


def published(loaded: LoadedPipeline, name: str, volumes: Path) -> artifacts.Artifact:
    """The artifact, verified."""
    found = artifacts.find(plan(loaded.pipeline).named()[name], volumes)
    assert found, f"{name} was not published"
    return found


def files(artifact: artifacts.Artifact) -> list[str]:
    return [f["path"] for f in artifact.manifest["files"]]


def jsonl(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def all_published(volumes: Path) -> list[Path]:
    return [p.parent for p in volumes.rglob("artifact.json") if not p.parent.name.startswith(".")]


def command(loaded: LoadedPipeline, what: str, volumes: Path) -> list[str]:
    return [sys.executable, "-m", "jobs", "--pipeline", str(loaded.path), "--volumes", str(volumes), "relocate", what]


def run(loaded: LoadedPipeline, what: str, volumes: Path) -> subprocess.CompletedProcess[str]:
    """The real command, to its end."""
    return subprocess.run(command(loaded, what, volumes), capture_output=True, text=True, check=False, timeout=120)


def start(loaded: LoadedPipeline, what: str, volumes: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command(loaded, what, volumes), text=True, stderr=subprocess.PIPE)


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def partial_bytes(volumes: Path) -> int:
    return sum(p.stat().st_size for p in volumes.rglob("*.partial"))


# --- what is published -----------------------------------------------------------------------------------------------


def test_a_dataset_becomes_records_and_brings_the_acceptability_sentences(tmp_path: Path, hub: Hub) -> None:
    loaded = overlay(tmp_path, hub)
    run_here(loaded, "dataset", tmp_path / "v")
    dataset = published(loaded, "dataset", tmp_path / "v")
    assert files(dataset) == ["holdout.jsonl", "statistics.json", "train.jsonl"]
    both = [jsonl(dataset.path / name) for name in ("train.jsonl", "holdout.jsonl")]
    assert sorted(map(str, both[0] + both[1])) == sorted(map(str, RECORDS))
    assert dataset.manifest["about"]["records"] == {"train": len(both[0]), "holdout": len(both[1])}
    pairs = jsonl(published(loaded, "acceptability", tmp_path / "v").path / "acceptability.jsonl")
    assert {(type(p["text"]), type(p["acceptable"])) for p in pairs} == {(str, bool)}
    assert 0.4 < sum(p["acceptable"] for p in pairs) / len(pairs) < 0.6


def test_the_share_that_the_pipeline_file_holds_out_is_held_out(tmp_path: Path, hub: Hub) -> None:
    records = [{"prompt": f"p{n}", "completion": "c"} for n in range(200)]
    hub.files["data.jsonl"] = "".join(json.dumps(record) + "\n" for record in records).encode()
    data = {"source": f"{hub.url}/files/data.jsonl", "sha256": sha256(hub.files["data.jsonl"])}
    for share in (0.2, 0.7):
        loaded = overlay(tmp_path, hub, dataset=data | {"holdout": share})
        run_here(loaded, "dataset", tmp_path / "v")
        held = jsonl(published(loaded, "dataset", tmp_path / "v").path / "holdout.jsonl")
        assert abs(len(held) / 200 - share) < 0.1


def test_the_same_bytes_from_a_file_and_a_url_are_the_same_artifact(tmp_path: Path, hub: Hub) -> None:
    by_url = overlay(tmp_path / "url", hub)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "data.jsonl").write_bytes(DATA)
    by_file = overlay(tmp_path / "file", hub, dataset={"source": "file:data.jsonl", "sha256": sha256(DATA)})
    run_here(by_url, "dataset", tmp_path / "a")
    run_here(by_file, "dataset", tmp_path / "b")
    a, b = (published(loaded, "dataset", tmp_path / v) for loaded, v in ((by_url, "a"), (by_file, "b")))
    assert a.digest == b.digest
    assert a.manifest["files"] == b.manifest["files"]


def test_glue_cola_from_the_hub_serves_as_acceptability_sentences(tmp_path: Path, hub: Hub) -> None:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"sentence": [f"S{n}." for n in range(8)], "label": [n % 2 for n in range(8)],
                                       "idx": list(range(8))}), sink)
    commit = hub.add("datasets", "nyu-mll/glue", {
        "cola/validation-00000-of-00001.parquet": sink.getvalue().to_pybytes(), "README.md": b"GLUE",
        "cola/test-00000-of-00001.parquet": b"not this one"})
    loaded = overlay(tmp_path, hub, evaluation__acceptability={
        "source": "hf://datasets/nyu-mll/glue/cola/validation-*.parquet", "revision": commit})
    run_here(loaded, "dataset", tmp_path / "v")
    artifact = published(loaded, "acceptability", tmp_path / "v")
    assert files(artifact) == ["acceptability.jsonl"]
    assert jsonl(artifact.path / "acceptability.jsonl") == [
        {"text": f"S{n}.", "acceptable": n % 2 == 1} for n in range(8)]


@pytest.mark.parametrize(("what", "expected"), [
    ("base-model", ["config.json", "generation_config.json", "model.safetensors"]),
    ("tokenizer", ["chat_template.jinja", "config.json", "generation_config.json", "special_tokens_map.json",
                   "tokenizer.json", "tokenizer_config.json"]),
    ("reference-model", ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                         "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]),
])
def test_of_a_repository_only_safe_files_are_taken(tmp_path: Path, hub: Hub, what: str, expected: list[str]) -> None:
    loaded = overlay(tmp_path, hub)
    run_here(loaded, what, tmp_path / "v")
    artifact = published(loaded, what, tmp_path / "v")
    assert files(artifact) == expected
    assert all((artifact.path / name).read_bytes() == model()[name] for name in expected)
    for never in ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "model-old"):
        assert not [s for s in hub.seen if never in s.path], f"{never} was fetched"


def test_a_model_folder_is_taken_like_a_repository(tmp_path: Path, hub: Hub) -> None:
    for name, content in model().items():
        (tmp_path / "tiny" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiny" / name).write_bytes(content)
    source = {"source": "file:tiny", "sha256": folder_sha256(tmp_path / "tiny")}
    loaded = overlay(tmp_path, hub, base_model=source, reference_model=source)
    for what in ("base-model", "tokenizer", "reference-model"):
        run_here(loaded, what, tmp_path / "v")
    assert files(published(loaded, "base-model", tmp_path / "v")) == ["config.json", "generation_config.json",
                                                                      "model.safetensors"]
    assert hub.seen == []


def test_a_model_in_shards_is_taken_whole(tmp_path: Path, hub: Hub) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": save({f"layer{n}": np.ones(n)}) for n in (1, 2)}
    index = {"weight_map": {"layer1": "model-00001-of-00002.safetensors", "layer2": "model-00002-of-00002.safetensors"}}
    repository = {"config.json": json.dumps(LLAMA).encode(), "model.safetensors.index.json": json.dumps(index).encode()}
    loaded = overlay(tmp_path, hub, repository | shards)
    run_here(loaded, "base-model", tmp_path / "v")
    assert files(published(loaded, "base-model", tmp_path / "v")) == sorted(repository | shards)
    index["weight_map"]["layer3"] = "model-00003-of-00003.safetensors"
    repository["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(UserError, match=r"index\.json lists layer3 in model-00003-of-00003\.safetensors, which is not"):
        run_here(overlay(tmp_path, hub, repository | shards), "base-model", tmp_path / "v")


@pytest.mark.slow
def test_an_embedded_model_is_made_on_the_spot(tmp_path: Path, hub: Hub, embedded_models: Path) -> None:
    loaded = overlay(tmp_path, hub, base_model={"source": "builtin:tiny"})
    assert {"config.json", "model.safetensors"} <= set(files(published(loaded, "base-model", embedded_models)))
    assert "tokenizer.json" in files(published(loaded, "tokenizer", embedded_models))
    assert "builtin:tiny: training steps: " in (embedded_models / build_embedded.LOG).read_text()


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(loaded: LoadedPipeline, what: str, volumes: Path) -> str:
    """The message with which the real command refuses (exit code 2, one error), having published nothing."""
    done = run(loaded, what, volumes)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert all_published(volumes) == []
    return done.stderr.partition("error: ")[2]


def test_a_wrong_pin_publishes_nothing_and_names_both_digests(tmp_path: Path, hub: Hub) -> None:
    loaded = overlay(tmp_path, hub, dataset={"source": f"{hub.url}/files/data.jsonl", "sha256": "0" * 64})
    message = refused(loaded, "dataset", tmp_path / "v")
    assert "0" * 64 in message
    assert sha256(DATA) in message


def test_data_beside_the_file_is_held_against_its_pin_also_when_the_pinned_data_is_there(
        tmp_path: Path, hub: Hub) -> None:
    """Data in git that was edited without its pin: "already there" would hide that the edit has no effect."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(DATA)
    loaded = overlay(tmp_path, hub, dataset={"source": "file:data.jsonl", "sha256": sha256(DATA)})
    run_here(loaded, "dataset", tmp_path / "v")
    data.write_bytes(DATA + DATA)
    done = run(loaded, "dataset", tmp_path / "v")
    assert done.returncode == 2, done.stderr
    assert f"pipeline.yaml says {sha256(DATA)}, but the content is {sha256(DATA + DATA)}" in done.stderr


def test_bad_records_publish_nothing_and_are_listed(tmp_path: Path, hub: Hub) -> None:
    hub.files["data.jsonl"] = DATA + b'{"prompt": "a", "completion": ""}\n{oops\n'
    message = refused(overlay(tmp_path, hub), "dataset", tmp_path / "v")
    assert message.startswith("data.jsonl:51: `completion` is empty\ndata.jsonl:52: not JSON")


def with_tasks(folder: Path, hub: Hub, *tasks: dict[str, Any], **changes: Any) -> LoadedPipeline:
    """A pipeline with tasks whose records, in `content`, are at URLs."""
    for task in tasks:
        name = f"{task['name']}.{task.pop('suffix', 'jsonl')}"
        hub.files[name] = task.pop("content")
        task |= {"source": f"{hub.url}/files/{name}", "sha256": sha256(hub.files[name])}
    return overlay(folder, hub, evaluation__tasks=list(tasks), **changes)


def questions(count: int, **values: Any) -> bytes:
    return b"".join(json.dumps({"prompt": f"Task {n}?", **values}).encode() + b"\n" for n in range(count))


def test_all_tasks_are_one_artifact_with_a_file_each_in_one_form(tmp_path: Path, hub: Hub) -> None:
    loaded = with_tasks(tmp_path, hub, {"name": "city", "check": "contains", "content": questions(2, expected="A")},
                        {"name": "form", "check": "json_schema", "suffix": "csv",
                         "content": b'prompt,schema,group\nA?,"{""type"": ""object""}",g\nB?,{},\n'})
    run_here(loaded, "dataset", tmp_path / "v")
    found = published(loaded, "tasks", tmp_path / "v")
    assert files(found) == ["city.jsonl", "form.jsonl"]
    assert jsonl(found.path / "city.jsonl")[1] == {"prompt": "Task 1?", "expected": ["A"]}
    assert jsonl(found.path / "form.jsonl") == [{"prompt": "A?", "schema": {"type": "object"}, "group": "g"},
                                                {"prompt": "B?", "schema": {}}]
    assert {name: facts["records"] for name, facts in found.manifest["about"]["tasks"].items()} == {
        "city": 2, "form": 2}


def test_a_task_file_of_lm_evaluation_harness_is_rendered_here_or_says_what_to_install(
        tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["quiz.yaml"] = (b'output_type: generate_until\ndoc_to_text: "{{a}} and {{b}}?"\ndoc_to_target: b\n'
                              b"metric_list: [{metric: exact_match}]\n")
    loaded = with_tasks(tmp_path, hub, {
        "name": "quiz", "check": "lm_eval", "content": b'{"a": "1", "b": "2"}\n',
        "lm_eval": {"source": f"{hub.url}/files/quiz.yaml", "sha256": sha256(hub.files["quiz.yaml"])}})
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="tasks.quiz: lm-evaluation-harness is not installed here. Run: pip install"):
        run_here(loaded, "dataset", tmp_path / "v")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: "it")  # type: ignore[attr-defined]
    run_here(loaded, "dataset", tmp_path / "v")
    found = published(loaded, "tasks", tmp_path / "v")
    assert files(found) == ["quiz.jsonl", "quiz.settings.json"]
    assert jsonl(found.path / "quiz.jsonl") == [{"prompt": "1 and 2?", "target": "2"}]
    assert json.loads((found.path / "quiz.settings.json").read_text())["metric"]["metric"] == "exact_match"


def test_a_bad_task_publishes_no_tasks_and_is_listed(tmp_path: Path, hub: Hub) -> None:
    loaded = with_tasks(tmp_path, hub, {"name": "city", "check": "regex", "content":
                                        b'{"prompt": "A?", "pattern": "("}\n{"prompt": "B?"}\n'})
    with pytest.raises(UserError) as raised:
        run_here(loaded, "dataset", tmp_path / "v")
    assert str(raised.value).startswith(
        "tasks.city: city.jsonl:1: `pattern` is not a regular expression of RE2: missing ): (\n"
        "tasks.city: city.jsonl:2: `pattern` is missing: the check regex needs it\n")
    assert artifacts.find(plan(loaded.pipeline).tasks, tmp_path / "v") is None


def test_a_task_that_asks_what_is_trained_on_is_refused(tmp_path: Path, hub: Hub) -> None:
    loaded = overlay(tmp_path, hub)
    run_here(loaded, "dataset", tmp_path / "v")
    dataset = published(loaded, "dataset", tmp_path / "v").path
    trained, held_out = (jsonl(dataset / f"{name}.jsonl")[0]["prompt"] for name in ("train", "holdout"))
    content = "".join(json.dumps({"prompt": prompt, "expected": "x"}) + "\n"
                      for prompt in (held_out, f" {trained.upper()} ")).encode()
    loaded = with_tasks(tmp_path, hub, {"name": "city", "check": "exact", "content": content})
    with pytest.raises(UserError) as raised:
        run_here(loaded, "dataset", tmp_path / "v")
    assert str(raised.value).startswith("tasks.city: city.jsonl:2: the same prompt is in the split train of the")
    assert "1 problem in the data" in str(raised.value)


def test_a_rule_on_a_task_with_too_few_records_is_refused_before_training(tmp_path: Path, hub: Hub) -> None:
    for count, refusal in ((1, True), (19, True), (20, False)):
        task = {"name": "city", "check": "exact", "content": questions(count, expected="A")}
        loaded = with_tasks(tmp_path, hub, task, evaluation__gate={"tasks.city": {"min": 0.5}})
        if not refusal:
            run_here(loaded, "dataset", tmp_path / "v")
            continue
        with pytest.raises(UserError, match=rf"evaluation.gate.tasks.city: the task has {count} records? in {count} "
                                            "clusters?, which cannot prove anything: at least 20 are needed"):
            run_here(loaded, "dataset", tmp_path / "v")


def test_a_model_in_pickles_is_refused_by_name_and_says_how_to_convert(tmp_path: Path, hub: Hub) -> None:
    repository = model()
    del repository["model.safetensors"]
    message = refused(overlay(tmp_path, hub, repository), "base-model", tmp_path / "v")
    assert "hf://acme/tiny: holds no model.safetensors, but pytorch_model.bin. Pickles are not accepted" in message
    assert "save_pretrained" in message


def test_a_folder_of_pickles_is_refused_too(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tiny" / "model.ckpt").write_bytes(b"pickle")
    source = {"source": "file:tiny", "sha256": folder_sha256(tmp_path / "tiny")}
    with pytest.raises(UserError, match=r"file:tiny: holds no model\.safetensors, but model\.ckpt"):
        run_here(overlay(tmp_path, hub, base_model=source), "base-model", tmp_path / "v")


@pytest.mark.parametrize(("what", "missing", "message"), [
    ("base-model", "config.json", "holds no config.json"), ("reference-model", "config.json", "holds no config.json"),
    ("tokenizer", "tokenizer.json", "holds no tokenizer"), ("reference-model", "tokenizer.json", "holds no tokenizer"),
])
def test_a_repository_without_what_is_needed_says_so(tmp_path: Path, hub: Hub, what: str, missing: str,
                                                    message: str) -> None:
    repository = model()
    del repository[missing]
    with pytest.raises(UserError, match=f"hf://acme/tiny: {message}"):
        run_here(overlay(tmp_path, hub, repository), what, tmp_path / "v")
    assert hub.gets("model.safetensors") == []


def test_a_volume_that_fails_while_weights_are_checked_is_worth_a_retry(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    def fail(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("I/O error: Input/output error (os error 5)")

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(safetensors, "safe_open", fail)
    with pytest.raises(RetryableError, match=r"model.safetensors cannot be read: Input/output error: its volume fails"):
        relocate.check_weights(tmp_path, Source(source="hf://acme/tiny"))


def test_weights_that_were_uploaded_cut_off_are_refused(tmp_path: Path, hub: Hub) -> None:
    loaded = overlay(tmp_path, hub, model(save({"weight": np.ones(1000)})[:-100]))
    with pytest.raises(UserError, match=r"hf://acme/tiny: model\.safetensors is damaged or cut off"):
        run_here(loaded, "base-model", tmp_path / "v")
    assert all_published(tmp_path) == []


@pytest.mark.parametrize("what", ["base-model", "reference-model"])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, hub: Hub, what: str) -> None:
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        run_here(overlay(tmp_path, hub, model() | {"config.json": b"{oops"}), what, tmp_path / "v")
    assert all_published(tmp_path) == []


def test_an_architecture_that_cannot_be_served_is_refused_before_its_weights_come(tmp_path: Path, hub: Hub) -> None:
    message = refused(overlay(tmp_path, hub, model(config={"architectures": ["GPT2LMHeadModel"]})), "base-model",
                      tmp_path / "v")
    assert "vLLM cannot serve a LoRA adapter on GPT2LMHeadModel" in message
    assert "LlamaForCausalLM" in message  # what can be chosen instead
    assert hub.gets("model.safetensors") == []


def test_a_model_that_is_not_what_the_file_says_is_refused_even_when_it_is_there(tmp_path: Path, hub: Hub) -> None:
    run_here(overlay(tmp_path, hub), "base-model", tmp_path / "v")
    commit = hub.add("models", "acme/tiny", model())
    wrong = overlay(tmp_path, hub, base_model={"source": "hf://acme/tiny", "revision": commit,
                                               "architecture": "Qwen3ForCausalLM"})
    with pytest.raises(UserError, match=r"architecture is Qwen3ForCausalLM, but hf://acme/tiny at .* LlamaForCausalLM"):
        run_here(wrong, "base-model", tmp_path / "v")


def test_a_reference_model_need_not_carry_adapters(tmp_path: Path, hub: Hub) -> None:
    loaded = overlay(tmp_path, hub, model(config={"architectures": ["GPT2LMHeadModel"]}))
    run_here(loaded, "reference-model", tmp_path / "v")
    published(loaded, "reference-model", tmp_path / "v")


def test_a_server_that_never_recovers_is_worth_a_retry(tmp_path: Path, hub: Hub) -> None:
    hub.faults.append(Fault("data.jsonl", times=99, status=503))
    done = run(overlay(tmp_path, hub), "dataset", tmp_path / "v")
    assert done.returncode == 1
    assert f"error: {hub.url}/files/data.jsonl: gave up after 3 attempts in a row" in done.stderr
    assert all_published(tmp_path / "v") == []


def test_a_disk_that_fills_up_is_said_and_publishes_nothing(tmp_path: Path, hub: Hub) -> None:
    """A real full disk: a file system of 1 MB in a mount namespace of its own. The server tells no size beforehand."""
    script = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    volumes = tmp_path / "v"
    volumes.mkdir()
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", script, str(volumes), "true"],
                                                     capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    hub.files["data.jsonl"] = DATA * 1500
    hub.lengths = False
    loaded = overlay(tmp_path, hub)
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, str(volumes), *command(loaded, "dataset", volumes)],
                          capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: the disk is full while writing \S+/data\.jsonl\.partial: ", done.stderr)
    assert "enlarge the volume" in done.stderr
    assert "Traceback" not in done.stderr


# --- done, killed, and at the same time ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["dataset", "base-model"])
def test_what_is_already_there_is_found_at_once_without_the_network(tmp_path: Path, hub: Hub, what: str) -> None:
    loaded = overlay(tmp_path, hub)
    run_here(loaded, what, tmp_path / "v")
    hub.seen.clear()
    code = ("import sys; from jobs.__main__ import main; code = main(sys.argv[1:]);"
            "heavy = {'torch', 'transformers', 'huggingface_hub', 'fsspec', 'pyarrow'};"
            "print(sorted(heavy & set(sys.modules))); exit(code)")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *command(loaded, what, tmp_path / "v")[3:]], capture_output=True,
                          text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert "already there and verified" in done.stderr
    assert hub.seen == []
    # Processor time: the wall clock says more about what else runs on the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(("what", "file"), [("base-model", "model.safetensors"), ("dataset", "data.jsonl")])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle_of_a_download_it_goes_on_from_the_last_byte(
        tmp_path: Path, hub: Hub, what: str, file: str, how: signal.Signals) -> None:
    big = [{"prompt": f"Question {n}?", "completion": f"{n} " * 2000} for n in range(300)]
    hub.files["data.jsonl"] = b"".join(json.dumps(r).encode() + b"\n" for r in big)
    loaded, volumes = overlay(tmp_path, hub, model(LARGE)), tmp_path / "v"
    hub.bytes_per_second = 2_000_000
    process = start(loaded, what, volumes)
    wait_for(lambda: partial_bytes(volumes) > 300_000)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[how], stderr
    assert all_published(volumes) == []
    here = partial_bytes(volumes)

    hub.bytes_per_second = None
    done = run(loaded, what, volumes)
    assert done.returncode == 0, done.stderr
    assert [seen.range for seen in hub.gets(file)] == [None, f"bytes={here}-"]
    artifact = published(loaded, what, volumes)
    if what == "base-model":
        assert (artifact.path / "model.safetensors").read_bytes() == LARGE
    else:
        assert sum(artifact.manifest["about"]["records"].values()) == len(big)
    left = [p.name for p in artifact.path.parent.iterdir()]
    assert sorted(left) == sorted([artifact.digest, f".lock-{artifact.digest}"])


def test_killed_again_and_again_it_still_ends_with_the_same_artifact(tmp_path: Path, hub: Hub) -> None:
    moments = random.Random(0)
    loaded, volumes = overlay(tmp_path, hub, model(LARGE)), tmp_path / "v"
    hub.bytes_per_second = 1_500_000
    for _ in range(5):
        process = start(loaded, "base-model", volumes)
        time.sleep(moments.uniform(0.2, 1.6))
        process.kill()
        process.communicate()
    hub.bytes_per_second = None
    assert run(loaded, "base-model", volumes).returncode == 0
    run_here(loaded, "base-model", tmp_path / "undisturbed")
    artifact, other = (published(loaded, "base-model", v) for v in (volumes, tmp_path / "undisturbed"))
    assert artifact.manifest["files"] == other.manifest["files"]
    assert {p.name for p in artifact.path.parent.iterdir()} == {artifact.digest, f".lock-{artifact.digest}"}


def test_what_an_interrupted_run_left_never_gets_into_the_artifact(tmp_path: Path, hub: Hub) -> None:
    loaded, volumes = overlay(tmp_path, hub), tmp_path / "v"
    for what in ("dataset", "base-model"):
        spec = plan(loaded.pipeline).named()[what]
        draft = spec.path(volumes).parent / f".draft-{spec.digest}"
        for name in ("train.jsonl", "raw/old.jsonl", "old.safetensors", ".cache/x.lock", ".artifact.json.1"):
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            (draft / name).write_text("left by a kill")
        run_here(loaded, what, volumes)
    assert files(published(loaded, "dataset", volumes)) == ["holdout.jsonl", "statistics.json", "train.jsonl"]
    assert files(published(loaded, "base-model", volumes)) == ["config.json", "generation_config.json",
                                                               "model.safetensors"]


def test_of_two_at_the_same_time_one_fetches_and_the_other_finds_it_done(tmp_path: Path, hub: Hub) -> None:
    loaded, volumes = overlay(tmp_path, hub, model(LARGE)), tmp_path / "v"
    hub.bytes_per_second = 3_000_000
    processes = [start(loaded, "base-model", volumes) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert len(hub.gets("model.safetensors")) == 1
    assert sum("published base-model" in text for text in said) == 1
    assert sum("already there and verified" in text for text in said) == 1


def test_a_tampered_artifact_is_refused_and_kept(tmp_path: Path, hub: Hub) -> None:
    loaded, volumes = overlay(tmp_path, hub), tmp_path / "v"
    run_here(loaded, "base-model", volumes)
    file = published(loaded, "base-model", volumes).path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = run(loaded, "base-model", volumes)
    assert done.returncode == 2
    assert "model.safetensors was changed" in done.stderr
    assert file.read_bytes() == content


def test_a_volume_that_is_too_small_is_said_before_anything_is_fetched(tmp_path: Path, hub: Hub,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = overlay(tmp_path, hub, model(LARGE))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(UserError, match=r"base-model.*3\.0 MB are needed, but 1\.0 MB are free"):
        run_here(loaded, "base-model", tmp_path / "v")
    assert hub.gets("model.safetensors") == []


def test_sentences_of_many_adapters_do_not_push_each_other_out(tmp_path: Path, hub: Hub) -> None:
    """Retention keeps some of each adapter's. An evaluation would wait in vain for sentences that are gone."""
    made = []
    for number in range(3):
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir()
        pairs = folder / "pairs.csv"
        pairs.write_text("text,acceptable\n" + "".join(
            f"The cook reads {n} books.,1\nReads {n} cook the.,0\n" for n in range(number, number + 3)))
        loaded = overlay(folder, hub, adapter=f"adapter-{number}", retention__keep=1, evaluation__acceptability={
            "source": "file:pairs.csv", "sha256": sha256(pairs.read_bytes())})
        run_here(loaded, "dataset", tmp_path / "v")
        made.append(plan(loaded.pipeline).acceptability)
    assert all(artifacts.find(spec, tmp_path / "v") for spec in made)
