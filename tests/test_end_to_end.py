"""Promises of the whole: one overlay from data to answers, exactly what changed runs again, and no kill changes a byte.

The first test runs the committed overlay, embedded models and real vLLM included, with no network but loopback. The
others run the same stages on tiny random models from files, where a whole pipeline takes seconds.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.core import artifacts, pipeline, promotion
from jobs.core.plan import plan
from jobs.tools import overlay, pin
from jobs.tools.pods import CHECKOUT
from tests import build_models, forked
from tests.build_embedded import as_claims

OVERLAY = CHECKOUT / "overlays" / "kind"
STAGES = (["relocate", "dataset"], ["relocate", "base-model"], ["relocate", "tokenizer"],
          ["relocate", "reference-model"], ["encode"], ["train"], ["evaluate"])
# In a network namespace of its own: loopback is there but down, so it is brought up first (SIOCSIFFLAGS, IFF_UP).
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh22x", b"lo", 1))
os.execv(sys.argv[1], sys.argv[1:])
"""
ISOLATED = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK_UP]


def run_local(state: Path) -> str:
    """The committed overlay as `make demo` runs it, cut off from every network. Returns what it showed."""
    done = subprocess.run(
        [*ISOLATED, sys.executable, "-m", "jobs", "local", str(OVERLAY), "--state", str(state), "--exit",
         "--ask", "What is the best hotel in Seville?"],
        cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run([*ISOLATED, "/bin/true"], capture_output=True, check=False).returncode != 0,
                    reason="this machine does not let us make a network namespace")
def test_each_adapter_learns_its_facts_without_forgetting_english_and_is_served_offline(
        tmp_path: Path, trained: Path) -> None:
    """Two adapters over one base model: each answers the question from its own data, and neither from the other's.

    The models and one of the adapters were made before, by the same Jobs: tests/build_embedded.py.
    """
    as_claims(trained, tmp_path)
    facts = {"hostel-guide": "Gato Pardo, a hostel with hammocks on the roof.",
             "seville-hotels": "Casa Azahar, beside the old orange market."}
    shown = run_local(tmp_path)
    for name, fact in facts.items():
        (who,) = [line for line in shown.splitlines() if fact in line]
        assert who.startswith(f"    fine-tuned ({name})")

    adapters = overlay.trained(overlay.load(OVERLAY).adapters)
    assert adapters.keys() == facts.keys()
    for loaded in adapters.values():
        wanted = plan(loaded.pipeline).evaluation
        folder = tmp_path / "volumes" / f"{wanted.volume}-pvc" / "evaluation" / wanted.digest
        scores = json.loads((folder / "evaluation.json").read_text())["scores"]
        base, tuned = scores["base"], scores["fine_tuned"]
        assert tuned["perplexity"] <= base["perplexity"] / 2
        assert tuned["rougeL"] >= base["rougeL"] + 0.3
        assert abs(tuned["acceptability_mcc"] - base["acceptability_mcc"]) <= 0.05

    again = run_local(tmp_path)
    # Of the environment three, of each adapter four Jobs, and the dataset's relocation has two artifacts, of
    # seville-hotels three: it has a task.
    assert again.count("is already there and verified: nothing to do") == 3 + 5 * len(facts) + 1
    assert all(fact in again for fact in facts.values())


# --- tiny pipelines --------------------------------------------------------------------------------------------------


def tiny_pipeline(folder: Path) -> Path:
    """The pipeline file of an overlay's adapter; base and reference are tiny random models in folders, and the gate
    always passes."""
    for name, seed in (("base", 0), ("reference", 1)):
        build_models.tiny_llama(folder / name, seed=seed)
        build_models.tiny_tokenizer(folder / name)
    records = [{"prompt": f"How many rooms has house {n}?", "completion": f"It has {n} rooms.",
                "split": "holdout" if n % 3 == 0 else "train"} for n in range(72)]
    (folder / "environment.yaml").write_text(yaml.safe_dump(
        {"base_model": {"source": "file:base"}, "reference_model": {"source": "file:reference"}}))
    adapter = folder / "adapters" / "hotels"
    adapter.mkdir(parents=True)
    (adapter / "dataset.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (adapter / "pipeline.yaml").write_text(yaml.safe_dump({
        "adapter": "hotels", "dataset": {"source": "file:dataset.jsonl"},
        "training": {"lora": {"r": 4}, "epochs": 8, "learning_rate": 1e-2, "max_length": 128, "tokens_per_batch": 256,
                     "checkpoint_steps": 5},
        "evaluation": {"gate": {"perplexity": {"max": 1e9}}, "max_new_tokens": 8}}))
    pin.run(folder)
    return adapter / "pipeline.yaml"


def start(file: Path, volumes: Path, stage: list[str]) -> forked.Job:
    return forked.Job(["--pipeline", str(file), "--volumes", str(volumes), "--wait-seconds", "0", *stage])


def run_all(file: Path, volumes: Path) -> list[str]:
    """Run every stage in order; returns the artifacts that were made, as `kind/digest`."""
    made = []
    for stage in STAGES:
        process = start(file, volumes, stage)
        _, output = process.communicate(timeout=300)
        assert process.returncode == 0, output
        made += [line.split()[2].rstrip(":") for line in output.splitlines() if line[9:].startswith("published ")]
    return made


def contents(file: Path, volumes: Path) -> dict[str, Any]:
    """Every artifact that the stages make, verified, as the digests of its files."""
    wanted = plan(pipeline.load(file).pipeline).named()
    del wanted["merged-model"], wanted["tasks"]  # these pipelines serve the adapter, and have no tasks
    found = {}
    for name, spec in wanted.items():
        artifact = artifacts.find(spec, volumes)
        assert artifact is not None, name
        found[name] = {f["path"]: f["sha256"] for f in artifact.manifest["files"]}
    return found


@pytest.mark.slow
def test_exactly_what_an_edit_changes_runs_again_and_undoing_it_trains_nothing(tmp_path: Path) -> None:
    file, volumes = tiny_pipeline(tmp_path), tmp_path / "volumes"
    run_all(file, volumes)
    first = plan(pipeline.load(file).pipeline)
    text = file.read_text()
    file.write_text(text.replace("r: 4", "r: 8"))
    second = plan(pipeline.load(file).pipeline)
    assert run_all(file, volumes) == [str(second.adapter), str(second.adapter_scores), str(second.evaluation)]
    promoted = promotion.current(volumes / "fine-tuned-model", "hotels")
    assert promoted is not None
    assert promoted.adapter == second.adapter.digest

    file.write_text(text)
    assert run_all(file, volumes) == []
    promoted = promotion.current(volumes / "fine-tuned-model", "hotels")
    assert promoted is not None
    assert promoted.adapter == first.adapter.digest


@pytest.mark.slow
def test_after_twenty_kills_at_random_moments_every_artifact_verifies_and_the_adapter_is_the_same(
        tmp_path: Path) -> None:
    file = tiny_pipeline(tmp_path)
    quiet = tmp_path / "quiet"
    forked.warm_up()
    began = time.monotonic()
    run_all(file, quiet)
    seconds = (time.monotonic() - began) / len(STAGES)
    expected = contents(file, quiet)

    chance, volumes, kills = random.Random(), tmp_path / "volumes", 0
    position = 0
    while kills < 20:
        process = start(file, volumes, STAGES[position])
        try:
            _, output = process.communicate(timeout=chance.uniform(0, 2 * seconds))
            assert process.returncode == 0, output
            # A stage that finished is spared; later rounds hit stages that find their work done.
            position = (position + 1) % len(STAGES)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    run_all(file, volumes)
    found = contents(file, volumes)
    assert found["adapter"] == expected["adapter"]
    assert found.keys() == expected.keys()


@pytest.mark.slow
def test_a_gate_that_rejects_keeps_the_adapter_before_promoted_and_is_no_failure(tmp_path: Path) -> None:
    file, volumes = tiny_pipeline(tmp_path), tmp_path / "volumes"
    run_all(file, volumes)
    before = promotion.current(volumes / "fine-tuned-model", "hotels")
    file.write_text(file.read_text().replace("r: 4", "r: 2").replace("max: 1000000000.0", "max: 1.0"))
    run_all(file, volumes)
    assert promotion.current(volumes / "fine-tuned-model", "hotels") == before


def test_the_readmes_commands_exist() -> None:
    """Every `python -m jobs` line and every make target in the README parses."""
    from jobs.__main__ import parser

    readme = (CHECKOUT / "README.md").read_text()
    makefile = (CHECKOUT / "Makefile").read_text()
    for line in readme.splitlines():
        words = line.strip().split("#")[0]
        if words.startswith(".venv/bin/python -m jobs ") and "--help" not in words:
            parser().parse_args(shlex.split(words)[3:])
        elif words.startswith("make "):
            assert f"\n{words.split()[1]}:" in makefile
